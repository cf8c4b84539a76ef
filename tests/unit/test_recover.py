"""What another pruner kept is found from what it wrote; what it does not tell is a reason."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from minitron import random_cut, sliced_checkpoint
from stillroom.models.shape import ModelShape
from stillroom.prune.cut import Cut
from stillroom.prune.recover import NotRecovered, recover_cut
from stillroom.prune.surgery import cut_checkpoint, source_shape
from tiny import edited_checkpoint, tiny_checkpoint

WIDTHS = {"num_layers": 3, "intermediate_size": 96, "num_attention_heads": 2}
SIZES: dict[str, dict[str, int]] = {
    "llama": WIDTHS | {"hidden_size": 48},
    "qwen2": {"num_layers": 2, "intermediate_size": 96, "num_attention_heads": 2, "hidden_size": 32},
    "qwen3": WIDTHS | {"hidden_size": 48},
    "gemma3_text": WIDTHS | {"hidden_size": 48},
    "phi3": WIDTHS | {"hidden_size": 48},
    "olmo2": WIDTHS | {"hidden_size": 48},
    "starcoder2": WIDTHS | {"hidden_size": 48},
    "gpt2": {"num_layers": 3, "intermediate_size": 96, "num_attention_heads": 3, "hidden_size": 48},
    "qwen3_moe": {
        "num_layers": 3, "num_experts": 3, "moe_intermediate_size": 16, "hidden_size": 48, "num_attention_heads": 2,
    },
}  # fmt: skip


def recovered(dense: Path, out: Path, target: ModelShape) -> Cut:
    return recover_cut(dense, source_shape(dense), out, target)


@pytest.mark.parametrize("family", SIZES)
def test_parts_in_another_order_are_found_in_every_kind_of_layer(family: str, tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", family, dtype=torch.bfloat16)
    cut = random_cut(source_shape(dense), SIZES[family], seed=1)
    target = sliced_checkpoint(dense, cut, tmp_path / "out")
    assert recovered(dense, tmp_path / "out", target) == cut


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("llama"), "llama", dtype=torch.bfloat16)


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    num_layers=st.integers(1, 4), hidden=st.integers(1, 32), ffn=st.integers(1, 64), each=st.integers(1, 2),
    given_sizes=st.sets(st.sampled_from(["num_layers", "hidden_size", "intermediate_size", "num_attention_heads"])),
    seed=st.integers(0, 1000),
)  # fmt: skip
def test_any_parts_in_any_order_are_found(
    num_layers: int, hidden: int, ffn: int, each: int, given_sizes: set[str], seed: int, llama: Path, tmp_path: Path
) -> None:
    """Widths that are in order and whole are None in what is found, whatever the cut called them."""
    sizes = {"num_layers": num_layers, "hidden_size": 2 * hidden, "intermediate_size": 2 * ffn,
             "num_attention_heads": 2 * each}  # fmt: skip
    shape = source_shape(llama)
    cut = random_cut(shape, {name: sizes[name] for name in given_sizes}, seed)
    found = recovered(llama, tmp_path, sliced_checkpoint(llama, cut, tmp_path))
    whole = {"hidden": tuple(range(64)), "ffn": dict.fromkeys(cut.layers, tuple(range(128))),
             "heads": dict.fromkeys(cut.layers, tuple(range(4)))}  # fmt: skip
    as_it_was: dict[str, Any] = {field: None for field, kept in whole.items() if getattr(cut, field) == kept}
    assert found == dataclasses.replace(cut, **as_it_was)


def even_shares(shape: ModelShape) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Under which norms stay as they are: each channel carries as much as any other."""
    modules = [name for pattern in shape.family.hidden_norms for name in
               (shape.spelled_out(pattern).values() if "{layer}" in pattern else [pattern])]  # fmt: skip
    return {m: torch.ones(shape.hidden_size) for m in modules}, {m: torch.zeros(shape.hidden_size) for m in modules}


