"""Scores against slow, obvious references, and choices from scores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from stillroom.errors import InputError
from stillroom.models.shape import ModelShape, shape_of
from stillroom.prune.importance.measure import measure
from stillroom.prune.importance.methods import keep_layers
from stillroom.prune.importance.names import Wanted
from stillroom.prune.importance.scores import Importance
from stillroom.prune.width import keep_heads, strongest
from tiny import FAMILIES, tiny_model

EVERYTHING: frozenset[Wanted] = frozenset({"layers", "ffn", "heads", "hidden"})


def windows(num: int = 5, length: int = 12) -> Tensor:
    return torch.randint(3, 384, (num, length), generator=torch.Generator().manual_seed(7))


def shape_of_model(model: Any) -> ModelShape:
    return shape_of(model.config.to_dict(), "tiny")


def seen(model: Any, ids: Tensor, module: str) -> tuple[Tensor, Tensor]:
    """Input and output of a module for each window by itself, (N, T, channels) in float64."""
    inputs, outputs = [], []

    def note(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        inputs.append((args[0] if args else kwargs["hidden_states"]).double())
        outputs.append((output[0] if isinstance(output, tuple) else output).double())

    handle = model.get_submodule(module).register_forward_hook(note, with_kwargs=True)
    with torch.inference_mode():
        for window in ids:
            model(window[None])
    handle.remove()
    return torch.cat(inputs), torch.cat(outputs)


def minitron(activations: Tensor) -> Tensor:
    """Mean |activation| over the sequence, L2 over sequences."""
    totals = [0.0] * activations.shape[-1]
    for sequence in activations:
        for channel in range(len(totals)):
            totals[channel] += sequence[:, channel].abs().mean().item() ** 2
    return torch.tensor(totals, dtype=torch.float64).sqrt()


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_equal_a_slow_reference(family: str) -> None:
    model, ids = tiny_model(family, num_hidden_layers=2), windows()
    shape = shape_of_model(model)
    scores = measure(model, shape, ids, batch_size=2, wanted=EVERYTHING)
    assert scores.block_influence is not None
    assert scores.ffn is not None
    assert scores.heads is not None
    assert scores.kv_groups is not None
    assert scores.hidden is not None
    for layer in range(2):
        before, after = seen(model, ids, f"model.layers.{layer}")
        cosine = (before * after).sum(-1) / before.norm(dim=-1) / after.norm(dim=-1)
        torch.testing.assert_close(scores.block_influence[layer], (1 - cosine).mean(), rtol=1e-5, atol=1e-6)
        ffn, _ = seen(model, ids, f"model.layers.{layer}.mlp.down_proj")
        torch.testing.assert_close(scores.ffn[layer], minitron(ffn), rtol=1e-5, atol=1e-7)
        attention = minitron(seen(model, ids, f"model.layers.{layer}.self_attn.o_proj")[0])
        for head in range(4):
            expected = attention[head * 16 : head * 16 + 16].square().sum().sqrt()
            torch.testing.assert_close(scores.heads[layer, head], expected, rtol=1e-5, atol=1e-7)
        for group in range(2):
            expected = attention[group * 32 : group * 32 + 32].square().sum().sqrt()
            torch.testing.assert_close(scores.kv_groups[layer, group], expected, rtol=1e-5, atol=1e-7)
    norms = [p.format(layer=i) for p in shape.family.hidden_norms for i in range(2 if "{layer}" in p else 1)]
    total = torch.zeros(64, dtype=torch.float64)
    for norm in norms:
        before, after = seen(model, ids, norm)
        total += minitron(after)
        share = (before.square() / before.square().sum(-1, keepdim=True)).mean((0, 1))
        torch.testing.assert_close(scores.norm_shares[norm], share, rtol=1e-5, atol=1e-8)
    assert sorted(scores.norm_shares) == sorted(norms)
    torch.testing.assert_close(scores.hidden, total, rtol=1e-5, atol=1e-6)
    assert (scores.num_windows, scores.num_tokens) == (5, 60)


def test_scores_do_not_depend_on_the_batch_size() -> None:
    model, ids = tiny_model("qwen3"), windows()
    shape = shape_of_model(model)
    one, all_at_once = (measure(model, shape, ids, batch_size=b, wanted=EVERYTHING) for b in (1, 8))
    for table in ("block_influence", "ffn", "heads", "kv_groups", "hidden"):
        torch.testing.assert_close(getattr(one, table), getattr(all_at_once, table), rtol=1e-4, atol=1e-6)


def test_only_what_is_asked_for_is_measured_and_no_hook_stays() -> None:
    model = tiny_model()
    told: list[tuple[int, int]] = []
    scores = measure(
        model,
        shape_of_model(model),
        windows(),
        batch_size=2,
        wanted=frozenset({"layers"}),
        progress=lambda *p: told.append(p),
    )
    assert isinstance(scores, Importance)
    assert scores.ffn is scores.heads is scores.hidden is None
    assert told == [(2, 5), (4, 5), (5, 5)]
    assert not any(module._forward_hooks for module in model.modules())


def test_a_bfloat16_model_is_scored_in_full_precision() -> None:
    exact, rounded = tiny_model("llama"), tiny_model("llama", dtype=torch.bfloat16)
    shape, ids = shape_of_model(exact), windows(16, 64)
    reference = measure(exact, shape, ids, batch_size=4, wanted=EVERYTHING)
    scores = measure(rounded, shape, ids, batch_size=4, wanted=EVERYTHING)
    assert scores.ffn is not None
    assert scores.ffn.dtype == torch.float64
    for table in ("block_influence", "ffn", "heads", "hidden"):
        torch.testing.assert_close(getattr(scores, table), getattr(reference, table), rtol=0.02, atol=1e-3)


@pytest.mark.parametrize(("wanted", "module"), [("ffn", r"layers\.2\.mlp\.down_proj"), ("layers", r"layers\.2 ")])
def test_activations_that_are_not_finite_name_the_module(wanted: Wanted, module: str) -> None:
    model: Any = tiny_model()
    with torch.no_grad():
        model.model.layers[2].mlp.gate_proj.weight[0, 0] = torch.nan
    with pytest.raises(InputError, match=f"activations at model.{module}.*NaN or infinite"):
        measure(model, shape_of_model(model), windows(), batch_size=1, wanted=frozenset({wanted}))


def test_of_equal_scores_the_lower_index_stays() -> None:
    assert strongest([1.0, 2.0, 1.0, 1.0], 3) == (0, 1, 2)
    scores = torch.tensor([0.5, 0.1, 0.1, 0.9])
    measured = Importance(num_windows=1, num_tokens=1, layers={"block_influence": scores})
    assert keep_layers(measured, "block_influence", 3) == (0, 1, 3)


def test_heads_are_ranked_within_their_groups() -> None:
    scores = [9.0, 8.0, 7.0, 1.0, 3.0, 2.0]
    assert keep_heads(scores, (0, 1), num_kv_groups=2, heads_per_group=1) == (0, 4)
    assert keep_heads(scores, (1,), num_kv_groups=2, heads_per_group=2) == (4, 5)


@given(scores=st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=1), data=st.data())
def test_what_stays_is_at_least_as_strong_as_what_goes(scores: list[float], data: st.DataObject) -> None:
    kept = strongest(scores, data.draw(st.integers(1, len(scores))))
    assert list(kept) == sorted(set(kept))
    gone = [scores[i] for i in range(len(scores)) if i not in kept]
    assert min(scores[i] for i in kept) >= max(gone, default=0.0)
