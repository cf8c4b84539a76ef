"""The loss toward a few known tokens against a naive one in float64, and what is known against the whole teacher."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stillroom.distill.losses import Head, LossSettings, count_positions, distillation_loss, loss_toward
from stillroom.distill.sparse_losses import SparseTeaching, cross_entropy_and_gradient
from stillroom.distill.teacher_cache import Pairs, as_teaching, drawn_pairs, top_pairs
from stillroom.recipe import SampledTeacher, TopKTeacher


def normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def naive(
    hidden_BTD: Tensor, head: Head, teaching: SparseTeaching, ids_BT: Tensor, counted_BT: Tensor, of: LossSettings
) -> Tensor:
    """The whole loss from whole logits, for torch's autograd."""
    z = hidden_BTD @ head.weight.T
    z = z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)
    log_q = (z / of.temperature).log_softmax(-1)[counted_BT].gather(1, teaching.ids_NK)
    divergence = -(teaching.weights_NK * log_q).sum(-1) - teaching.entropy_N
    if teaching.outside_N is not None:
        divergence = divergence - teaching.outside_N * (1 - log_q.exp().sum(-1)).log()
    log_next = z[:, :-1].log_softmax(-1).gather(-1, ids_BT[:, 1:, None])[..., 0]
    counted = counted_BT[:, :-1]
    ce = -(log_next * counted).sum() / max(int(counted.sum()), 1)
    mean = divergence.sum() / max(len(divergence), 1)
    return (1 - of.ce_weight) * of.temperature**2 * mean + of.ce_weight * of.ce_scale * ce


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    tokens=st.integers(2, 9),
    vocab=st.integers(3, 11),
    known=st.integers(1, 10),
    has_outside=st.booleans(),
    chunk_tokens=st.integers(1, 20),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    ce_weight=st.sampled_from([0.0, 0.3, 1.0]),
    softcap=st.sampled_from([None, 2.0]),
    share_counted=st.sampled_from([0.0, 0.5, 1.0]),
)
def test_loss_and_gradients_equal_the_naive_float64_ones(
    seed: int, tokens: int, vocab: int, known: int, has_outside: bool, chunk_tokens: int, temperature: float,
    ce_weight: float, softcap: float | None, share_counted: float,
) -> None:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = normal(generator, 2, tokens, 4), normal(generator, vocab, 4)
    ids = torch.randint(0, vocab, (2, tokens), generator=generator)
    counted = torch.rand(2, tokens, generator=generator) < share_counted
    num, known = int(counted.sum()), min(known, vocab - 1)
    shares = torch.softmax(normal(generator, num, known + 1), dim=-1)
    teaching = SparseTeaching(
        torch.rand(num, vocab, generator=generator).argsort(dim=-1)[:, :known],
        shares[:, :known],
        torch.rand(num, generator=generator, dtype=torch.float64),
        shares[:, known] if has_outside else None,
    )
    of = LossSettings(temperature, ce_weight, chunk_tokens, ce_scale=0.5)
    theirs, mine = ([x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2))
    expected = naive(theirs[0], Head(theirs[1], softcap), teaching, ids, counted, of)
    torch.autograd.backward(3.0 * expected)
    actual = loss_toward(
        teaching, mine[0], Head(mine[1], softcap), ids, of, count_positions(ids, counted), counted_BT=counted
    )
    torch.autograd.backward(3.0 * actual.total)
    torch.testing.assert_close(actual.total, expected, rtol=1e-9, atol=1e-12)
    for a, b in zip(mine, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-12)


def all_of(logits_NV: Tensor) -> SparseTeaching:
    """What top_k of the whole vocabulary knows, without what storing it rounds."""
    p, ids = logits_NV.softmax(-1).sort(dim=-1, descending=True)
    return SparseTeaching(ids, p, torch.special.entr(p).sum(-1), torch.zeros(len(p), dtype=p.dtype))


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_top_k_of_the_whole_vocabulary_is_forward_kl(temperature: float) -> None:
    generator = torch.Generator().manual_seed(0)
    teacher, weight, ids = normal(generator, 2, 6, 4), normal(generator, 9, 4), torch.randint(0, 9, (2, 6))
    of, found = LossSettings(temperature, 0.3, 5), []
    start = normal(generator, 2, 6, 4)
    for cached in (False, True):
        hidden = start.clone().requires_grad_()
        positions = count_positions(ids)
        if cached:
            teaching = all_of((teacher @ weight.T / temperature).flatten(0, 1))
            loss = loss_toward(teaching, hidden, Head(weight), ids, of, positions)
        else:
            loss = distillation_loss(hidden, Head(weight), teacher, Head(weight), ids, of, positions)
        torch.autograd.backward(loss.total)
        found.append((loss.total.detach(), loss.divergence, hidden.grad))
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-15)


