"""Each divergence and its gradient against the formula as it is written, and against the others where they meet."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from naive_losses import naive_divergence
from stillroom.distill.divergences import divergence_and_gradient
from stillroom.recipe import Divergence

KINDS: tuple[Divergence, ...] = get_args(Divergence)


def logits(seed: int, num: int = 4, vocab: int = 9, scale: float = 2.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (scale * torch.randn(num, vocab, generator=generator, dtype=torch.float64) for _ in range(2))
    return student, teacher


def of(kind: Divergence, student: Tensor, teacher: Tensor, share: float = 0.5) -> tuple[Tensor, Tensor]:
    return divergence_and_gradient(kind, share, student.clone(), teacher.clone())


@settings(max_examples=100, deadline=None)
@given(
    kind=st.sampled_from(KINDS),
    seed=st.integers(0, 2**31),
    num=st.integers(1, 4),
    vocab=st.integers(1, 12),
    scale=st.floats(0.0, 6.0),
    share=st.floats(0.01, 0.99),
)
def test_value_and_gradient_equal_the_formula_and_autograd(
    kind: Divergence, seed: int, num: int, vocab: int, scale: float, share: float
) -> None:
    student, teacher = logits(seed, num, vocab, scale)
    leaf = student.clone().requires_grad_()
    expected = naive_divergence(kind, share, leaf.softmax(-1), teacher.softmax(-1))
    torch.autograd.backward(expected.sum())
    value, gradient = of(kind, student, teacher, share)
    torch.testing.assert_close(value, expected.detach(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(gradient, leaf.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", KINDS)
@given(seed=st.integers(0, 2**31), share=st.floats(0.01, 0.99))
@settings(max_examples=30, deadline=None)
def test_none_is_negative_and_none_moves_the_sum_of_logits(kind: Divergence, seed: int, share: float) -> None:
    value, gradient = of(kind, *logits(seed), share)
    assert float(value.min()) >= 0
    torch.testing.assert_close(gradient.sum(dim=-1), torch.zeros(4, dtype=torch.float64), rtol=0.0, atol=1e-12)


def test_one_kl_is_the_other_with_the_models_exchanged() -> None:
    student, teacher = logits(0)
    forward, reverse = of("forward_kl", student, teacher)[0], of("reverse_kl", teacher, student)[0]
    torch.testing.assert_close(forward, reverse, rtol=1e-12, atol=0.0)


def test_js_is_symmetric_at_one_half_and_at_most_log_2() -> None:
    student, teacher = logits(1, scale=20.0)
    value = of("js", student, teacher)[0]
    torch.testing.assert_close(value, of("js", teacher, student)[0], rtol=1e-12, atol=0.0)
    assert 0.6 < float(value.max()) <= math.log(2)


@pytest.mark.parametrize(
    ("kind", "share", "factor", "limit"),
    [
        ("skewed_kl", 1e-8, 1.0, "forward_kl"),
        ("js", 1e-8, 1e8, "forward_kl"),
        ("js", 1 - 1e-8, 1e8, "reverse_kl"),
    ],
)
def test_mixtures_become_kl_where_one_model_has_all_of_them(
    kind: Divergence, share: float, factor: float, limit: Divergence
) -> None:
    for mine, kl in zip(of(kind, *logits(2), share), of(limit, *logits(2)), strict=True):
        torch.testing.assert_close(factor * mine, kl, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "share", "constant"),
    [
        ("forward_kl", 0.5, 1.0),
        ("reverse_kl", 0.5, 1.0),
        ("skewed_kl", 0.1, 0.81),
        ("js", 0.5, 0.25),
        ("js", 0.2, 0.16),
    ],
)
def test_where_the_models_are_close_all_are_one_form(kind: Divergence, share: float, constant: float) -> None:
    student, noise = logits(3)
    teacher = student + 1e-4 * noise
    for mine, kl in zip(of(kind, student, teacher, share), of("forward_kl", student, teacher), strict=True):
        torch.testing.assert_close(mine, constant * kl, rtol=1e-3, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [0.1, 0.5])
def test_probabilities_that_underflow_do_no_harm(kind: Divergence, share: float) -> None:
    student = torch.tensor([[300.0, -300.0, 0.0], [0.0, 0.0, 0.0]])
    teacher = torch.tensor([[-300.0, 300.0, 0.0], [500.0, -500.0, 0.0]])
    value, gradient = of(kind, student, teacher, share)
    assert bool(torch.isfinite(value).all())
    assert bool(torch.isfinite(gradient).all())
