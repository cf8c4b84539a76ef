"""Every family that is described: its tensors are the real architecture's, and cutting it is exact where nothing of
value goes. The references are slow and obvious: the model in memory with what goes silenced, and plain loops."""

from __future__ import annotations

import dataclasses
import json
import math
import random
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassClassValidationError
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stillroom.errors import InputError
from stillroom.export.checks import check_checkpoint
from stillroom.models.family import axis_parts, families
from stillroom.models.load import AUTO_CLASSES, load_model
from stillroom.models.shape import ModelShape, read_config, shape_of
from stillroom.models.weights import check_weights, tensor_entries
from stillroom.prune.cut import Cut, cut_shape
from stillroom.prune.surgery import cut_checkpoint, source_shape
from stillroom.prune.targets import target_shape
from stillroom.recipe import Prune
from tiny import ALL_FAMILIES, tiny_model

HIDDEN, FFN, HEADS, HEAD_DIM = 64, 128, 4, 16
NO_EPSILON = {
    "starcoder2": "norm_epsilon", "gpt2": "layer_norm_epsilon", "t5": "layer_norm_epsilon", "bert": "layer_norm_eps",
    "roberta": "layer_norm_eps",
}  # fmt: skip
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    *((family, {}) for family in ALL_FAMILIES),
    ("t5", {"feed_forward_proj": "gated-gelu"}),
    ("starcoder2", {"use_bias": False}),
    ("olmo2", {"attention_bias": True, "tie_word_embeddings": True}),
    ("smollm3", {"attention_bias": True, "mlp_bias": True}),
    ("gemma2", {"attention_bias": True, "tie_word_embeddings": False}),
    ("qwen3_moe", {"attention_bias": True, "norm_topk_prob": True}),
    ("phi3", {"tie_word_embeddings": True}),
    ("gpt2", {"n_inner": None, "tie_word_embeddings": False}),
    ("bert", {"tie_word_embeddings": False}),
    ("roberta", {"tie_word_embeddings": False}),
)
variants = pytest.mark.parametrize(
    ("family", "overrides"), VARIANTS, ids=lambda v: v if isinstance(v, str) else ",".join(v)
)


def logits(model_or_dir: Any) -> Tensor:
    """(2, 12, vocab) float32 logits on fixed ids; a directory must open with every key in its place."""
    model = model_or_dir
    if isinstance(model_or_dir, Path):
        auto_class = AUTO_CLASSES[families()[read_config(model_or_dir)["model_type"]].task]
        model, info = auto_class.from_pretrained(model_or_dir, dtype="auto", output_loading_info=True)
        assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    ids = torch.randint(3, 384, (2, 12), generator=torch.Generator().manual_seed(1))
    decoder = {"decoder_input_ids": ids.flip(1)} if model.config.is_encoder_decoder else {}
    with torch.inference_mode():
        result: Tensor = model.eval()(ids, use_cache=False, **decoder).logits.float()
    return result


def saved(model: Any, path: Path) -> ModelShape:
    model.save_pretrained(path)
    return source_shape(path)


def assert_same(cut: Tensor, dense: Tensor) -> None:
    assert dense.std() > 0.01  # the comparison means something
    torch.testing.assert_close(cut, dense, rtol=1e-4, atol=4e-5 * dense.abs().max().item())


def shares_without(shape: ModelShape, lost: tuple[int, ...] = ()) -> dict[str, Tensor]:
    """Shares as they are measured when the hidden channels in `lost` never carry anything."""
    share = torch.ones(shape.hidden_size)
    share[list(lost)] = 0
    return dict.fromkeys(hidden_norms(shape), share)


def hidden_norms(shape: ModelShape) -> list[str]:
    patterns = shape.family.hidden_norms
    return [n for p in patterns for n in (shape.spelled_out(p).values() if "{layer}" in p else (p,))]


def rest(kept: tuple[int, ...], count: int) -> list[int]:
    return [i for i in range(count) if i not in kept]


def channels(heads: list[int]) -> list[int]:
    return [head * HEAD_DIM + i for head in heads for i in range(HEAD_DIM)]


def outputs(shape: ModelShape, what: str) -> dict[int, str]:
    """By layer: the modules that read heads, cross-attention's heads, or FFN channels."""
    of_decoder = getattr(shape.family.decoder, what, None)
    own = shape.spelled_out(getattr(shape.family, what)) if hasattr(shape.family, what) else {}
    return own | (shape.spelled_out(of_decoder) if of_decoder else {})


# --- what a description says ----------------------------------------------------------------------------------------