@pytest.mark.parametrize("family", ["llama", "gpt2", "starcoder2"])
def test_what_this_project_cuts_is_found_too(family: str, tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", family)
    shape = source_shape(dense)
    drawn = random_cut(shape, {"hidden_size": 64 if family == "gpt2" else 48, "intermediate_size": 96, "num_layers": 2},
                       seed=3)  # fmt: skip
    assert drawn.ffn is not None
    assert drawn.hidden is not None
    cut = Cut(
        drawn.layers,
        hidden=tuple(sorted(drawn.hidden)) if len(drawn.hidden) < 64 else None,
        ffn={layer: tuple(sorted(kept)) for layer, kept in drawn.ffn.items()},
    )
    shares, means = even_shares(shape)
    target = cut_checkpoint(dense, shape, cut, tmp_path / "out", norm_shares=shares, norm_means=means)
    assert recovered(dense, tmp_path / "out", target) == cut


def test_a_result_in_another_type_is_compared_with_rounded_numbers(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", "qwen3", dtype=torch.float32)
    cut = random_cut(source_shape(dense), WIDTHS, seed=2)
    target = sliced_checkpoint(dense, cut, tmp_path / "out", torch.bfloat16)
    assert recovered(dense, tmp_path / "out", target) == cut


def test_large_tables_are_compared_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stillroom.models.tensors.BLOCK_BYTES", 1000)
    dense = tiny_checkpoint(tmp_path / "dense", "gpt2")
    cut = random_cut(source_shape(dense), SIZES["gpt2"], seed=2)
    assert recovered(dense, tmp_path / "out", sliced_checkpoint(dense, cut, tmp_path / "out")) == cut


def alike_hidden(model: Any) -> None:
    for table in (model.model.embed_tokens.weight, model.lm_head.weight, model.model.norm.weight):
        table[..., 9] = table[..., 5]


def alike_layers(model: Any) -> None:
    model.model.layers[2].load_state_dict(model.model.layers[1].state_dict())


def dead_channels(model: Any) -> None:
    for layer in model.model.layers:
        layer.mlp.gate_proj.weight[:40] = layer.mlp.up_proj.weight[:40] = 0
        layer.mlp.down_proj.weight[:, :40] = 0


@pytest.mark.parametrize(
    ("edit", "cut", "reason"),
    [
        (alike_hidden, Cut((0, 1, 2, 3), hidden=tuple(range(48))), "hidden channels 5 and 9 have the same embedding"),
        (alike_layers, Cut((0, 1, 3)), "layer 1 may be layer 1 of the unpruned model, or 2: they are alike"),
    ],
)
def test_parts_that_are_alike_are_a_reason(edit: Callable[[Any], None], cut: Cut, reason: str, tmp_path: Path) -> None:
    dense = edited_checkpoint(tmp_path / "dense", "qwen3", edit)
    target = sliced_checkpoint(dense, cut, tmp_path / "out")
    with pytest.raises(NotRecovered, match=reason):
        recovered(dense, tmp_path / "out", target)


def test_alike_parts_that_stay_where_they_are_need_not_be_told_apart(tmp_path: Path) -> None:
    dense = edited_checkpoint(tmp_path / "dense", "qwen3", alike_layers)
    cut = random_cut(source_shape(dense), {"intermediate_size": 96}, seed=4)
    assert recovered(dense, tmp_path / "out", sliced_checkpoint(dense, cut, tmp_path / "out")) == cut
    other = edited_checkpoint(tmp_path / "other", "qwen3", alike_hidden)
    cut = Cut((0, 2, 3))
    assert recovered(other, tmp_path / "again", sliced_checkpoint(other, cut, tmp_path / "again")) == cut


def test_channels_that_do_the_same_are_taken_in_order(tmp_path: Path) -> None:
    """Forty that do nothing: which of them stays makes no difference."""
    dense = edited_checkpoint(tmp_path / "dense", "llama", dead_channels)
    kept = (7, 100, 3, *range(50, 79))
    cut = Cut((0, 1, 2, 3), ffn=dict.fromkeys(range(4), kept))
    found = recovered(dense, tmp_path / "out", sliced_checkpoint(dense, cut, tmp_path / "out"))
    assert found.ffn == dict.fromkeys(range(4), (0, 100, 1, *range(50, 79)))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.embed_tokens.weight", "the embedding, the head or the final norm has other numbers"),
        ("model.norm.weight", "the embedding, the head or the final norm has other numbers"),
        ("model.layers.1.input_layernorm.weight", "layer 1 is not made of numbers of any of layers 1 to 2"),
        ("model.layers.2.self_attn.k_proj.weight", "layer 2 is not made of numbers of any of layers 2 to 3"),
        ("model.layers.2.mlp.down_proj.weight", "layer 2 is not made of numbers of any of layers 2 to 3"),
        ("model.layers.0.self_attn.q_norm.weight", "layer 0 is not made of numbers of any of layers 0 to 1"),
    ],
)
def test_a_number_that_was_changed_is_a_reason(name: str, reason: str, tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", "qwen3", tie_word_embeddings=True)
    target = sliced_checkpoint(dense, random_cut(source_shape(dense), SIZES["qwen3"], seed=5), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors[name].flatten()[3] += 1e-3
    save_file(tensors, file, metadata={"format": "pt"})
    kept = recover_or_reason(dense, tmp_path / "out", target)
    assert isinstance(kept, str)
    assert reason in kept


def recover_or_reason(dense: Path, out: Path, target: ModelShape) -> Cut | str:
    try:
        return recovered(dense, out, target)
    except NotRecovered as error:
        return str(error)


def test_a_table_that_differs_beyond_the_sampled_rows_is_a_reason(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", "qwen3")
    target = sliced_checkpoint(dense, Cut((0, 1, 2)), tmp_path / "out")
    file = tmp_path / "out" / "model.safetensors"
    tensors = load_file(file)
    tensors["lm_head.weight"][2] *= 2  # of 384 rows, every third is not sampled
    save_file(tensors, file, metadata={"format": "pt"})
    assert recover_or_reason(dense, tmp_path / "out", target) == (
        "lm_head.weight has other numbers than the unpruned model's"
    )


def test_another_vocabulary_or_another_set_of_tensors_is_a_reason(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", "qwen3")
    target = sliced_checkpoint(dense, Cut((0, 1, 2)), tmp_path / "out")
    wider = dataclasses.replace(target, vocab_size=512)
    assert recover_or_reason(dense, tmp_path / "out", wider) == "vocab_size is 512, and the unpruned model's 384"
    tied = dataclasses.replace(target, tied=True)
    assert recover_or_reason(dense, tmp_path / "out", tied) == "only one of the two models has lm_head.weight"
