"""Every metric against a slow, obvious reference in float64, on tiny models of the families where it differs."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stillroom.errors import InputError
from stillroom.models.shape import ModelShape, shape_of
from stillroom.prune.importance import angular, forward
from stillroom.prune.importance.measure import gather, measure, measure_each, observers_for
from stillroom.prune.importance.methods import DEPTH_METHODS, WIDTH_METHODS, keep_layers
from stillroom.prune.importance.names import DepthMethod, Wanted, WidthMethod
from stillroom.prune.importance.observers import observed, results_of
from stillroom.prune.importance.points import points_of
from stillroom.prune.importance.scores import Importance, WidthScores
from tiny import ALL_FAMILIES, tiny_model

KINDS = ("llama", "gpt2", "gemma2", "bert", "t5")
"""A plain decoder, transposed matrices, four norms, a masked language model, two stacks."""
CHANNELS: frozenset[Wanted] = frozenset({"ffn", "heads", "hidden"})
EVERYTHING: frozenset[Wanted] = CHANNELS | {"layers"}
HEADS, HEAD_DIM, FFN, HIDDEN = 4, 16, 128, 64


def windows(num: int = 5, length: int = 12) -> Tensor:
    return torch.randint(3, 384, (num, length), generator=torch.Generator().manual_seed(7))


def shape_of_model(model: Any) -> ModelShape:
    return shape_of(model.config.to_dict(), "tiny")


def run(model: Any, ids_BT: Tensor) -> Any:
    if not model.config.is_encoder_decoder:
        return model(ids_BT)
    start = torch.full((len(ids_BT), 1), model.config.decoder_start_token_id)
    return model(input_ids=ids_BT, decoder_input_ids=torch.cat([start, ids_BT[:, :-1]], dim=1))


def seen(model: Any, ids: Tensor, module: str) -> tuple[Tensor, Tensor]:
    """Input and output of a module for each window by itself, (N, T, channels) in float64."""
    inputs, outputs = [], []

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        inputs.append((args[0] if args else kwargs["hidden_states"]).double())
        outputs.append((output[0] if isinstance(output, tuple) else output).double())

    handle = model.get_submodule(module).register_forward_hook(note, with_kwargs=True)
    with torch.inference_mode():
        for window in ids:
            run(model, window[None])
    handle.remove()
    return torch.cat(inputs), torch.cat(outputs)


def weight_of(model: Any, module: str) -> Tensor:
    """A module's weight in float64 as (out, in)."""
    weight: Tensor = model.get_submodule(module).weight.detach().double()
    return weight.T if "Conv1D" in type(model.get_submodule(module)).__name__ else weight


def close(got: Any, expected: Any, rtol: float = 1e-5) -> None:
    assert got.dtype == torch.float64
    torch.testing.assert_close(got, expected.detach().double(), rtol=rtol, atol=1e-7)


def grouped(channels: Tensor, num_groups: int) -> Tensor:
    size = len(channels) // num_groups
    return torch.stack([channels[g * size : (g + 1) * size].square().sum().sqrt() for g in range(num_groups)])


@pytest.mark.parametrize("family", KINDS)
@pytest.mark.parametrize("method", ["mean_abs", "l2"])
def test_activation_magnitudes_equal_a_slow_reference(family: str, method: WidthMethod) -> None:
    model, ids = tiny_model(family, num_hidden_layers=2), windows()
    shape, points = shape_of_model(model), points_of(shape_of_model(model))

    def magnitude(values: Tensor) -> Tensor:
        flat = values.reshape(-1, values.shape[-1])
        return flat.abs().mean(0) if method == "mean_abs" else flat.square().mean(0).sqrt()

    scores: Any = measure(model, shape, ids, batch_size=2, wanted=CHANNELS, width=method)
    close(scores.ffn, torch.stack([magnitude(seen(model, ids, module)[0]) for module in points.ffn]))
    heads = [magnitude(seen(model, ids, module)[0]) for module in points.heads]
    close(scores.heads, torch.stack([grouped(h, HEADS) for h in heads]))
    close(scores.kv_groups, torch.stack([grouped(h, shape.num_key_value_heads) for h in heads]))
    close(scores.hidden, torch.stack([magnitude(seen(model, ids, module)[1]) for module in points.norms]).sum(0))
    if family == "t5":
        cross = [magnitude(seen(model, ids, module)[0]) for module in points.cross_heads]
        close(scores.cross_heads, torch.stack([grouped(h, HEADS) for h in cross]))
        assert len(points.ffn) == len(points.heads) == shape.total_layers > len(points.cross_heads)
    else:
        assert scores.cross_heads is None