@variants
def test_a_description_has_every_tensor_of_the_real_architecture(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    model = tiny_model(family, **overrides)
    shape = saved(model, tmp_path)
    assert {name: entry.shape for name, entry in tensor_entries(tmp_path).items()} == shape.tensor_shapes()
    assert (
        shape.num_params
        == sum(p.numel() for p in model.parameters())
        == sum(map(math.prod, shape.tensor_shapes().values()))
    )
    assert shape.tied == (shape.config.get("tie_word_embeddings", shape.family.tied_by_default) is True)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_the_modules_that_a_description_names_exist(family: str) -> None:
    model, described = tiny_model(family), families()[family]
    shape = shape_of(model.config.to_dict(), "tiny")
    patterns = [*described.head_norms, described.attention_output, described.experts, described.router]
    patterns += [] if described.experts else [described.ffn_output]
    if described.decoder:
        patterns += [
            described.decoder.attention_output,
            described.decoder.cross_attention_output,
            described.decoder.ffn_output,
        ]
    for pattern in filter(None, patterns):
        for name in shape.spelled_out(pattern).values():
            model.get_submodule(name)
    for name in hidden_norms(shape):
        assert model.get_submodule(name).weight.shape == (HIDDEN,)
        assert hasattr(model.get_submodule(name), "bias") == (described.norm == "layer")
    assert described.final_norm is None or described.final_norm in described.hidden_norms
    assert type(model).__name__ == described.architecture
    stacks = [described.layers] + ([described.decoder.layers] if described.decoder else [])
    assert sum(len(model.get_submodule(stack)) for stack in stacks) == shape.total_layers == len(shape.layer_names())


@variants
def test_the_linear_modules_that_a_description_counts_are_the_layers_own(
    family: str, overrides: dict[str, Any]
) -> None:
    model = tiny_model(family, **overrides)
    shape = shape_of(json.loads(model.config.to_json_string(use_diff=False)), "tiny")
    stacks = [shape.family.layers] + ([shape.family.decoder.layers] if shape.family.decoder else [])
    linear = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if name.startswith(tuple(f"{stack}." for stack in stacks)) and isinstance(module, nn.Linear | Conv1D)
    )
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    assert shape.num_linear_params == linear + experts
    assert sum(map(math.prod, shape.linear_shapes().values())) == shape.num_linear_params


@pytest.mark.parametrize(
    ("family", "elements"), [("gpt2", 2 * 4 * 64), ("phi3", 2 * 4 * 32), ("bert", 0), ("t5", 2 * 3 * 64)]
)
def test_the_kv_cache_is_the_decoders(family: str, elements: int) -> None:
    assert shape_of(tiny_model(family).config.to_dict(), "tiny").kv_bytes_per_token() == 2 * elements


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
def test_a_checkpoint_is_opened_by_its_familys_own_class(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    assert type(load_model(tmp_path)).__name__ == families()[family].architecture


def test_an_unknown_family_is_refused_with_the_list_of_all_that_are_known() -> None:
    with pytest.raises(
        InputError, match=re.escape(f"'mamba' is not supported; supported: {', '.join(sorted(ALL_FAMILIES))}")
    ):
        shape_of({"model_type": "mamba"}, "model")


@pytest.mark.parametrize(
    ("family", "field", "value"),
    [
        ("qwen3_moe", "mlp_only_layers", [0]),
        ("qwen3_moe", "decoder_sparse_step", 2),
        ("gpt2", "scale_attn_by_inverse_layer_idx", True),
        ("gpt2", "add_cross_attention", True),
        ("bert", "is_decoder", True),
        ("roberta", "position_embedding_type", "relative_key"),
    ],
)
def test_a_variant_that_the_description_does_not_fit_is_refused(family: str, field: str, value: Any) -> None:
    config = tiny_model(family).config.to_dict() | {field: value}
    with pytest.raises(InputError, match=f"{field}: .*of {family} models only those with .* are supported"):
        shape_of(config, "model")


# --- cutting --------------------------------------------------------------------------------------------------------


@variants
def test_cutting_nothing_is_the_identity(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    shape = saved(tiny_model(family, dtype=torch.bfloat16, **overrides), tmp_path / "dense")
    layers = tuple(range(shape.total_layers))
    experts = tuple(range(shape.num_experts))
    everything = Cut(
        layers,
        hidden=tuple(range(HIDDEN)),
        ffn=dict.fromkeys(layers, tuple(range(shape.intermediate_size))) if shape.intermediate_size else None,
        heads=dict.fromkeys(layers, tuple(range(HEADS))),
        kv_groups=dict.fromkeys(layers, tuple(range(shape.num_key_value_heads))),
        cross_heads=dict.fromkeys(layers[shape.num_layers :], tuple(range(HEADS))) if shape.family.decoder else None,
        experts=dict.fromkeys(layers, experts) if experts else None,
        expert_ffn=dict.fromkeys(layers, dict.fromkeys(experts, tuple(range(32)))) if experts else None,
    )
    for name, cut in (("bare", Cut(layers)), ("spelled", everything)):
        cut_checkpoint(tmp_path / "dense", shape, cut, tmp_path / name)
        before, after = (
            load_file(tmp_path / "dense" / "model.safetensors"),
            load_file(tmp_path / name / "model.safetensors"),
        )
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) and before[key].dtype == after[key].dtype for key in before)
        assert torch.equal(logits(tmp_path / name), logits(tmp_path / "dense"))


def random_cut(shape: ModelShape, rng: random.Random, *, with_heads: bool) -> Cut:
    """Something of every axis but hidden goes, other numbers in every layer; heads alike in a stack where they must."""

    def some(count: int, size: int) -> tuple[int, ...]:
        return tuple(sorted(rng.sample(range(count), size)))

    stacks = [range(shape.num_layers)] + ([range(shape.num_layers, shape.total_layers)] if shape.family.decoder else [])
    layers = tuple(layer for stack in stacks for layer in sorted(rng.sample(stack, len(stack) - 1)))
    groups, group_size = shape.num_key_value_heads, shape.num_attention_heads // shape.num_key_value_heads
    kept_groups = {layer: some(groups, max(1, groups - 1)) for layer in layers}
    if shape.family.heads_alike_in_stack:
        kept_groups = {layer: kept_groups[next(k for k in layers if k in shape.stack_of(layer))] for layer in layers}
    each = {layer: some(group_size, 1) for layer in layers}
    heads = {layer: tuple(g * group_size + h for g in kept_groups[layer] for h in each[layer]) for layer in layers}
    experts = {layer: some(shape.num_experts, 3) for layer in layers} if shape.num_experts else None
    return Cut(
        layers,
        ffn={layer: some(shape.intermediate_size, 96) for layer in layers} if shape.intermediate_size else None,
        heads=heads if with_heads else None,
        kv_groups=kept_groups if with_heads else None,
        cross_heads={i: some(HEADS, len(heads[i])) for i in layers if i >= shape.num_layers}
        if shape.family.decoder
        else None,
        experts=experts,
        expert_ffn={i: {e: some(32, 20) for e in experts[i]} for i in layers} if experts else None,
    )


