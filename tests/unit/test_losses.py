"""The chunked distillation loss against a naive one on whole logits in float64, values and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from stillroom.distill import losses
from stillroom.distill.losses import (
    IGNORE,
    DistillationLoss,
    Head,
    LossSettings,
    Positions,
    count_positions,
    distillation_loss,
    head_of,
)
from stillroom.errors import InputError
from tiny import tiny_model


def naive(
    student: Tensor, head: Head, teacher: Tensor, teacher_head: Head, labels: Tensor, config: LossSettings
) -> tuple[Tensor, Tensor, Tensor]:
    """Whole logits, the formulas as they are written, torch's autograd."""

    def logits(hidden: Tensor, head: Head) -> Tensor:
        raw = hidden @ head.weight.T
        return raw if head.softcap is None else head.softcap * torch.tanh(raw / head.softcap)

    z, t = logits(student, head), logits(teacher, teacher_head)
    tau = config.temperature
    p, log_p = (t / tau).softmax(-1), (t / tau).log_softmax(-1)
    kl = (p * (log_p - (z / tau).log_softmax(-1))).sum(-1)[labels != IGNORE].mean()
    before_padding = labels[:, 1:].masked_fill(labels[:, :-1] == IGNORE, IGNORE)
    ce = functional.cross_entropy(z[:, :-1].flatten(0, 1), before_padding.flatten(), ignore_index=IGNORE)
    return (1 - config.ce_weight) * tau**2 * kl + config.ce_weight * ce, kl, ce