@pytest.mark.parametrize("family", KINDS)
def test_contributions_equal_a_slow_reference_and_a_short_last_batch_counts_no_more(family: str) -> None:
    model, ids = tiny_model(family, num_hidden_layers=2), windows()
    shape, points = shape_of_model(model), points_of(shape_of_model(model))
    scores: Any = measure(model, shape, ids, batch_size=2, wanted=CHANNELS, width="contribution")

    def of_groups(module: str, num_groups: int) -> Tensor:
        values, weight = seen(model, ids, module)[0], weight_of(model, module)
        size = weight.shape[1] // num_groups
        pieces = [slice(g * size, (g + 1) * size) for g in range(num_groups)]
        return torch.stack([(values[..., p] @ weight[:, p].T).norm(dim=-1).mean() for p in pieces])

    def of_channels(module: str) -> Tensor:
        return torch.mul(seen(model, ids, module)[0].abs().mean((0, 1)), weight_of(model, module).norm(dim=0))

    close(scores.ffn, torch.stack([of_channels(module) for module in points.ffn]))
    close(scores.heads, torch.stack([of_groups(module, HEADS) for module in points.heads]))
    close(scores.kv_groups, torch.stack([of_groups(module, shape.num_key_value_heads) for module in points.heads]))
    close(scores.hidden, measure(model, shape, ids, batch_size=5, wanted=CHANNELS, width="mean_abs").hidden)
    if family == "t5":
        close(scores.cross_heads, torch.stack([of_groups(module, HEADS) for module in points.cross_heads]))


def test_magnitudes_sum_the_weights_that_go_with_each_unit() -> None:
    model: Any = tiny_model("qwen2", num_hidden_layers=2)
    scores: Any = measure(
        model, shape_of_model(model), windows(), batch_size=5, wanted=EVERYTHING, width="magnitude", depth=["magnitude"]
    )
    ffn, heads, groups, layers = [], [], [], []
    hidden = model.model.embed_tokens.weight.abs().double().sum(0) + model.lm_head.weight.abs().double().sum(0)
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        q, k, v = (m.weight.abs().double() for m in (attention.q_proj, attention.k_proj, attention.v_proj))
        o = attention.o_proj.weight.abs().double()
        gate, up, down = (m.weight.abs().double() for m in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))
        ffn.append([gate[c].sum() + up[c].sum() + down[:, c].sum() for c in range(FFN)])
        head = [slice(h * HEAD_DIM, (h + 1) * HEAD_DIM) for h in range(HEADS)]
        heads.append([q[h].sum() + o[:, h].sum() for h in head])
        groups.append([heads[-1][2 * g] + heads[-1][2 * g + 1] + k[head[g]].sum() + v[head[g]].sum() for g in (0, 1)])
        layers.append(torch.stack([w.sum() for w in (q, k, v, o, gate, up, down)]).sum())
        hidden = hidden + sum(w.sum(0) for w in (q, k, v, gate, up)) + o.sum(1) + down.sum(1)
    close(scores.ffn, torch.stack([torch.stack(row) for row in ffn]))
    close(scores.heads, torch.stack([torch.stack(row) for row in heads]))
    close(scores.kv_groups, torch.stack([torch.stack(row) for row in groups]))
    close(scores.hidden, hidden)
    close(scores.layers["magnitude"], torch.stack(layers))