def zero_inputs(module: nn.Module, lost: list[int]) -> None:
    weight = module.get_parameter("weight")
    (weight if isinstance(module, Conv1D) else weight.T)[lost] = 0


def silence(model: Any, shape: ModelShape, cut: Cut) -> None:
    """Take from a model in memory what the cut takes: layers by leaving them out, channels by zeros that read them."""
    for layer in cut.layers:
        if cut.ffn is not None:
            zero_inputs(
                model.get_submodule(outputs(shape, "ffn_output")[layer]), rest(cut.ffn[layer], shape.intermediate_size)
            )
        if cut.heads is not None:
            zero_inputs(
                model.get_submodule(outputs(shape, "attention_output")[layer]), channels(rest(cut.heads[layer], HEADS))
            )
        if cut.cross_heads is not None and layer in cut.cross_heads:
            lost = channels(rest(cut.cross_heads[layer], HEADS))
            zero_inputs(model.get_submodule(outputs(shape, "cross_attention_output")[layer]), lost)
        if cut.experts is not None and cut.expert_ffn is not None:
            silence_experts(model.model.layers[layer].mlp, cut.experts[layer], cut.expert_ffn[layer])
    leave_out_layers(model, shape, cut.layers)


def silence_experts(block: Any, kept: tuple[int, ...], kept_channels: Mapping[int, tuple[int, ...]]) -> None:
    """The router never chooses the lost experts; lost channels of the others are not read."""
    for expert in kept:
        block.experts.down_proj[expert][:, rest(kept_channels[expert], 32)] = 0
    router = block.gate

    def route(hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        router_logits = hidden.reshape(-1, HIDDEN) @ router.weight.T
        router_logits[:, rest(kept, router.num_experts)] = -math.inf
        weights, chosen = router_logits.softmax(-1).topk(router.top_k)
        return router_logits, weights / weights.sum(-1, keepdim=True) if router.norm_topk_prob else weights, chosen

    router.forward = route


def leave_out_layers(model: Any, shape: ModelShape, kept: tuple[int, ...]) -> None:
    names = shape.layer_names()
    for stack in {shape.stack_of(layer) for layer in kept}:
        parent, _, leaf = names[stack[0]].rpartition(".")[0].rpartition(".")
        old = model.get_submodule(f"{parent}.{leaf}")
        setattr(model.get_submodule(parent), leaf, nn.ModuleList(old[i - stack[0]] for i in kept if i in stack))
        if shape.family.model_type == "t5":
            first = model.get_submodule(f"{parent}.{leaf}")[0].layer[0].SelfAttention
            first.relative_attention_bias = old[0].layer[0].SelfAttention.relative_attention_bias
            first.has_relative_attention_bias = True
    if hasattr(model.config, "layer_types") and model.config.layer_types:
        model.config.layer_types = [model.config.layer_types[layer] for layer in kept]


@variants
def test_a_cut_checkpoint_is_the_model_with_what_goes_silenced(
    family: str, overrides: dict[str, Any], tmp_path: Path
) -> None:
    """Layers, FFN channels, heads, KV groups, cross-attention's heads, experts and their channels, all at once."""
    if families()[family].head_norms:
        overrides = overrides | {"rms_norm_eps": 1e-12}
    model = tiny_model(family, **overrides)
    shape = shape_of(model.config.to_dict(), "tiny")
    cut = random_cut(shape, random.Random(family), with_heads=shape.family.head_dim_free)
    shares = {}
    with torch.no_grad():
        for pattern, axis in shape.family.head_norms.items():  # lost heads of query and key that carry nothing
            for layer, norm in shape.spelled_out(pattern).items():
                kept = (cut.heads if axis == "query" else cut.kv_groups or {}).get(layer, ())  # type: ignore[union-attr]
                lost = channels(rest(kept, shape.axis_size(axis) // HEAD_DIM))
                module = model.get_submodule(norm.replace("_norm", "_proj"))
                for parameter in module.parameters():
                    parameter[lost] = 0
                shares[norm] = torch.ones(shape.axis_size(axis)).index_fill(0, torch.tensor(lost, dtype=torch.int64), 0)
        shape = saved(model, tmp_path / "dense")
        silence(model, shape, cut)
        target = cut_checkpoint(tmp_path / "dense", shape, cut, tmp_path / "cut", norm_shares=shares)
    assert {n: e.shape for n, e in tensor_entries(tmp_path / "cut").items()} == target.tensor_shapes()
    assert_same(logits(tmp_path / "cut"), logits(model))
    check_reopened(tmp_path / "cut", target, cut)


def check_reopened(cut_dir: Path, target: ModelShape, cut: Cut) -> None:
    """config.json says what was written, and what is tied stays tied."""
    again = source_shape(cut_dir)
    assert dataclasses.replace(again, config={}) == dataclasses.replace(target, config={})
    model = load_model(cut_dir)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert (embedding.weight.data_ptr() == head.weight.data_ptr()) == target.tied
    for field in target.family.per_layer_lists:
        assert len(target.config[field]) == len(cut.layers)


def test_per_layer_fields_go_with_their_layers(tmp_path: Path) -> None:
    shape = saved(tiny_model("smollm3"), tmp_path / "dense")
    target = cut_checkpoint(tmp_path / "dense", shape, Cut((0, 1, 3)), tmp_path / "cut")
    assert (shape.config["no_rope_layers"], target.config["no_rope_layers"]) == ([1, 0, 1, 0], [1, 0, 0])
    config = read_config(tmp_path / "dense")
    del config["no_rope_layers"], config["layer_types"]
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    shape = source_shape(tmp_path / "dense")
    assert cut_shape(shape, Cut((0, 1, 3))).config["no_rope_layers"] == [1, 0, 0]


# --- hidden channels --------------------------------------------------------------------------------------------------


def empty_channels(model: Any, shape: ModelShape, lost: tuple[int, ...]) -> None:
    """Nothing is ever written to these hidden channels; with layer norms, the others have mean zero besides."""
    kept, layer_norms = rest(lost, HIDDEN), shape.family.norm == "layer"

    def empty(written: Tensor, dim: int = -1) -> None:
        columns = written.transpose(dim, -1)
        columns[..., list(lost)] = 0
        if layer_norms:
            columns[..., kept] -= columns[..., kept].mean(-1, keepdim=True)

    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.embedding_dim == HIDDEN:
            empty(module.weight)
    for what in ("attention_output", "cross_attention_output", *(() if shape.num_experts else ("ffn_output",))):
        for name in outputs(shape, what).values():
            writer = model.get_submodule(name)
            empty(writer.weight, -1 if isinstance(writer, Conv1D) else 0)
            if writer.bias is not None:
                empty(writer.bias)
    for name, parameter in model.named_parameters():
        if name.endswith("experts.down_proj"):
            empty(parameter, 1)
    if layer_norms:  # a lost channel is its norm's bias, which readers read
        for name in hidden_norms(shape):
            model.get_submodule(name).bias[list(lost)] = 0
    if shape.family.task == "masked_lm":
        empty_after_norms(model, shape, lost, empty)


def empty_after_norms(model: Any, shape: ModelShape, lost: tuple[int, ...], empty: Callable[..., None]) -> None:
    """Norms write the stream here. The head's own is after a GELU, which far above zero is the identity, so what is
    lost there is the mean of what stays: 20."""
    for name in hidden_norms(shape):
        norm = model.get_submodule(name)
        norm.weight.fill_(1.3)
        norm.weight[list(lost)] = 0
        empty(norm.bias)
    dense = next(m for n, m in model.named_modules() if n.endswith(("transform.dense", "lm_head.dense")))
    empty(dense.weight, 0)
    dense.bias.fill_(20.0)


@variants
def test_hidden_channels_that_carry_nothing_can_go(family: str, overrides: dict[str, Any], tmp_path: Path) -> None:
    """With the heads, where engines compute their size from hidden_size; llama's heads then do not divide it."""
    overrides = overrides | {NO_EPSILON.get(family, "rms_norm_eps"): 1e-12}
    model = tiny_model(family, **overrides)
    shape = shape_of(model.config.to_dict(), "tiny")
    lost = (
        tuple(range(3, HIDDEN, 4))
        if not shape.family.heads_divide_hidden or family == "llama"
        else tuple(range(0, 24, 2))
    )
    lost = lost[:-2] if family == "llama" else lost  # 50 channels for 4 heads
    layers = tuple(range(shape.total_layers))
    with_heads = not shape.family.config_names("head_dim")
    heads = None if not with_heads else {layer: tuple(rest((layer % HEADS,), HEADS)) for layer in layers}
    with torch.no_grad():
        empty_channels(model, shape, lost)
        for layer in layers if heads else ():
            zero_inputs(model.get_submodule(outputs(shape, "attention_output")[layer]), channels([layer % HEADS]))
    shape = saved(model, tmp_path / "dense")
    cut = Cut(layers, hidden=tuple(rest(lost, HIDDEN)), heads=heads, kv_groups=heads)
    means = dict.fromkeys(hidden_norms(shape), torch.zeros(HIDDEN)) if shape.family.norm == "layer" else None
    target = cut_checkpoint(
        tmp_path / "dense", shape, cut, tmp_path / "cut", norm_shares=shares_without(shape, lost), norm_means=means
    )
    assert target.hidden_size == HIDDEN - len(lost)
    assert target.family.model_type == ("mistral" if family == "llama" else family)
    assert_same(logits(tmp_path / "cut"), logits(tmp_path / "dense"))
    check_reopened(tmp_path / "cut", target, cut)


@pytest.mark.parametrize("rope_type", ["default", "llama3"])
def test_a_llama_written_as_a_mistral_computes_the_same_bit_for_bit(rope_type: str, tmp_path: Path) -> None:
    rope: dict[str, Any] = {"rope_type": rope_type, "rope_theta": 5e5}
    if rope_type == "llama3":
        rope |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8}
    model = tiny_model("llama", rope_parameters=rope)
    model.save_pretrained(tmp_path)
    opens_as = families()["llama"].opens_as
    assert opens_as is not None
    other = {"model_type": opens_as.family, "architectures": [families()[opens_as.family].architecture]}
    (tmp_path / "config.json").write_text(json.dumps(read_config(tmp_path) | other | opens_as.config))
    assert type(load_model(tmp_path)).__name__ == "MistralForCausalLM"
    assert torch.equal(logits(tmp_path), logits(model))


def test_a_layer_norm_keeps_its_output_on_the_kept_channels_when_tokens_differ_only_in_size(tmp_path: Path) -> None:
    """The formula by itself: scale * (x - mean) / std + bias on the kept channels, before and after."""
    model = tiny_model("starcoder2")
    shape = saved(model, tmp_path / "dense")
    x = torch.rand(5, 1) * torch.randn(HIDDEN, generator=torch.Generator().manual_seed(3)) + torch.randn(5, 1)
    z = nn.functional.layer_norm(x, (HIDDEN,), eps=0.0)
    kept = tuple(range(0, HIDDEN, 3))
    shares, means = dict.fromkeys(hidden_norms(shape), z[0] ** 2 / HIDDEN), dict.fromkeys(hidden_norms(shape), z[0])
    cut = Cut((0, 1, 2, 3), hidden=kept)
    cut_checkpoint(tmp_path / "dense", shape, cut, tmp_path / "cut", norm_shares=shares, norm_means=means)
    after = load_file(tmp_path / "cut" / "model.safetensors")
    for name in hidden_norms(shape):
        norm = model.get_submodule(name)
        before = z * norm.weight + norm.bias
        now = nn.functional.layer_norm(
            x[:, list(kept)], (len(kept),), after[f"{name}.weight"], after[f"{name}.bias"], 0.0
        )
        torch.testing.assert_close(now, before[:, list(kept)].detach(), rtol=1e-4, atol=1e-5)


def test_norms_over_all_heads_keep_their_output_when_tokens_differ_only_in_signs(tmp_path: Path) -> None:
    model = tiny_model("olmo2")
    shape = saved(model, tmp_path / "dense")
    x = torch.randn(5, HIDDEN).sign() * torch.rand(HIDDEN).add(0.1)  # every token has the same squares
    layers = (0, 1, 2, 3)
    cut = Cut(layers, heads=dict.fromkeys(layers, (0, 3)), kv_groups=dict.fromkeys(layers, (0, 1)))
    shares = {f"model.layers.{i}.self_attn.{n}_norm": x[0, :w] ** 2 for i in layers for n, w in (("q", 64), ("k", 32))}
    cut_checkpoint(tmp_path / "dense", shape, cut, tmp_path / "cut", norm_shares=shares)
    weight = load_file(tmp_path / "cut" / "model.safetensors")["model.layers.2.self_attn.q_norm.weight"]
    kept = channels([0, 3])
    before = model.model.layers[2].self_attn.q_norm.weight.detach() * x / x.square().mean(-1, keepdim=True).sqrt()
    after = weight * x[:, kept] / x[:, kept].square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(after, before[:, kept])


# --- checkpoints as they are found ----------------------------------------------------------------------------------


def renamed(path: Path, rename: Callable[[str], str], extra: dict[str, Tensor] | None = None) -> None:
    """Rewrite a checkpoint's file under other names, with more tensors."""
    weights = load_file(path / "model.safetensors")
    save_file(
        {rename(n): t for n, t in weights.items()} | (extra or {}),
        path / "model.safetensors",
        metadata={"format": "pt"},
    )


def test_gpt2_as_the_hub_has_it_is_cut_under_its_full_names(tmp_path: Path) -> None:
    tiny_model("gpt2").save_pretrained(tmp_path / "dense")
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 8, 8) for i in range(4)}
    renamed(tmp_path / "dense", lambda name: name.removeprefix("transformer."), masks)
    cut_checkpoint(tmp_path / "dense", source_shape(tmp_path / "dense"), Cut((0, 1, 2, 3)), tmp_path / "cut")
    assert all(name.startswith("transformer.") for name in tensor_entries(tmp_path / "cut"))
    assert torch.equal(logits(tmp_path / "cut"), logits(tiny_model("gpt2")))


