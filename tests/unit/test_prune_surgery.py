"""Cutting checkpoints: exact where nothing of value goes, and openable by stock transformers always."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from stillroom.errors import EnvironmentCannot, InputError
from stillroom.models.shape import ModelShape, shape_of
from stillroom.models.weights import tensor_entries
from stillroom.prune import surgery
from stillroom.prune.cut import Cut, cut_shape, rescales_of, tensor_cut
from stillroom.prune.surgery import cut_checkpoint, source_shape
from tiny import FAMILIES, edited_checkpoint, tiny_checkpoint, tiny_config, tiny_model, tiny_tokenizer

NUM_LAYERS, HIDDEN, FFN, HEADS, GROUPS, HEAD_DIM = 4, 64, 128, 4, 2, 16
ALL_LAYERS = tuple(range(NUM_LAYERS))


def same_in_every_layer(kept: tuple[int, ...]) -> dict[int, tuple[int, ...]]:
    return dict.fromkeys(ALL_LAYERS, kept)


def logits(model_or_dir: Any) -> Tensor:
    """(2, 12, vocab) float32 logits on fixed ids."""
    model = model_or_dir
    if isinstance(model_or_dir, Path):
        model, info = AutoModelForCausalLM.from_pretrained(model_or_dir, dtype="auto", output_loading_info=True)
        assert not info["missing_keys"], info
        assert not info["unexpected_keys"], info
        assert not info["mismatched_keys"], info
    ids = torch.randint(3, 384, (2, 12), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        result: Tensor = model.eval()(ids).logits.float()
    return result


def assert_same_logits(cut_dir: Path, dense_dir: Path) -> None:
    dense = logits(dense_dir)
    assert dense.std() > 0.01  # the comparison means something
    torch.testing.assert_close(logits(cut_dir), dense, rtol=1e-4, atol=2e-5 * dense.abs().max().item())


def even_shares(shape: ModelShape, zero: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Shares as they are measured when the channels in `zero` never carry anything."""
    share = torch.ones(shape.hidden_size)
    share[list(zero)] = 0
    names = (p.format(layer=i) for p in shape.family.hidden_norms for i in range(shape.num_layers))
    return {name: share / share.sum() for name in names}


@pytest.mark.parametrize("family", FAMILIES)
def test_cutting_nothing_is_the_identity(family: str, tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", family, dtype=torch.bfloat16)
    shape = source_shape(dense)
    everything = Cut(
        ALL_LAYERS,
        hidden=tuple(range(HIDDEN)),
        ffn=same_in_every_layer(tuple(range(FFN))),
        heads=same_in_every_layer(tuple(range(HEADS))),
        kv_groups=same_in_every_layer(tuple(range(GROUPS))),
    )
    for name, cut, shares in (("bare", Cut(ALL_LAYERS), None), ("spelled", everything, even_shares(shape))):
        cut_checkpoint(dense, shape, cut, tmp_path / name, norm_shares=shares)
        before, after = load_file(dense / "model.safetensors"), load_file(tmp_path / name / "model.safetensors")
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
        assert torch.equal(logits(tmp_path / name), logits(dense))


@pytest.mark.parametrize("family", FAMILIES)
def test_layers_that_add_nothing_can_go(family: str, tmp_path: Path) -> None:
    def silence(model: Any) -> None:
        for layer in (1, 2):
            model.model.layers[layer].self_attn.o_proj.weight.zero_()
            model.model.layers[layer].mlp.down_proj.weight.zero_()

    dense = edited_checkpoint(tmp_path / "dense", family, silence)
    target = cut_checkpoint(dense, source_shape(dense), Cut((0, 3)), tmp_path / "cut")
    assert target.num_layers == 2
    assert_same_logits(tmp_path / "cut", dense)


@pytest.mark.parametrize("family", FAMILIES)
def test_ffn_channels_that_nothing_reads_can_go(family: str, tmp_path: Path) -> None:
    dead = {i: tuple(range(i, FFN, 4)) for i in ALL_LAYERS}

    def silence(model: Any) -> None:
        for i in ALL_LAYERS:
            model.model.layers[i].mlp.down_proj.weight[:, list(dead[i])] = 0

    dense = edited_checkpoint(tmp_path / "dense", family, silence)
    kept = {i: tuple(c for c in range(FFN) if c not in dead[i]) for i in ALL_LAYERS}
    target = cut_checkpoint(dense, source_shape(dense), Cut(ALL_LAYERS, ffn=kept), tmp_path / "cut")
    assert target.intermediate_size == 96
    assert_same_logits(tmp_path / "cut", dense)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("groups", "heads"),
    [
        ((0, 1), {0: (0, 2), 1: (1, 3), 2: (0, 3), 3: (1, 2)}),  # one query head of each group stays
        ((1,), dict.fromkeys(ALL_LAYERS, (2, 3))),  # one whole group stays
        ((0,), {0: (0,), 1: (1,), 2: (0,), 3: (1,)}),
    ],
)
def test_heads_that_nothing_reads_can_go(
    family: str, groups: tuple[int, ...], heads: dict[int, tuple[int, ...]], tmp_path: Path
) -> None:
    def silence(model: Any) -> None:
        for i in ALL_LAYERS:
            columns = model.model.layers[i].self_attn.o_proj.weight.view(HIDDEN, HEADS, HEAD_DIM)
            columns[:, [h for h in range(HEADS) if h not in heads[i]]] = 0

    dense = edited_checkpoint(tmp_path / "dense", family, silence)
    cut = Cut(ALL_LAYERS, heads=heads, kv_groups=same_in_every_layer(groups))
    target = cut_checkpoint(dense, source_shape(dense), cut, tmp_path / "cut")
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert (target.num_attention_heads, target.num_key_value_heads) == (len(heads[0]), len(groups))
    assert (config["num_attention_heads"], config["num_key_value_heads"]) == (len(heads[0]), len(groups))
    assert config["head_dim"] == HEAD_DIM
    assert_same_logits(tmp_path / "cut", dense)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [True, False])