def test_magnitudes_take_fused_and_transposed_matrices_apart() -> None:
    gpt2: Any = tiny_model("gpt2", num_hidden_layers=1)
    scores: Any = measure(gpt2, shape_of_model(gpt2), windows(), batch_size=5, wanted=CHANNELS, width="magnitude")
    attention, mlp = gpt2.transformer.h[0].attn, gpt2.transformer.h[0].mlp
    fused, output = attention.c_attn.weight.abs().double(), attention.c_proj.weight.abs().double()
    head = slice(HEAD_DIM, 2 * HEAD_DIM)
    query = fused[:, :HIDDEN][:, head].sum() + output[head].sum()
    keys_and_values = sum(fused[:, start : start + HIDDEN][:, head].sum() for start in (HIDDEN, 2 * HIDDEN))
    close(scores.heads[0, 1], query)
    close(scores.kv_groups[0, 1], query + keys_and_values)
    phi3: Any = tiny_model("phi3", num_hidden_layers=1)
    scores = measure(phi3, shape_of_model(phi3), windows(), batch_size=5, wanted=CHANNELS, width="magnitude")
    mlp = phi3.model.layers[0].mlp
    both, down = mlp.gate_up_proj.weight.abs().double(), mlp.down_proj.weight.abs().double()
    close(scores.ffn, (both[:FFN].sum(1) + both[FFN:].sum(1) + down.sum(0))[None])


def gated_losses(
    model: Any, family: Any, ids: Tensor, module: str, gate: Callable[[Any, Any, float], Any], size: float
) -> Tensor:
    """The loss of each window with a gate at 1 + size, (N,)."""
    before = model.get_submodule(module).register_forward_pre_hook(
        lambda module, args, kwargs: gate(args, None, size), with_kwargs=True
    )
    after = model.get_submodule(module).register_forward_hook(lambda module, args, output: gate(args, output, size))
    losses = []
    with torch.inference_mode():
        for index, window in enumerate(ids):
            loss, num_tokens = forward.summed_loss(model, family, window, seed=index)
            losses.append(loss.double() / num_tokens)
    before.remove()
    after.remove()
    return torch.stack(losses)


def by_differences(model: Any, family: Any, ids: Tensor, module: str, gate: Callable[[Any, Any, float], Any]) -> Tensor:
    """The mean over windows of the squared central difference of the loss."""
    up, down = (gated_losses(model, family, ids, module, gate, size) for size in (1e-3, -1e-3))
    return ((up - down) / 2e-3).square().mean()


def on_input(channels: slice) -> Callable[[Any, Any, float], Any]:
    def gate(args: Any, output: Any, size: float) -> Any:
        if output is not None:
            return output
        values = args[0].clone()
        values[..., channels] *= 1 + size
        return (values, *args[1:]), {}

    return gate


def on_output(channels: slice) -> Callable[[Any, Any, float], Any]:
    def gate(args: Any, output: Any, size: float) -> Any:
        if output is None:
            return None
        values = output.clone()
        values[..., channels] *= 1 + size
        return values

    return gate


def on_addition(args: Any, output: Any, size: float) -> Any:
    if output is None:
        return None
    values = output[0] if isinstance(output, tuple) else output
    gated = values + size * (values - args[0])
    return (gated, *output[1:]) if isinstance(output, tuple) else gated


@pytest.mark.parametrize("family", KINDS)
def test_taylor_equals_the_squared_slope_of_the_loss_by_finite_differences(family: str) -> None:
    model, ids = tiny_model(family, num_hidden_layers=2, dtype=torch.float64), windows(2, 16)
    shape, points = shape_of_model(model), points_of(shape_of_model(model))
    scores: Any = measure(model, shape, ids, batch_size=2, wanted=EVERYTHING, width="taylor", depth=["taylor"])

    def slope(module: str, gate: Callable[[Any, Any, float], Any]) -> Tensor:
        return by_differences(model, shape.family, ids, module, gate)

    layer = len(points.layers) - 1
    close(scores.layers["taylor"][layer], slope(points.layers[layer], on_addition), rtol=2e-2)
    close(scores.ffn[layer, 3], slope(points.ffn[layer], on_input(slice(3, 4))), rtol=2e-2)
    close(scores.heads[layer, 2], slope(points.heads[layer], on_input(slice(32, 48))), rtol=2e-2)
    size = 64 // shape.num_key_value_heads
    close(scores.kv_groups[0, 1], slope(points.heads[0], on_input(slice(size, 2 * size))), rtol=2e-2)
    close(scores.hidden[5], sum((slope(n, on_output(slice(5, 6))) for n in points.norms), torch.zeros(())), rtol=2e-2)
    if scores.cross_heads is not None:
        close(scores.cross_heads[1, 0], slope(points.cross_heads[1], on_input(slice(0, 16))), rtol=2e-2)