def test_bert_as_the_hub_has_it_keeps_its_pooler_and_loses_its_old_names(tmp_path: Path) -> None:
    tiny_model("bert").save_pretrained(tmp_path / "dense")
    extra = {
        "bert.pooler.dense.weight": torch.randn(64, 64),
        "bert.pooler.dense.bias": torch.randn(64),
        "cls.seq_relationship.weight": torch.randn(2, 64),
        "cls.seq_relationship.bias": torch.randn(2),
        "bert.embeddings.position_ids": torch.arange(8)[None],
    }
    renamed(
        tmp_path / "dense",
        lambda n: n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
        extra,
    )
    shape = source_shape(tmp_path / "dense")
    kept = tuple(range(0, 64, 2))
    means = dict.fromkeys(hidden_norms(shape), torch.zeros(64))
    two_heads = dict.fromkeys((0, 2), (1, 2))
    cut = Cut((0, 2), hidden=kept, heads=two_heads)
    cut_checkpoint(
        tmp_path / "dense", shape, cut, tmp_path / "cut", norm_shares=shares_without(shape), norm_means=means
    )
    after = load_file(tmp_path / "cut" / "model.safetensors")
    assert not [name for name in after if "gamma" in name or "beta" in name or "position_ids" in name]
    assert torch.equal(after["bert.pooler.dense.weight"], extra["bert.pooler.dense.weight"][::2, ::2])
    assert torch.equal(after["cls.seq_relationship.weight"], extra["cls.seq_relationship.weight"][:, ::2])
    assert torch.isfinite(logits(load_model(tmp_path / "cut"))).all()
    facts = {fact.check: fact.ok for fact in check_checkpoint(tmp_path / "cut")}
    assert facts["no tensor is too many"]
    assert facts["the head is tied as config.json says"]