def example(
    seed: int, batch: int, tokens: int, hidden: int, teacher_hidden: int, vocab: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(0, vocab, (batch, tokens), generator=generator)
    return normal(batch, tokens, hidden), normal(vocab, hidden), normal(batch, tokens, teacher_hidden), normal(
        vocab, teacher_hidden
    ), labels  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    batch=st.integers(1, 3),
    tokens=st.integers(2, 9),
    hidden=st.integers(1, 7),
    teacher_hidden=st.integers(1, 7),
    vocab=st.integers(2, 11),
    chunk_tokens=st.integers(1, 30),
    temperature=st.sampled_from([0.5, 1.0, 2.0, 4.0]),
    ce_weight=st.sampled_from([0.0, 0.3, 1.0]),
    softcap=st.sampled_from([None, 2.0]),
    padding=st.integers(0, 3),
)
def test_loss_and_gradients_equal_the_naive_float64_ones(
    seed: int, batch: int, tokens: int, hidden: int, teacher_hidden: int, vocab: int, chunk_tokens: int,
    temperature: float, ce_weight: float, softcap: float | None, padding: int,
) -> None:  # fmt: skip
    h, w, th, tw, labels = example(seed, batch, tokens, hidden, teacher_hidden, vocab)
    labels[0, tokens - min(padding, tokens - 2) :] = IGNORE
    config = LossSettings(temperature, ce_weight, chunk_tokens)
    expected_inputs = [h.clone().requires_grad_(), w.clone().requires_grad_()]
    inputs = [h.clone().requires_grad_(), w.clone().requires_grad_()]

    expected, kl, ce = naive(
        expected_inputs[0], Head(expected_inputs[1], softcap), th, Head(tw, softcap), labels, config
    )
    torch.autograd.backward(3.0 * expected)
    actual = distillation_loss(
        inputs[0], Head(inputs[1], softcap), th, Head(tw, softcap), labels, config, count_positions(labels)
    )
    torch.autograd.backward(3.0 * actual.total)

    torch.testing.assert_close(actual.total, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(actual.kl, kl, rtol=1e-10, atol=1e-12, check_dtype=False)
    if ce_weight > 0:
        torch.testing.assert_close(actual.ce, ce, rtol=1e-10, atol=1e-12)
    for mine, theirs in zip(inputs, expected_inputs, strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("softcap", [None, 3.0])
def test_the_pieces_of_a_chunk_change_nothing(softcap: float | None, monkeypatch: pytest.MonkeyPatch) -> None:
    h, w, th, tw, labels = example(6, 2, 6, 4, 4, 9)
    results = []
    for elements in (1, 30, 10_000):
        monkeypatch.setattr(losses, "PIECE_ELEMENTS", elements)
        hidden = h.clone().requires_grad_()
        loss = distillation_loss(
            hidden, Head(w, softcap), th, Head(tw, softcap), labels, LossSettings(2.0, 0.3, 7), count_positions(labels)
        )
        torch.autograd.backward(loss.total)
        assert hidden.grad is not None
        results.append((loss.total.detach(), hidden.grad))
    for total, gradient in results[1:]:
        torch.testing.assert_close(total, results[0][0], rtol=1e-12, atol=0.0)
        torch.testing.assert_close(gradient, results[0][1], rtol=1e-12, atol=1e-15)


def micro_losses(num_passes: int) -> tuple[Tensor, Tensor, float]:
    """Gradients and loss of one step of 6 sequences in so many passes."""
    h, w, th, tw, labels = example(0, 6, 5, 4, 4, 9)
    labels[0, 2:] = IGNORE  # one pass has fewer tokens than the others
    h.requires_grad_()
    w.requires_grad_()
    config, total = LossSettings(2.0, 0.3, 4), 0.0
    for some in torch.arange(6).chunk(num_passes):
        loss = distillation_loss(h[some], Head(w), th[some], Head(tw), labels[some], config, count_positions(labels))
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
    h, w, th, tw, labels = example(1, 4, 64, 16, 16, 200)
    config = LossSettings(1.0, 0.0, 32)
    exact = naive(h, Head(w), th, Head(tw), labels, config)[0]
    low = [x.bfloat16() for x in (h, w, th, tw)]
    loss = distillation_loss(low[0], Head(low[1]), low[2], Head(low[3]), labels, config, count_positions(labels))
    assert loss.total.dtype == torch.float32
    assert float(loss.total.detach()) == pytest.approx(float(exact), rel=0.01)


def test_equal_models_have_no_loss_and_no_gradient() -> None:
    h, w, _, _, labels = example(2, 2, 6, 4, 4, 9)
    h.requires_grad_()
    loss = distillation_loss(h, Head(w), h, Head(w), labels, LossSettings(1.0, 0.0, 5), count_positions(labels))
    torch.autograd.backward(loss.total)
    assert h.grad is not None
    assert float(loss.total.detach()) == pytest.approx(0.0, abs=1e-12)
    assert float(h.grad.abs().max()) < 1e-12


def test_a_gradient_is_computed_only_where_one_is_wanted() -> None:
    h, w, th, tw, labels = example(3, 2, 6, 4, 4, 9)
    w.requires_grad_()
    loss = distillation_loss(h, Head(w), th, Head(tw), labels, LossSettings(1.0, 0.0, 5), count_positions(labels))
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


def test_no_tensor_of_all_positions_by_vocabulary_ever_exists() -> None:
    h, w, th, tw, labels = example(4, 4, 64, 8, 8, 500)
    h.requires_grad_()
    w.requires_grad_()
    with LargestTensor() as largest:  # type: ignore[no-untyped-call]
        loss = distillation_loss(h, Head(w), th, Head(tw), labels, LossSettings(1.0, 0.5, 16), count_positions(labels))
        torch.autograd.backward(loss.total)
    assert largest.num_elements == 16 * 500


def test_positions_count_padding_and_the_last_token_out() -> None:
    labels = torch.tensor([[5, 6, 7, IGNORE], [1, 2, 3, 4]])
    assert count_positions(labels) == Positions(kl=7, ce=5)


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
    h, w, th, tw, labels = example(5, 2, 6, 4, 4, 9)
    loss = distillation_loss(h, Head(w), th, Head(tw), labels, LossSettings(2.0, 0.25, 100), count_positions(labels))
    assert isinstance(loss, DistillationLoss)
    assert float(loss.total.detach()) == pytest.approx(0.75 * 4 * float(loss.kl) + 0.25 * float(loss.ce))