def test_the_loss_is_the_models_own() -> None:
    (ids,) = windows(1)
    decoder: Any = tiny_model("llama")
    loss, num_tokens = forward.summed_loss(decoder, shape_of_model(decoder).family, ids, seed=0)
    torch.testing.assert_close(loss / num_tokens, decoder(ids[None], labels=ids[None]).loss)
    both: Any = tiny_model("t5")
    loss, num_tokens = forward.summed_loss(both, shape_of_model(both).family, ids, seed=0)
    torch.testing.assert_close(loss / num_tokens, both(input_ids=ids[None], labels=ids[None]).loss)
    masked: Any = tiny_model("bert")
    family = shape_of_model(masked).family
    first, again, other = (forward.summed_loss(masked, family, ids, seed=seed)[0] for seed in (0, 0, 1))
    assert first == again != other


def test_taylor_leaves_the_model_as_it_was() -> None:
    model = tiny_model()
    model.get_parameter("model.norm.weight").requires_grad_(False)
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    told: list[tuple[int, int]] = []
    measure(
        model, shape_of_model(model), windows(3), batch_size=2, wanted=EVERYTHING, width="taylor", depth=["taylor"],
        progress=lambda *p: told.append(p),
    )  # fmt: skip
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert told == [(2, 6), (3, 6), (4, 6), (5, 6), (6, 6)], "the norms' shares take a pass, the gradients another"


@pytest.mark.parametrize("family", ["llama", "bert", "t5"])
def test_angular_distances_equal_a_slow_reference(family: str) -> None:
    model, ids = tiny_model(family, num_hidden_layers=3), windows()
    scores = measure(model, shape_of_model(model), ids, batch_size=2, wanted=frozenset({"layers"}), depth=["angular"])
    stacks = points_of(shape_of_model(model)).stacks
    total = sum(map(len, stacks))
    expected = torch.ones(total + 1, total + 1, dtype=torch.float64).triu(1)
    first = 0
    for layers in stacks:
        states = [seen(model, ids, layers[0])[0], *(seen(model, ids, layer)[1] for layer in layers)]
        for i in range(len(layers)):
            for j in range(i + 1, len(layers) + 1):
                angles = []
                for before, after in zip(states[i][:, -1], states[j][:, -1], strict=True):
                    cosine = (before @ after / before.norm() / after.norm()).item()
                    angles.append(math.acos(max(-1.0, min(1.0, cosine))) / math.pi)
                expected[first + i, first + j] = sum(angles) / len(angles)
        first += len(layers)
    close(scores.angular, expected)