@pytest.mark.parametrize("says_tied", [True, False])
def test_flan_t5s_own_head_stays_though_transformers_calls_it_tied(says_tied: bool, tmp_path: Path) -> None:
    model: Any = tiny_model("t5", feed_forward_proj="gated-gelu", layer_norm_epsilon=1e-12)
    lost = tuple(range(3, HIDDEN, 4))
    with torch.no_grad():
        empty_channels(model, shape_of(model.config.to_dict(), "tiny"), lost)
        model.lm_head.weight = nn.Parameter(torch.randn(384, HIDDEN))
    model.save_pretrained(tmp_path / "dense")
    config = read_config(tmp_path / "dense") | {"scale_decoder_outputs": False}
    if not says_tied:
        del config["scale_decoder_outputs"]
        config["tie_word_embeddings"] = False
    (tmp_path / "dense" / "config.json").write_text(json.dumps(config))
    shape = source_shape(tmp_path / "dense")
    assert not shape.tied
    cut = Cut(tuple(range(5)), hidden=tuple(rest(lost, HIDDEN)))
    cut_checkpoint(tmp_path / "dense", shape, cut, tmp_path / "cut", norm_shares=shares_without(shape, lost))
    assert_same(logits(tmp_path / "cut"), logits(tmp_path / "dense"))


