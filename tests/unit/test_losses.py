"""The chunked distillation loss against a naive one on whole logits in float64, values and gradients."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from naive_losses import naive_loss
from stillroom.distill import losses
from stillroom.distill.losses import (
    PADDING,
    DistillationLoss,
    Head,
    LossSettings,
    Positions,
    count_positions,
    counted_positions,
    distillation_loss,
    head_of,
)
from stillroom.errors import InputError
from stillroom.recipe import Divergence
from tiny import tiny_model

KINDS: tuple[Divergence, ...] = get_args(Divergence)


def example(
    seed: int, batch: int, tokens: int, hidden: int, teacher_hidden: int, vocab: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    ids = torch.randint(0, vocab, (batch, tokens), generator=generator)
    return normal(batch, tokens, hidden), normal(vocab, hidden), normal(batch, tokens, teacher_hidden), normal(
        vocab, teacher_hidden
    ), ids  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    divergence=st.sampled_from(KINDS),
    teacher_share=st.sampled_from([0.1, 0.5, 0.9]),
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    tokens=st.integers(2, 9),
    hidden=st.integers(1, 7),
    teacher_hidden=st.integers(1, 7),
    vocab=st.integers(2, 11),
    chunk_tokens=st.integers(1, 30),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    ce_weight=st.sampled_from([0.0, 0.3, 1.0]),
    ce_scale=st.sampled_from([1.0, 0.2]),
    softcap=st.sampled_from([None, 2.0]),
    share_counted=st.sampled_from([None, 0.0, 0.4, 0.9]),
)
def test_loss_and_gradients_equal_the_naive_float64_ones(
    divergence: Divergence, teacher_share: float, seed: int, batch: int, tokens: int, hidden: int, teacher_hidden: int,
    vocab: int, chunk_tokens: int, temperature: float, ce_weight: float, ce_scale: float, softcap: float | None,
    share_counted: float | None,
) -> None:  # fmt: skip
    h, w, th, tw, ids = example(seed, batch, tokens, hidden, teacher_hidden, vocab)
    counted = None
    if share_counted is not None:
        counted = torch.rand(batch, tokens, generator=torch.Generator().manual_seed(seed)) < share_counted
    config = LossSettings(temperature, ce_weight, chunk_tokens, divergence, teacher_share, ce_scale)
    theirs = [h.clone().requires_grad_(), w.clone().requires_grad_()]
    mine = [h.clone().requires_grad_(), w.clone().requires_grad_()]

    everywhere = torch.ones(batch, tokens, dtype=torch.bool)
    total, divergence_value, ce = naive_loss(
        theirs[0],
        Head(theirs[1], softcap),
        th,
        Head(tw, softcap),
        ids,
        everywhere if counted is None else counted,
        config,
    )
    torch.autograd.backward(3.0 * total)
    actual = distillation_loss(
        mine[0], Head(mine[1], softcap), th, Head(tw, softcap), ids, config, count_positions(ids, counted),
        counted_BT=counted,
    )  # fmt: skip
    torch.autograd.backward(3.0 * actual.total)

    torch.testing.assert_close(actual.total, total, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(actual.divergence, divergence_value, rtol=1e-9, atol=1e-12)
    if ce_weight > 0:
        torch.testing.assert_close(actual.ce, ce, rtol=1e-9, atol=1e-12)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("divergence", KINDS)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_gradients_equal_finite_differences(divergence: Divergence, softcap: float | None) -> None:
    h, w, th, tw, ids = example(7, 2, 4, 3, 4, 6)
    counted = torch.tensor([[True, True, False, True], [False, True, True, True]])
    config = LossSettings(2.0, 0.3, 3, divergence, 0.3, 0.5)

    def total(hidden: Tensor, weight: Tensor) -> Tensor:
        return distillation_loss(
            hidden, Head(weight, softcap), th, Head(tw, softcap), ids, config, count_positions(ids, counted),
            counted_BT=counted,
        ).total  # fmt: skip

    assert torch.autograd.gradcheck(total, (h.requires_grad_(), w.requires_grad_()))


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_pieces_of_a_chunk_change_nothing(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    h, w, th, tw, ids = example(6, 2, 6, 4, 4, 9)
    results = []
    for elements in (1, 30, 10_000):
        monkeypatch.setattr(losses, "PIECE_ELEMENTS", elements)
        hidden = h.clone().requires_grad_()
        loss = distillation_loss(
            hidden, Head(w, softcap), th, Head(tw, softcap), ids, LossSettings(2.0, 0.3, 7), count_positions(ids)
        )
        torch.autograd.backward(loss.total)
        assert hidden.grad is not None
        results.append((loss.total.detach(), hidden.grad))
    for total, gradient in results[1:]:
        torch.testing.assert_close(total, results[0][0], rtol=1e-12, atol=0.0)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-12, atol=1e-15)


def micro_losses(num_passes: int) -> tuple[Tensor, Tensor, float]:
    """Gradients and loss of one step of 6 sequences in so many passes."""
    h, w, th, tw, ids = example(0, 6, 5, 4, 4, 9)
    counted = torch.ones_like(ids, dtype=torch.bool)
    counted[0, 2:] = False  # one pass has fewer tokens than the others
    h.requires_grad_()
    w.requires_grad_()
    config, total = LossSettings(2.0, 0.3, 4), 0.0
    positions = count_positions(ids, counted)
    for at in torch.arange(6).chunk(num_passes):
        loss = distillation_loss(h[at], Head(w), th[at], Head(tw), ids[at], config, positions, counted_BT=counted[at])
        torch.autograd.backward(loss.total)
        total += float(loss.total.detach())
    assert h.grad is not None
    assert w.grad is not None
    return h.grad, w.grad, total


@pytest.mark.parametrize("num_passes", [2, 3, 6])
def test_accumulating_over_passes_is_exact(num_passes: int) -> None:
    whole, parts = micro_losses(1), micro_losses(num_passes)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_bfloat16_inputs_are_summed_in_float32() -> None:
    h, w, th, tw, ids = example(1, 4, 64, 16, 16, 200)
    config = LossSettings(1.0, 0.0, 32)
    exact = naive_loss(h, Head(w), th, Head(tw), ids, torch.ones_like(ids, dtype=torch.bool), config)[0]
    low = [x.bfloat16() for x in (h, w, th, tw)]
    loss = distillation_loss(low[0], Head(low[1]), low[2], Head(low[3]), ids, config, count_positions(ids))
    assert loss.total.dtype == torch.float32
    assert float(loss.total.detach()) == pytest.approx(float(exact), rel=0.01)


def test_equal_models_have_no_loss_and_no_gradient() -> None:
    h, w, _, _, ids = example(2, 2, 6, 4, 4, 9)
    h.requires_grad_()
    loss = distillation_loss(h, Head(w), h, Head(w), ids, LossSettings(1.0, 0.0, 5), count_positions(ids))
    torch.autograd.backward(loss.total)
    assert h.grad is not None
    assert float(loss.total.detach()) == pytest.approx(0.0, abs=1e-12)
    assert float(h.grad.abs().max()) < 1e-12


def test_a_gradient_is_computed_only_where_one_is_wanted() -> None:
    h, w, th, tw, ids = example(3, 2, 6, 4, 4, 9)
    w.requires_grad_()
    loss = distillation_loss(h, Head(w), th, Head(tw), ids, LossSettings(1.0, 0.0, 5), count_positions(ids))
    torch.autograd.backward(loss.total)
    assert h.grad is None
    assert w.grad is not None


class LargestTensor(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records how many elements the largest tensor has that any operation makes, backward included."""

    num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else (out,):
            if isinstance(tensor, Tensor):
                self.num_elements = max(self.num_elements, tensor.numel())
        return out