def test_experts_are_scored_by_what_they_give_to_the_tokens_routed_to_them() -> None:
    model: Any = tiny_model("qwen3_moe", num_hidden_layers=2)
    ids, shape = windows(), shape_of_model(model)
    found = measure_each(
        model, shape, ids, batch_size=2, wanted=frozenset({"experts", "expert_ffn"}),
        width=["minitron", "l2", "contribution", "magnitude"],
    )  # fmt: skip
    tables = {method: scores.tables() for method, scores in found.items()}
    for layer in range(2):
        block = model.model.layers[layer].mlp
        experts = block.experts
        tokens = seen(model, ids, f"model.layers.{layer}.mlp")[0].reshape(-1, HIDDEN)
        logits = tokens @ block.gate.weight.double().T
        gates, chosen = logits.softmax(-1).topk(model.config.num_experts_per_tok)
        if model.config.norm_topk_prob:
            gates = gates / gates.sum(-1, keepdim=True)
        for expert in range(shape.num_experts):
            gate_up, down = experts.gate_up_proj[expert].double(), experts.down_proj[expert].double()
            norms, inners = [], []
            for token, weights, choices in zip(tokens, gates, chosen, strict=True):
                for weight, choice in zip(weights, choices, strict=True):
                    if choice == expert:
                        gate, up = (gate_up @ token).chunk(2)
                        inners.append(torch.nn.functional.silu(gate) * up)
                        norms.append((weight * (down @ inners[-1])).norm())
            count = max(1, len(norms))
            mean_abs = sum((i.abs() for i in inners), torch.zeros(shape.moe_intermediate_size)).double() / count
            squares = sum((i.square() for i in inners), torch.zeros(shape.moe_intermediate_size)).double() / count
            routed = sum(norms, torch.zeros(())) / count
            magnitude = gate_up.abs().sum(1).reshape(2, -1).sum(0) + down.abs().sum(0)
            expected: dict[WidthMethod, tuple[Tensor, Tensor]] = {
                "minitron": (routed, mean_abs),
                "l2": (routed, squares.sqrt()),
                "contribution": (routed, mean_abs * down.norm(dim=0)),
                "magnitude": (magnitude.sum(), magnitude),
            }
            for method, (score, channels) in expected.items():
                close(tables[method]["experts"][layer, expert], score, rtol=1e-4)
                close(tables[method]["expert_ffn"][layer, expert], channels, rtol=1e-4)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_every_method_scores_every_unit_of_every_family(family: str) -> None:
    model = tiny_model(family)
    shape = shape_of_model(model)
    inside: frozenset[Wanted] = frozenset({"experts", "expert_ffn"} if shape.num_experts else {"ffn"})
    width = [method for method in get_args(WidthMethod) if not (shape.num_experts and method == "taylor")]
    found = measure_each(
        model, shape, windows(3), batch_size=2, wanted=inside | {"layers", "heads", "hidden"}, width=width,
        depth=get_args(DepthMethod),
    )  # fmt: skip
    layers, heads = shape.total_layers, (shape.total_layers, shape.num_attention_heads)
    sizes = {"heads": heads, "kv_groups": (layers, shape.num_key_value_heads), "hidden": (shape.hidden_size,)}
    if shape.num_experts:
        experts = (layers, shape.num_experts)
        sizes |= {"experts": experts, "expert_ffn": (*experts, shape.moe_intermediate_size)}
    else:
        sizes["ffn"] = (layers, shape.intermediate_size)
    if shape.num_decoder_layers:
        sizes["cross_heads"] = (shape.num_decoder_layers, shape.num_attention_heads)
    for scores in found.values():
        tables = scores.tables()
        assert {name: table.shape for name, table in tables.items()} == sizes
        assert all(table.isfinite().all() and table.min() < table.max() for table in tables.values())
    for method, table in found["minitron"].layers.items():
        assert table.shape == ((layers + 1, layers + 1) if method == "angular" else (layers,))
        assert table.isfinite().all()


def test_experts_that_no_token_reaches_score_zero() -> None:
    model: Any = tiny_model("qwen3_moe", num_hidden_layers=1)
    with torch.no_grad():
        model.model.layers[0].mlp.gate.weight.zero_()
        model.model.layers[0].mlp.gate.weight[:2] = model.model.layers[0].mlp.gate.weight.new_tensor(1e-9)
    scores: Any = measure(
        model, shape_of_model(model), windows(1, 2), batch_size=1, wanted=frozenset({"experts", "expert_ffn"})
    )
    assert (scores.experts > 0).sum() < scores.experts.shape[1]
    assert not scores.expert_ffn[scores.experts == 0].any()


def test_experts_in_bfloat16_are_scored_and_others_than_these_are_refused() -> None:
    model: Any = tiny_model("qwen3_moe", dtype=torch.bfloat16)
    shape, wanted = shape_of_model(model), frozenset[Wanted]({"experts", "expert_ffn"})
    exact: Any = measure(tiny_model("qwen3_moe"), shape, windows(8, 32), batch_size=4, wanted=wanted)
    rounded: Any = measure(model, shape, windows(8, 32), batch_size=4, wanted=wanted)
    torch.testing.assert_close(rounded.experts, exact.experts, rtol=0.2, atol=1e-3)
    model.model.layers[1].mlp.experts.register_forward_hook(lambda module, args, output: 1.2 * output)
    with pytest.raises(InputError, match="do not add up"):
        measure(model, shape, windows(), batch_size=2, wanted=wanted)