def test_experts_are_counted_under_both_names_that_configs_have(tmp_path: Path) -> None:
    shape = saved(tiny_model("qwen3_moe"), tmp_path / "dense")
    assert "num_local_experts" in shape.config
    config = read_config(tmp_path / "dense") | {"num_experts": 4}
    del config["num_local_experts"]
    for found in (shape.config, config, config | {"num_local_experts": 4}):
        cut = cut_shape(shape_of(found, "tiny"), Cut((0,), experts={0: (0, 1, 3)}))
        assert shape_of(cut.config, "cut").num_experts == cut.config["num_experts"] == 3


@pytest.mark.parametrize("family", ["phi3", "gpt2", "t5", "bert", "qwen3_moe", "olmo2"])
def test_tensors_that_a_description_does_not_have_are_refused(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    renamed(tmp_path, lambda name: name, {"model.layers.0.adapter.weight": torch.ones(8)})
    with pytest.raises(InputError, match=rf"1 tensors that a {family} .* model\.layers\.0\.adapter\.weight"):
        source_shape(tmp_path)


@pytest.mark.parametrize("family", ["phi3", "gpt2", "t5", "qwen3_moe"])
def test_a_missing_tensor_is_named(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    missing = sorted(weights)[5]
    weights.pop(missing)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=rf"lacks 1 tensors .*{re.escape(missing)}"):
        check_weights(tmp_path, shape_of(read_config(tmp_path), "tiny"))


@pytest.mark.parametrize("family", ["phi3", "gpt2", "t5", "bert", "qwen3_moe"])
def test_weights_that_are_not_finite_are_refused_by_name(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    name, parameter = next((n, p) for n, p in model.named_parameters() if p.ndim > 1 and ".0." in n)
    with torch.no_grad():
        parameter.view(-1)[7] = math.nan
    shape = saved(model, tmp_path / "dense")
    layers = tuple(range(shape.total_layers))
    with pytest.raises(InputError, match="holds NaN or infinite"):
        cut_checkpoint(tmp_path / "dense", shape, Cut(layers), tmp_path / "cut")
    assert not (tmp_path / "cut" / "config.json").exists(), name


# --- targets --------------------------------------------------------------------------------------------------------


def tiny_shape(family: str) -> ModelShape:
    return shape_of(tiny_model(family).config.to_dict(), "tiny")


def test_an_encoder_decoder_is_cut_by_stack_or_by_layers_counted_through() -> None:
    dense = tiny_shape("t5")
    by_number = target_shape(Prune(num_layers=1, num_decoder_layers=2), dense)
    by_index = target_shape(Prune(drop_layers=(0, 4)), dense)
    assert [(t.num_layers, t.num_decoder_layers) for t in (by_number, by_index)] == [(1, 2), (1, 2)]
    assert (by_index.config["num_layers"], by_index.config["num_decoder_layers"]) == (1, 2)


def test_heads_alone_are_enough_where_each_has_its_own_key_and_value() -> None:
    target = target_shape(Prune(num_attention_heads=3), tiny_shape("t5"))
    assert (target.num_attention_heads, target.num_key_value_heads, target.config["num_heads"]) == (3, 3, 3)
    assert "num_key_value_heads" not in target.config


def test_experts_and_their_width_are_sizes_like_others() -> None:
    target = target_shape(Prune(num_experts=3, moe_intermediate_size=16), tiny_shape("qwen3_moe"))
    assert (target.config["num_experts"], target.config["moe_intermediate_size"]) == (3, 16)


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("t5", {"drop_layers": (0, 1)}, "names all 2 layers of the encoder"),
        ("t5", {"drop_layers": (2, 3, 4)}, "names all 3 layers of the decoder"),
        ("t5", {"drop_layers": (5,)}, "names layer 5; the model has layers 0 to 4"),
        ("t5", {"num_decoder_layers": 4}, "num_decoder_layers 4 is above the model's 3"),
        ("t5", {"num_attention_heads": 3, "num_key_value_heads": 4}, "one key-value head for each query head"),
        ("llama", {"num_decoder_layers": 2}, "num_decoder_layers 2: llama models have nothing of that name"),
        ("qwen3", {"num_experts": 2}, "num_experts 2: qwen3 models have nothing of that name to cut"),
        ("qwen3_moe", {"intermediate_size": 64}, "nothing of that name to cut; they have .*moe_intermediate_size"),
        ("qwen3_moe", {"num_experts": 1}, "num_experts 1 is fewer than the 2 that each token is sent to; give 2 to 4"),
        ("qwen3_moe", {"moe_intermediate_size": 31}, "moe_intermediate_size 31 is odd"),
        ("gpt2", {"num_attention_heads": 3}, "64 with num_attention_heads 3: engines or transformers compute"),
        ("bert", {"num_attention_heads": 3}, "must stay 16; use hidden_size 48 with these heads"),
        ("gemma2", {"hidden_size": 50}, "opens gemma2 only where the heads divide hidden_size; use .*48 or 52"),
    ],
)  # fmt: skip
def test_a_size_that_a_family_cannot_have_says_what_it_can(family: str, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        target_shape(Prune(**fields), tiny_shape(family))


def test_a_phi_3_with_longrope_keeps_its_width_a_multiple_of_its_heads_since_transformers_counts_the_factors() -> None:
    rope: dict[str, Any] = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8}
    rope |= {"long_factor": [2.0] * 8, "partial_rotary_factor": 1.0, "original_max_position_embeddings": 64}
    config = tiny_model("phi3", rope_parameters=rope).config.to_dict()
    with pytest.raises(InputError, match="must stay 16; use hidden_size 64 with these heads"):
        target_shape(Prune(hidden_size=48), shape_of(config, "tiny"))
    with pytest.raises(StrictDataclassClassValidationError, match="short_factor field must have length 6"):
        tiny_model("phi3", rope_parameters=rope, hidden_size=48)
    assert target_shape(Prune(hidden_size=48), tiny_shape("phi3")).hidden_size == 48