def kl(p: Tensor, q: Tensor) -> float:
    return float((p * (p.log() - q.log())).sum())


def rounded(pairs: Pairs, config: SampledTeacher | TopKTeacher) -> SparseTeaching:
    return as_teaching(pairs.tensors(), config)


def test_sampled_gradient_and_kl_are_unbiased() -> None:
    """The mean of 20,000 estimates from 3 draws each lies within 5 standard errors of the exact one, in each entry."""
    generator, num = torch.Generator().manual_seed(0), 20_000
    teacher, student = normal(generator, 12), normal(generator, 12)
    p, q = teacher.softmax(-1), student.softmax(-1)
    uniforms = torch.rand(num, 3, generator=generator, dtype=torch.float64)
    known = rounded(drawn_pairs(teacher.repeat(num, 1), uniforms), SampledTeacher(kind="sampled", draws=3))
    ce, gradient = cross_entropy_and_gradient(student.repeat(num, 1), known.ids_NK, known.weights_NK, None)
    estimates = torch.cat([gradient, (ce - known.entropy_N).unsqueeze(1)], dim=1)
    exact = torch.cat([q - p, torch.tensor([kl(p, q)])])
    error = estimates.std(dim=0) / num**0.5
    assert bool(((estimates.mean(dim=0) - exact).abs() < 5 * error).all())
    assert float(error.max()) < 0.01, "so that the test says something"


def test_draws_are_where_the_cumulative_sums_pass() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = normal(generator, 5, 9)
    uniforms = torch.rand(5, 7, generator=generator, dtype=torch.float64)
    found = drawn_pairs(logits, uniforms)
    at = 0
    for row, length in enumerate(found.lengths_R.tolist()):
        cumulative = logits[row].softmax(-1).cumsum(0)
        drawn = [int((cumulative <= u).sum()) for u in uniforms[row]]
        ids = found.ids_P[at : at + length].tolist()
        counts = found.weights_P[at : at + length].tolist()
        assert ids == sorted(set(drawn))
        assert counts == [drawn.count(token) for token in ids]
        at += length
    assert at == len(found.ids_P)


@pytest.mark.parametrize("power", [0.5, 1.5])
def test_another_proposal_is_weighted_back_to_the_teacher(power: float) -> None:
    generator, num = torch.Generator().manual_seed(0), 300
    teacher = normal(generator, 12)
    uniforms = torch.rand(num, 255, generator=generator, dtype=torch.float64)
    config = SampledTeacher(kind="sampled", draws=255, proposal_power=power)
    known = rounded(drawn_pairs(teacher.repeat(num, 1), uniforms, power), config)
    torch.testing.assert_close(known.weights_NK.sum(-1), torch.ones(num), rtol=0, atol=1e-4)
    mean = torch.zeros(12).scatter_add_(0, known.ids_NK.flatten(), known.weights_NK.flatten()) / num
    torch.testing.assert_close(mean, teacher.softmax(-1).float(), rtol=0, atol=0.005)


@pytest.mark.parametrize("k", [1, 4, 11])
def test_top_k_is_the_kl_of_k_tokens_and_all_others(k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    teacher, student = normal(generator, 5, 12), normal(generator, 5, 12)
    known = rounded(top_pairs(teacher.clone(), k), TopKTeacher(kind="top_k", k=k))
    ce, gradient = cross_entropy_and_gradient(student.clone(), known.ids_NK, known.weights_NK, known.outside_N)
    for row, (p, q) in enumerate(zip(teacher.softmax(-1), student.softmax(-1), strict=True)):
        top = p.topk(k).indices
        both = [torch.cat([x[top], (x.sum() - x[top].sum()).unsqueeze(0)]) for x in (p, q)]
        assert float(ce[row] - known.entropy_N[row]) == pytest.approx(kl(*both), abs=2e-4)
        assert kl(*both) <= kl(p, q) + 1e-12
        torch.testing.assert_close(gradient[row, top], (q - p)[top], rtol=0, atol=3e-5)


def test_a_student_that_excludes_what_is_outside_gets_finite_numbers() -> None:
    logits = torch.tensor([[200.0, 0.0, 0.0]])
    known: dict[str, Any] = {"ids_nK": torch.tensor([[0]]), "weights_nK": torch.tensor([[0.9]])}
    ce, gradient = cross_entropy_and_gradient(logits, **known, outside_n=torch.tensor([0.1]))
    assert bool(ce.isfinite().all())
    assert bool(gradient.isfinite().all())