def test_taylor_refuses_experts() -> None:
    model = tiny_model("qwen3_moe")
    with pytest.raises(InputError, match="taylor cannot score experts"):
        measure(
            model, shape_of_model(model), windows(), batch_size=2, wanted=frozenset({"experts"}), width="taylor"
        )  # fmt: skip


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_one_pass_for_all_methods_equals_a_pass_for_each(family: str) -> None:
    model, ids = tiny_model(family, num_hidden_layers=2), windows()
    shape, depth = shape_of_model(model), get_args(DepthMethod)
    together = measure_each(
        model, shape, ids, batch_size=2, wanted=EVERYTHING, width=get_args(WidthMethod), depth=depth
    )  # fmt: skip
    for method, scores in together.items():
        alone: Any = measure(model, shape, ids, batch_size=2, wanted=CHANNELS, width=method)
        assert alone.layers == {}
        assert alone.tables().keys() == scores.tables().keys()
        assert all(torch.equal(table, scores.tables()[name]) for name, table in alone.tables().items())
        assert all(torch.equal(table, scores.norm_shares[name]) for name, table in alone.norm_shares.items())
    for depth_method in depth:
        only: Any = measure(model, shape, ids, batch_size=2, wanted=frozenset({"layers"}), depth=[depth_method])
        assert torch.equal(only.layers[depth_method], together["minitron"].layers[depth_method])
        assert only.tables() == only.norm_shares == {}


def test_whoever_runs_the_modules_can_have_them_observed() -> None:
    model, ids = tiny_model(), windows()
    shape, methods = shape_of_model(model), get_args(DepthMethod)[:2]
    observers = observers_for(shape, EVERYTHING, width=["contribution"], depth=methods)
    with (
        torch.inference_mode(),
        observed(model.model, {(a, b, c.removeprefix("model.")): o for (a, b, c), o in observers.items()}),
    ):
        for window in ids:
            model.model(window[None])
    by_parts = gather(
        shape, EVERYTHING, results_of(observers), "contribution", methods, num_windows=len(ids), num_tokens=ids.numel()
    )
    whole = measure(model, shape, ids, batch_size=5, wanted=EVERYTHING, width="contribution", depth=methods)
    for name, table in whole.tables().items():
        close(by_parts.tables()[name], table)
    close(by_parts.angular, whole.layers["angular"])


def test_random_scores_repeat_with_their_seed_and_need_no_pass() -> None:
    model: Any = tiny_model()
    shape = shape_of_model(model)

    def scores(seed: int, wanted: frozenset[Wanted]) -> Any:
        return measure(
            model, shape, windows(), batch_size=2, wanted=wanted, width="random", depth=["random"], seed=seed
        )  # fmt: skip

    first, again, other = scores(1, EVERYTHING), scores(1, frozenset({"ffn"})), scores(2, EVERYTHING)
    assert torch.equal(first.ffn, again.ffn)
    assert not torch.equal(first.ffn, other.ffn)
    assert not torch.equal(first.layers["random"], other.layers["random"])
    assert observers_for(shape, frozenset({"layers", "ffn"}), width=["random"], depth=["random"]) == {}


def test_reversed_is_the_reverse() -> None:
    model, ids = tiny_model(), windows()
    found = measure_each(
        model, shape_of_model(model), ids, batch_size=2, wanted=EVERYTHING, width=["minitron", "reversed"],
        depth=["block_influence", "reversed"],
    )  # fmt: skip
    assert all(torch.equal(table, -found["reversed"].tables()[n]) for n, table in found["minitron"].tables().items())
    scores = found["reversed"]
    best = scores.layers["block_influence"].argmax().item()
    assert best not in keep_layers(scores, "reversed", 3)
    assert best in keep_layers(scores, "block_influence", 1)