# --- any shape, any cut ---------------------------------------------------------------------------------------------


@st.composite
def shapes_and_cuts(draw: st.DrawFn) -> tuple[ModelShape, Cut]:
    """A shape of any family and any homogeneous cut of it."""
    family = families()[draw(st.sampled_from(ALL_FAMILIES))]
    groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    per_group = 1 if family.one_key_value_head_a_head else per_group
    sizes = {
        "num_layers": draw(st.integers(1, 3)), "num_decoder_layers": draw(st.integers(1, 3)), "vocab_size": 11,
        "hidden_size": draw(st.integers(2, 12)), "intermediate_size": draw(st.integers(2, 12)),
        "num_attention_heads": groups * per_group, "num_key_value_heads": groups,
        "head_dim": draw(st.integers(1, 3)) * 2, "num_experts": draw(st.integers(2, 4)), "num_experts_per_token": 1,
        "moe_intermediate_size": draw(st.integers(2, 6)), "num_positions": 5, "num_token_types": 2, "num_buckets": 4,
    }  # fmt: skip
    if not family.config_names("head_dim"):
        sizes["hidden_size"] = sizes["num_attention_heads"] * sizes["head_dim"]
    config: dict[str, Any] = {name: value for size, value in sizes.items() for name in family.config_names(size)[:1]}  # type: ignore[arg-type]
    switches = ("tie_word_embeddings", "attention_bias", "mlp_bias", "use_bias")
    config |= {switch: draw(st.booleans()) for switch in switches} | {"model_type": family.model_type}
    config["feed_forward_proj"] = draw(st.sampled_from(["relu", "gated-gelu"]))
    config |= {field: [f"{field} {i}" for i in range(sizes["num_layers"])] for field in family.per_layer_lists}
    shape = shape_of(config, "drawn")

    def some(count: int, size: int | None = None) -> tuple[int, ...]:
        size = size or draw(st.integers(1, count))
        return tuple(sorted(draw(st.permutations(range(count)))[:size]))

    kept = some(shape.num_layers)
    if family.decoder:
        kept += tuple(shape.num_layers + layer for layer in some(shape.num_decoder_layers))
    widths = {name: draw(st.integers(1, count)) for name, count in sizes.items()}
    num_groups, num_each = draw(st.integers(1, groups)), draw(st.integers(1, per_group))
    kv = {layer: some(groups, num_groups) for layer in kept}
    if family.heads_alike_in_stack:
        kv = {layer: kv[next(first for first in kept if first in shape.stack_of(layer))] for layer in kept}
    heads = {i: tuple(g * per_group + h for g in kv[i] for h in some(per_group, num_each)) for i in kept}
    experts = {i: some(shape.num_experts, widths["num_experts"]) for i in kept} if shape.num_experts else None
    num_heads = num_groups * num_each
    ffn = {i: some(max(1, shape.intermediate_size), widths["intermediate_size"]) for i in kept}
    cut = Cut(
        kept,
        hidden=some(shape.hidden_size, None if family.config_names("head_dim") else num_heads * shape.head_dim),
        ffn=ffn if family.has_axis("ffn") else None,
        heads=heads,
        kv_groups=kv,
        cross_heads={i: some(groups, num_groups) for i in kept if i >= shape.num_layers} if family.decoder else None,
        experts=experts,
        expert_ffn=None if experts is None else {
            i: {e: some(shape.moe_intermediate_size, widths["moe_intermediate_size"]) for e in experts[i]} for i in kept
        },
    )  # fmt: skip
    return shape, cut