@pytest.mark.parametrize("divergence", KINDS)
def test_no_tensor_of_all_positions_by_vocabulary_ever_exists(divergence: Divergence) -> None:
    h, w, th, tw, ids = example(4, 4, 64, 8, 8, 500)
    h.requires_grad_()
    w.requires_grad_()
    with LargestTensor() as largest:  # type: ignore[no-untyped-call]
        config = LossSettings(1.0, 0.5, 16, divergence, 0.5)
        loss = distillation_loss(h, Head(w), th, Head(tw), ids, config, count_positions(ids))
        torch.autograd.backward(loss.total)
    assert largest.num_elements == 16 * 500


def test_the_last_position_has_no_cross_entropy() -> None:
    ids = torch.zeros(2, 4, dtype=torch.int64)
    assert count_positions(ids) == Positions(divergence=8, ce=6)
    counted = torch.tensor([[False, True, True, True], [False, False, True, False]])
    assert count_positions(ids, counted) == Positions(divergence=4, ce=3)


def test_a_prediction_across_a_border_does_not_count_nor_does_padding() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1], [7, 7, PADDING, PADDING, PADDING]])
    expected = [[True, True, False, True, True], [True, False, False, False, False]]
    assert counted_positions(documents).tolist() == expected


def test_of_a_conversation_the_predictions_of_answers_count() -> None:
    documents = torch.tensor([[0, 0, 0, 0, 0, 1, 1]])
    answers = torch.tensor([[False, False, True, True, False, False, True]])
    assert counted_positions(documents, answers).tolist() == [[False, True, True, False, False, True, False]]


def test_what_does_not_count_is_not_even_looked_at() -> None:
    h, w, th, tw, ids = example(8, 2, 6, 4, 4, 9)
    counted = torch.rand(2, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    positions, config = count_positions(ids, counted), LossSettings(1.0, 0.5, 4)
    totals = []
    for filled in (0.0, float("nan")):
        hidden = h.masked_fill(~counted.unsqueeze(-1), filled).requires_grad_()
        loss = distillation_loss(hidden, Head(w), th, Head(tw), ids, config, positions, counted_BT=counted)
        torch.autograd.backward(loss.total)
        totals.append(loss.total.detach())
        assert hidden.grad is not None
        assert float(hidden.grad[~counted].abs().max()) == 0
    assert torch.equal(totals[0], totals[1])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_the_head_gives_the_models_own_logits(family: str) -> None:
    overrides: dict[str, Any] = {"final_logit_softcapping": 5.0} if family == "gemma3_text" else {}
    model = tiny_model(family, **overrides)
    ids = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        hidden = model.base_model(ids).last_hidden_state
        logits = head_of(model).logits(hidden.flatten(0, 1))
        torch.testing.assert_close(logits, model(ids).logits.flatten(0, 1), rtol=1e-5, atol=1e-5)


def test_a_head_with_more_than_a_product_is_refused() -> None:
    model = tiny_model("llama")
    model.config.logit_scale = 0.5
    with pytest.raises(InputError, match="logit_scale is not known here"):
        head_of(model)


def test_the_loss_has_its_parts() -> None:
    h, w, th, tw, ids = example(5, 2, 6, 4, 4, 9)
    loss = distillation_loss(h, Head(w), th, Head(tw), ids, LossSettings(2.0, 0.25, 100), count_positions(ids))
    assert isinstance(loss, DistillationLoss)
    assert float(loss.total.detach()) == pytest.approx(0.75 * 4 * float(loss.divergence) + 0.25 * float(loss.ce))