def test_hidden_channels_that_nothing_writes_can_go(family: str, tied: bool, tmp_path: Path) -> None:
    dead = tuple(range(3, HIDDEN, 4))

    def silence(model: Any) -> None:
        model.model.embed_tokens.weight[:, list(dead)] = 0
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight[list(dead)] = 0
            layer.mlp.down_proj.weight[list(dead)] = 0

    # the epsilon of the norms is added to another mean square after the cut; at 1e-12 that is below float32's precision
    dense = edited_checkpoint(tmp_path / "dense", family, silence, tie_word_embeddings=tied, rms_norm_eps=1e-12)
    shape = source_shape(dense)
    kept = tuple(c for c in range(HIDDEN) if c not in dead)
    target = cut_checkpoint(
        dense, shape, Cut(ALL_LAYERS, hidden=kept), tmp_path / "cut", norm_shares=even_shares(shape, dead)
    )
    assert target.hidden_size == 48
    assert ("lm_head.weight" in tensor_entries(tmp_path / "cut")) is not tied
    assert_same_logits(tmp_path / "cut", dense)


def test_a_norm_keeps_its_output_on_the_kept_channels_when_each_token_has_the_same_shares(tmp_path: Path) -> None:
    """The formula by itself: scale * x / rms(x) on the kept channels, before and after."""
    for offset, family in ((0.0, "llama"), (1.0, "gemma3_text")):
        shape = shape_of(tiny_config(family).to_dict(), "tiny")
        signs = torch.randn(5, HIDDEN).sign()
        x = signs * torch.rand(HIDDEN).add(0.1)  # every token has the same squares
        shares = {name: x[0] ** 2 / (x[0] ** 2).sum() for name in even_shares(shape)}
        kept = tuple(range(0, HIDDEN, 3))
        weight = torch.randn(HIDDEN)
        name = "model.layers.0.input_layernorm.weight"
        cut = Cut(ALL_LAYERS, hidden=kept)
        new = tensor_cut(name, shape, cut, rescales_of(shape, cut, shares, None, shares.__getitem__)).of_rows(weight)
        before = (offset + weight) * x / x.square().mean(-1, keepdim=True).sqrt()
        y = x[:, list(kept)]
        after = (offset + new) * y / y.square().mean(-1, keepdim=True).sqrt()
        torch.testing.assert_close(after, before[:, list(kept)])


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_cut_at_once_opens_in_transformers(family: str, tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", family)
    shape = source_shape(dense)
    cut = Cut(
        (0, 1, 3),
        hidden=tuple(range(0, HIDDEN, 2)),
        ffn=same_in_every_layer(tuple(range(96))),
        heads=same_in_every_layer((0, 1)),
        kv_groups=same_in_every_layer((0,)),
    )
    target = cut_checkpoint(dense, shape, cut, tmp_path / "cut", norm_shares=even_shares(shape))
    written = {name: entry.shape for name, entry in tensor_entries(tmp_path / "cut").items()}
    assert written == target.tensor_shapes()
    assert shape_of(target.config, "cut").num_params == target.num_params == sum(map(math.prod, written.values()))
    assert torch.isfinite(logits(tmp_path / "cut")).all()
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    assert (model.config.hidden_size, model.config.num_hidden_layers, model.config.head_dim) == (32, 3, HEAD_DIM)
    assert model.config.tie_word_embeddings == shape.tied
    tied = model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
    assert tied == shape.tied
    if shape.family.per_layer_lists:
        types = json.loads((dense / "config.json").read_text())["layer_types"]
        assert json.loads((tmp_path / "cut" / "config.json").read_text())["layer_types"] == [
            types[0],
            types[1],
            types[3],
        ]
    assert (tmp_path / "cut" / "tokenizer.json").exists()
    assert "chat_template" in (tmp_path / "cut" / "chat_template.jinja").name


def test_per_layer_fields_that_the_config_leaves_out_are_spelled_out_before_the_cut(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", "gemma3_text")
    config = json.loads((dense / "config.json").read_text())
    config.pop("layer_types")
    config["sliding_window_pattern"] = 2
    (dense / "config.json").write_text(json.dumps(config))
    cut_checkpoint(dense, source_shape(dense), Cut((1, 2, 3)), tmp_path / "cut")
    written = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert written["layer_types"] == ["full_attention", "sliding_attention", "full_attention"]


def test_biases_are_cut_with_their_channels(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", "llama", attention_bias=True, mlp_bias=True)
    shape = source_shape(dense)
    cut = Cut(
        (0, 2), ffn=same_in_every_layer((1, 5)), heads=same_in_every_layer((2, 3)), kv_groups=same_in_every_layer((1,))
    )
    cut_checkpoint(dense, shape, cut, tmp_path / "cut")
    before, after = load_file(dense / "model.safetensors"), load_file(tmp_path / "cut" / "model.safetensors")
    old, new = "model.layers.2.", "model.layers.1."
    assert torch.equal(after[f"{new}mlp.up_proj.bias"], before[f"{old}mlp.up_proj.bias"][[1, 5]])
    assert torch.equal(after[f"{new}self_attn.k_proj.bias"], before[f"{old}self_attn.k_proj.bias"][16:])
    assert torch.equal(after[f"{new}self_attn.q_proj.bias"], before[f"{old}self_attn.q_proj.bias"][32:])
    assert torch.equal(after[f"{new}self_attn.o_proj.bias"], before[f"{old}self_attn.o_proj.bias"])
    logits(tmp_path / "cut")


def test_sharded_checkpoints_are_read_and_written(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    tiny_model("qwen3").save_pretrained(dense, max_shard_size="100KB")
    tiny_tokenizer().save_pretrained(dense)
    assert len(list(dense.glob("*.safetensors"))) > 2
    shape = source_shape(dense)
    target = cut_checkpoint(dense, shape, Cut((1, 2)), tmp_path / "many", max_shard_bytes=100_000)
    cut_checkpoint(dense, shape, Cut((1, 2)), tmp_path / "one")
    shards = sorted((tmp_path / "many").glob("*.safetensors"))
    assert len(shards) > 2
    index = json.loads((tmp_path / "many" / "model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(target.tensor_shapes())
    assert index["metadata"]["total_size"] == 4 * target.num_params
    assert all(shard.stat().st_size < 120_000 or len(load_file(shard)) == 1 for shard in shards)
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    assert torch.equal(logits(tmp_path / "many"), logits(tmp_path / "one"))


def test_a_truncated_file_is_found_before_anything_is_written(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    weights = dense / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors is truncated"):
        source_shape(dense)


def test_a_missing_shard_is_found_before_anything_is_written(tmp_path: Path) -> None:
    dense = tmp_path / "dense"
    tiny_model().save_pretrained(dense, max_shard_size="100KB")
    sorted(dense.glob("*.safetensors"))[1].unlink()
    with pytest.raises(InputError, match="lacks 1 of its"):
        source_shape(dense)


def test_tensors_that_the_family_does_not_know_are_refused_but_rotary_buffers_are_not(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", "qwen2")
    weights = load_file(dense / "model.safetensors")
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    cut_checkpoint(dense, source_shape(dense), Cut((0, 1)), tmp_path / "cut")
    logits(tmp_path / "cut")
    weights["model.layers.0.adapter.weight"] = torch.ones(8)
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"1 tensors that a qwen2 .* model\.layers\.0\.adapter\.weight"):
        source_shape(dense)


def test_a_tied_head_that_was_written_all_the_same_is_left_behind(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", "llama")
    weights = load_file(dense / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    cut_checkpoint(dense, source_shape(dense), Cut((0, 1)), tmp_path / "cut")
    assert "lm_head.weight" not in tensor_entries(tmp_path / "cut")


def test_a_quantized_checkpoint_is_refused(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    (dense / "hf_quant_config.json").write_text("{}")
    with pytest.raises(InputError, match="is quantized; prune before quantizing"):
        source_shape(dense)


def test_weights_in_eight_bits_are_refused_without_a_quantization_config_too(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    weights = load_file(dense / "model.safetensors")
    weights["model.norm.weight"] = weights["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(weights, dense / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"model\.norm\.weight is F8_E4M3"):
        source_shape(dense)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused_by_name(bad: float, tmp_path: Path) -> None:
    def damage(model: Any) -> None:
        model.model.layers[1].mlp.up_proj.weight[3, 4] = bad

    dense = edited_checkpoint(tmp_path / "dense", "llama", damage)
    with pytest.raises(InputError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds NaN or infinite"):
        cut_checkpoint(dense, source_shape(dense), Cut((0, 1)), tmp_path / "cut")


def test_a_full_disk_is_said_before_the_first_byte(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    monkeypatch.setattr(surgery.shutil, "disk_usage", lambda path: surgery.shutil._ntuple_diskusage(10, 5, 5))  # type: ignore[attr-defined]
    with pytest.raises(EnvironmentCannot, match="has 5 bytes free; the pruned model needs"):
        cut_checkpoint(dense, source_shape(dense), Cut((0,)), tmp_path / "cut")
    assert list((tmp_path / "cut").iterdir()) == []


@st.composite
def shapes_and_cuts(draw: st.DrawFn) -> tuple[ModelShape, Cut]:
    """A shape of any family and any homogeneous cut of it."""
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    layers = draw(st.integers(1, 4))
    config: dict[str, Any] = {
        "vocab_size": 11,
        "num_hidden_layers": layers,
        "hidden_size": draw(st.integers(2, 12)),
        "intermediate_size": draw(st.integers(2, 12)),
        "num_attention_heads": groups * per_group,
        "num_key_value_heads": groups,
        "head_dim": draw(st.integers(1, 3)) * 2,
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "layer_types": [f"type {i}" for i in range(layers)],
        "model_type": draw(st.sampled_from(FAMILIES)),
    }

    def some(count: int, size: int | None = None) -> tuple[int, ...]:
        size = size or draw(st.integers(1, count))
        return tuple(sorted(draw(st.permutations(range(count)))[:size]))

    kept = some(layers)
    num_ffn = draw(st.integers(1, config["intermediate_size"]))
    num_groups, num_each = draw(st.integers(1, groups)), draw(st.integers(1, per_group))
    kv = {i: some(groups, num_groups) for i in kept}
    heads = {i: tuple(g * per_group + h for g in kv[i] for h in some(per_group, num_each)) for i in kept}
    ffn = {i: some(config["intermediate_size"], num_ffn) for i in kept}
    return shape_of(config, "drawn"), Cut(kept, hidden=some(config["hidden_size"]), ffn=ffn, heads=heads, kv_groups=kv)


@settings(max_examples=40, deadline=None)
@given(drawn=shapes_and_cuts())
def test_any_cut_holds_exactly_the_kept_numbers(drawn: tuple[ModelShape, Cut], tmp_path_factory: Any) -> None:
    """Each matrix against plain indexing; norms and embeddings, which are rescaled, only by shape."""
    shape, cut = drawn
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "config.json").write_text(json.dumps(shape.config))
    before = {name: torch.randn(size) for name, size in shape.tensor_shapes().items()}
    save_file(before, folder / "model.safetensors", metadata={"format": "pt"})
    target = cut_checkpoint(folder, source_shape(folder), cut, folder / "cut", norm_shares=even_shares(shape))
    after = load_file(folder / "cut" / "model.safetensors")
    assert {name: tuple(tensor.shape) for name, tensor in after.items()} == target.tensor_shapes()
    assert dataclasses.asdict(target) == dataclasses.asdict(cut_shape(shape, cut))
    if shape.family.per_layer_lists:
        assert target.config["layer_types"] == [f"type {i}" for i in cut.layers]
    assert cut.heads is not None
    assert cut.kv_groups is not None
    assert cut.ffn is not None
    assert cut.hidden is not None
    for new, old in enumerate(cut.layers):
        rows = [h * shape.head_dim + i for h in cut.heads[old] for i in range(shape.head_dim)]
        pairs = [h * shape.head_dim + i for h in cut.kv_groups[old] for i in range(shape.head_dim)]
        for module, out, inner in (
            ("self_attn.q_proj", rows, cut.hidden),
            ("self_attn.k_proj", pairs, cut.hidden),
            ("self_attn.v_proj", pairs, cut.hidden),
            ("self_attn.o_proj", cut.hidden, rows),
            ("mlp.gate_proj", cut.ffn[old], cut.hidden),
            ("mlp.down_proj", cut.hidden, cut.ffn[old]),
        ):
            whole = before[f"model.layers.{old}.{module}.weight"]
            assert torch.equal(after[f"model.layers.{new}.{module}.weight"], whole[list(out)][:, list(inner)])