def stays(axis: str, index: int, layer: int | None, expert: int | None, shape: ModelShape, cut: Cut) -> bool:
    """Whether a number at this index along a plain axis stays."""
    if axis in ("hidden", "vocab", "positions", "token_types", "buckets", "head_dim") or axis.isdecimal():
        return axis != "hidden" or cut.hidden is None or index in cut.hidden
    assert layer is not None
    if axis == "expert_ffn":
        assert cut.expert_ffn is not None
        assert expert is not None
        return index in cut.expert_ffn[layer][expert]
    tables: dict[str, Any] = {
        "ffn": cut.ffn, "experts": cut.experts, "heads": cut.heads, "query": cut.heads, "key_value": cut.kv_groups,
        "cross_query": cut.cross_heads,
    }  # fmt: skip
    return (index if axis in ("ffn", "experts", "heads") else index // shape.head_dim) in tables[axis][layer]


def kept_indices(axis: str, layer: int | None, expert: int | None, shape: ModelShape, cut: Cut) -> list[int]:
    labels = [(part, i) for part in axis_parts(axis) for i in range(shape.axis_size(part))]
    return [at for at, (part, i) in enumerate(labels) if stays(part, i, layer, expert, shape, cut)]


def slowly_cut(weights: dict[str, Tensor], shape: ModelShape, cut: Cut) -> dict[str, Tensor]:
    """Every tensor that stays, under its new name, number by number."""
    stacks = {shape.family.layers: 0} | (
        {shape.family.decoder.layers: shape.num_layers} if shape.family.decoder else {}
    )
    cuts = {}
    for name, tensor in weights.items():
        layer = expert = None
        pattern = new = name
        for stack, first in stacks.items():
            if found := re.match(rf"{re.escape(stack)}\.(\d+)\.(.*)", name):
                layer = first + int(found[1])
                in_stack = [kept for kept in cut.layers if kept in shape.stack_of(first)]
                pattern = f"{stack}.{{layer}}.{found[2]}"
                if pattern in shape.family.first_layer_only:
                    layer = in_stack[0]
                elif layer not in in_stack:
                    pattern = ""
                    break
                new = f"{stack}.{in_stack.index(layer)}.{found[2]}"
        if not pattern:
            continue
        if layer is not None and cut.experts is not None and (found := re.search(r"experts\.(\d+)\.", name)):
            expert = int(found[1])
            if expert not in cut.experts[layer]:
                continue
            pattern = pattern.replace(found[0], "experts.{expert}.")
            new = new.replace(found[0], f"experts.{cut.experts[layer].index(expert)}.")
        for dim, axis in enumerate(shape.family.tensors[pattern]):
            tensor = tensor.index_select(dim, torch.tensor(kept_indices(axis, layer, expert, shape, cut)))
        cuts[new] = tensor
    return cuts


@settings(max_examples=100, deadline=None)
@given(drawn=shapes_and_cuts())
def test_any_cut_of_any_family_holds_exactly_the_kept_numbers(
    drawn: tuple[ModelShape, Cut], tmp_path_factory: Any
) -> None:
    """Against loops over every number; norms and embeddings, which may be rescaled, only by shape."""
    shape, cut = drawn
    folder = tmp_path_factory.mktemp("drawn")
    (folder / "config.json").write_text(json.dumps(shape.config))
    before = {name: torch.randn(size) for name, size in shape.tensor_shapes().items()}
    save_file(before, folder / "model.safetensors", metadata={"format": "pt"})
    shares = shares_without(shape)
    for pattern, axis in shape.family.head_norms.items():
        shares |= dict.fromkeys(shape.spelled_out(pattern).values(), torch.ones(shape.axis_size(axis)))
    means = dict.fromkeys(hidden_norms(shape), torch.zeros(shape.hidden_size))
    source = source_shape(folder)
    target = cut_checkpoint(folder, source, cut, folder / "cut", norm_shares=shares, norm_means=means)
    after, expected = load_file(folder / "cut" / "model.safetensors"), slowly_cut(before, shape, cut)
    assert {name: tuple(tensor.shape) for name, tensor in after.items()} == target.tensor_shapes()
    assert {name: tensor.shape for name, tensor in after.items()} == {name: t.shape for name, t in expected.items()}
    scaled = "embed_tokens" if shape.family.embedding_scaled_by_sqrt_hidden else "nothing"
    for name, tensor in after.items():
        if "norm" not in name.lower() and "ln_" not in name and scaled not in name:
            assert torch.equal(tensor, expected[name]), name
    reread = shape_of(target.config, "cut")
    assert dataclasses.replace(reread, config={}) == dataclasses.replace(target, config={})
    for field in shape.family.per_layer_lists:
        assert target.config[field] == [f"{field} {i}" for i in cut.layers]