@given(data=st.data(), total=st.integers(2, 9))
def test_angular_keeps_all_but_the_closest_block(data: st.DataObject, total: int) -> None:
    table = torch.rand(total + 1, total + 1, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    first = data.draw(st.integers(0, total - 1))
    among = range(first, data.draw(st.integers(first + 1, total)))
    kept = keep_layers(
        Importance(num_windows=1, num_tokens=1, layers={"angular": table.double()}),
        "angular",
        num_kept := data.draw(st.integers(0, len(among))),
        among,
    )
    gone = [layer for layer in among if layer not in kept]
    assert len(kept) == num_kept
    assert gone == list(range(gone[0], gone[0] + len(gone))) if gone else kept == tuple(among)
    if gone:
        distances = [table[s, s + len(gone)] for s in among if s + len(gone) <= among.stop]
        assert table[gone[0], gone[0] + len(gone)] == min(distances)


def test_a_block_across_two_stacks_is_never_the_closest() -> None:
    results = {
        (angular.METRIC, side, name): torch.zeros(3, dtype=torch.float64)
        for side, name in [("input", "a0"), ("output", "a0"), ("output", "a1"),
                           ("input", "b0"), ("output", "b0"), ("output", "b1")]
    }  # fmt: skip
    table = angular.distances(results, (("a0", "a1"), ("b0", "b1")))
    assert table[1, 3] == table[0, 4] == 1
    assert table[0, 2] == table[2, 4] == 0
    assert angular.closest_block(table, 2, range(2, 4)) == range(2, 4)


def layer_normed(model: Any, norm: str, values: Tensor) -> Tensor:
    """The mean of each channel after a layer norm without its scale and bias."""
    normed = torch.nn.functional.layer_norm(values, values.shape[-1:], eps=model.get_submodule(norm).eps)
    return normed.mean((0, 1))


def test_shares_and_means_follow_what_the_norm_does() -> None:
    for family in ("gpt2", "olmo2"):
        model, ids = tiny_model(family, num_hidden_layers=1), windows()
        shape, points = shape_of_model(model), points_of(shape_of_model(model))
        scores = measure(model, shape, ids, batch_size=2, wanted=frozenset({"heads", "hidden"}))
        shares = scores.norm_shares
        assert shares.keys() == {*points.norms, *points.head_norms}
        for norm in shares:
            values = seen(model, ids, norm)[0]
            if family == "gpt2":
                values = values - values.mean(-1, keepdim=True)
            close(shares[norm], (values.square() / values.square().sum(-1, keepdim=True)).mean((0, 1)))
            if family == "gpt2":
                close(scores.norm_means[norm], layer_normed(model, norm, values))
    assert scores.norm_means == {}
    assert "model.layers.0.self_attn.q_norm" in shares


@pytest.mark.parametrize(
    ("method", "message"),
    [("contribution", "activations at model.layers.2.mlp.down_proj"), ("taylor", "the loss on the calibration text"),
     ("magnitude", "model.layers.2.mlp.gate_proj.weight holds NaN")],
)  # fmt: skip
def test_weights_that_are_not_finite_are_refused(method: WidthMethod, message: str) -> None:
    model: Any = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.gate_proj.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=message):
        measure(model, shape_of_model(model), windows(), batch_size=2, wanted=frozenset({"ffn"}), width=method)


def test_angular_names_the_first_layer_whose_states_are_not_finite() -> None:
    model: Any = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.gate_proj.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=r"activations at model\.layers\.2 are"):
        measure(
            model, shape_of_model(model), windows(), batch_size=2, wanted=frozenset({"layers"}), depth=["angular"]
        )  # fmt: skip


def test_every_name_has_a_method_and_names_need_no_torch() -> None:
    assert set(WIDTH_METHODS) == set(get_args(WidthMethod))
    assert set(DEPTH_METHODS) == set(get_args(DepthMethod))
    assert {"experts", "expert_ffn"} < set(get_args(Wanted))
    assert issubclass(Importance, WidthScores)
    code = (
        "import sys, stillroom.prune.importance.names, stillroom.prune.importance.points; print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"


def test_gradients_that_overflow_name_the_module() -> None:
    model: Any = tiny_model()

    def overflow(module: Any, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(lambda gradient: gradient * torch.inf)  # type: ignore[no-untyped-call]

    model.model.layers[1].register_forward_hook(overflow)
    with pytest.raises(InputError, match=r"gradients at model\.layers\.0\.mlp\.down_proj are NaN or infinite"):
        measure(model, shape_of_model(model), windows(), batch_size=2, wanted=frozenset({"ffn"}), width="taylor")


def test_states_that_wait_for_later_layers_are_one_vector_a_window() -> None:
    observers = angular.observers([["a", "b"]])
    states = torch.randn(3, 50, 8)
    observers[angular.METRIC, "output", "a"](torch.nn.Identity(), (states,), {}, states)
    (table,) = {observer.table for observer in observers.values()}  # type: ignore[attr-defined]
    ((waiting,),) = [queue for queue in table.waiting if queue]
    assert waiting.untyped_storage().nbytes() == 3 * 8 * 4
