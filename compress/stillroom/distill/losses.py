"""The distillation loss, in chunks, so that a batch x sequence x vocabulary tensor never exists.

    loss = (1 - w) * tau^2 * mean D(teacher, student at temperature tau)  +  w * a * mean cross-entropy at temperature 1

D is one of `divergences`, Hinton's KL unless the recipe says otherwise (arXiv 1503.02531, section 2). tau^2 keeps the
gradient's size as tau changes: D has one 1/tau from the chain rule and one from the softened distributions, whichever
it is. a is 1, or what brings cross-entropy to the divergence's size (`train`).

The input is not logits but the last hidden states of both models and their heads. For `chunk_tokens` positions at a
time the logits are computed, turned into loss and into the gradients of hidden states and head weight, and thrown away
(the way of Liger Kernel, arXiv 2410.10989, section 3.2). So the backward pass only multiplies stored gradients of the
size of hidden states and head. Positions that do not count never reach a head. Softmax, divergence and sums are in
float32 or better, whatever the inputs are; matrix products are in the inputs' dtype.

ModelOpt 0.47's LogitsDistillationLoss and KDTrainer are not used, for four reasons: the default reduction divides by
the vocabulary too, so that the loss all but vanishes beside cross-entropy; `compute_loss` ignores how many tokens the
whole optimizer batch has, so gradient accumulation scales the gradient; it wants the whole logits of both models; and
it has neither top-k nor cached teachers (here `sparse_losses`). Liger Kernel 0.8.5's fused linear JSD is not used on
CUDA either (read, not run): it has no soft cap, no skewed KL and no cross-entropy in the same walk, each of its calls
divides by its own positions and not the step's, and by default it sums the head's gradient in the head's dtype.

Shapes: B batch, T tokens, N of B * T positions those that count, n of a chunk, D hidden (teacher and student may
differ), V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillroom.distill.divergences import divergence_and_gradient
from stillroom.errors import InputError
from stillroom.recipe import Divergence

IGNORE = -100
"""The target of a position that has none."""

PADDING = -1
"""The document of padding."""

PIECE_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Head:
    """From hidden states to logits: softcap * tanh(hidden @ weight.T / softcap), or without the cap."""

    weight: Tensor
    """(V, D)"""
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, D) to (n, V), in float32 or better."""
        return self.capped(to_math(hidden @ self.weight.T))

    def capped(self, raw: Tensor) -> Tensor:
        """The soft cap, in place."""
        return raw if self.softcap is None else raw.div_(self.softcap).tanh_().mul_(self.softcap)


Rows = Callable[[slice, Tensor], tuple[Tensor, Tensor]]
"""For rows of a chunk and the student's logits there over tau, (n, V), which are overwritten: D and its gradient."""


class Teaching(Protocol):
    """What the teacher says of the next token, at N positions: its hidden states, or less."""

    def chunk(self, at: slice) -> Rows:
        """The part of it at these positions."""


@dataclass(frozen=True)
class LossSettings:
    temperature: float
    """tau"""
    ce_weight: float
    """w"""
    chunk_tokens: int
    divergence: Divergence = "forward_kl"
    teacher_share: float = 0.0
    """Of the mixture, for `skewed_kl` and `js`."""
    ce_scale: float = 1.0
    """a"""


@dataclass(frozen=True)
class Positions:
    """Over how many positions the means of a whole optimizer step are taken, however many forward passes it has."""

    divergence: int
    ce: int


@dataclass(frozen=True)
class DistillationLoss:
    """Scalars in float32 or better; only `total` carries a gradient. Summed over a step's passes they are its means."""

    total: Tensor
    divergence: Tensor
    """Nats per token at temperature tau, without tau^2."""
    ce: Tensor
    """Nats per token, as it is without `ce_scale`; 0 where ce_weight is 0 and it was not computed."""


def head_of(model: PreTrainedModel) -> Head:
    """The head of a causal language model.

    Raises InputError for one that does more than a product and a soft cap, such as a bias or a scale.
    """
    linear: Any = model.get_output_embeddings()
    unknown = [name for name in ("logit_scale", "logits_scaling", "lm_head_multiplier") if hasattr(model.config, name)]
    if not isinstance(linear, torch.nn.Linear) or linear.bias is not None or unknown:
        what = unknown[0] if unknown else "its bias" if isinstance(linear, torch.nn.Linear) else type(linear).__name__
        raise InputError(
            f"the head of {type(model).__name__} cannot be distilled through: {what} is not known here; "
            "a linear head without bias, with or without final_logit_softcapping, is"
        )
    return Head(linear.weight, getattr(model.config, "final_logit_softcapping", None))


def counted_positions(documents_BT: Tensor, answers_BT: Tensor | None = None) -> Tensor:
    """Which positions' predictions of the next token count, (B, T) bool.

    `documents_BT` numbers each token's document, PADDING for none: padding does not count, nor does a document's last
    token, whose next one is another document's. With `answers_BT`, True at the tokens that answer a prompt, only the
    predictions of those count.
    """
    counted_BT = documents_BT != PADDING
    counted_BT[:, :-1] &= documents_BT[:, 1:] == documents_BT[:, :-1]
    if answers_BT is not None:
        counted_BT[:, :-1] &= answers_BT[:, 1:]
        counted_BT[:, -1] = False
    return counted_BT


def count_positions(ids_BT: Tensor, counted_BT: Tensor | None = None) -> Positions:
    """Every position that counts has a divergence, and a cross-entropy where the sequence has a token after it."""
    counted = torch.ones_like(ids_BT, dtype=torch.bool) if counted_BT is None else counted_BT
    return Positions(divergence=int(counted.sum()), ce=int(counted[:, :-1].sum()))


def distillation_loss(
    student_hidden_BTD: Tensor,
    student: Head,
    teacher_hidden_BTD: Tensor,
    teacher: Head,
    ids_BT: Tensor,
    settings: LossSettings,
    positions: Positions,
    *,
    counted_BT: Tensor | None = None,
) -> DistillationLoss:
    """The share of these sequences in the step's mean loss.

    `ids_BT` are the tokens that the hidden states are of; they are shifted here. `counted_BT` says which positions
    count, all by default; `positions` are those of the whole step. The gradient reaches the student's hidden states
    and head.
    """
    chosen = slice(None) if counted_BT is None else counted_BT.flatten()
    hidden_ND = teacher_hidden_BTD.detach().flatten(0, 1)[chosen]
    teaching = _WholeTeaching(hidden_ND, Head(teacher.weight.detach(), teacher.softcap), settings)
    return loss_toward(teaching, student_hidden_BTD, student, ids_BT, settings, positions, counted_BT=counted_BT)


def loss_toward(
    teaching: Teaching,
    student_hidden_BTD: Tensor,
    student: Head,
    ids_BT: Tensor,
    settings: LossSettings,
    positions: Positions,
    *,
    counted_BT: Tensor | None = None,
) -> DistillationLoss:
    """`distillation_loss` toward whatever is known of the teacher at the positions that count, in their order."""
    chosen = slice(None) if counted_BT is None else counted_BT.flatten()
    total, divergence, ce = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        student_hidden_BTD.flatten(0, 1)[chosen],
        student.weight,
        student.softcap,
        teaching,
        _targets(ids_BT).flatten()[chosen],
        settings,
        positions,
    )
    return DistillationLoss(total, divergence, ce)


@dataclass(frozen=True)
class _WholeTeaching:
    """The teacher's own hidden states, through its head."""

    hidden_ND: Tensor
    head: Head
    settings: LossSettings

    def chunk(self, at: slice) -> Rows:
        raw_nV, of = self.hidden_ND[at] @ self.head.weight.T, self.settings

        def divergence(rows: slice, logits_nV: Tensor) -> tuple[Tensor, Tensor]:
            teacher_logits_nV = self.head.capped(to_math(raw_nV[rows])).div_(of.temperature)
            return divergence_and_gradient(of.divergence, of.teacher_share, logits_nV, teacher_logits_nV)

        return divergence


def _targets(ids_BT: Tensor) -> Tensor:
    """The token that follows, (B, T); IGNORE at the end."""
    targets = torch.full_like(ids_BT, IGNORE)
    targets[:, :-1] = ids_BT[:, 1:]
    return targets


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients in one walk over the chunks."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        softcap: float | None,
        teaching: Teaching,
        targets_N: Tensor,
        settings: LossSettings,
        positions: Positions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        student = Head(weight_VD, softcap)
        dtype = math_dtype(hidden_ND.dtype)
        divergence, ce = hidden_ND.new_zeros((), dtype=dtype), hidden_ND.new_zeros((), dtype=dtype)
        grad_hidden = torch.zeros_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_VD, dtype=dtype) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden_ND), settings.chunk_tokens):
            at = slice(start, start + settings.chunk_tokens)
            raw_nV, teaching_n, targets_n = hidden_ND[at] @ weight_VD.T, teaching.chunk(at), targets_N[at]
            for rows in pieces(raw_nV):
                logits = student.capped(to_math(raw_nV[rows]))
                # d tanh: 1 - tanh^2, from the capped logits, which the next line overwrites
                slope = None if softcap is None else 1 - (logits / softcap).square_()
                divergence_sum, ce_sum, grad_logits = _loss_and_gradient(
                    logits, partial(teaching_n, rows), targets_n[rows], settings, positions
                )
                divergence += divergence_sum
                ce += ce_sum
                raw_nV[rows] = grad_logits if slope is None else grad_logits.mul_(slope)
            grad_logits_nV = raw_nV
            if grad_hidden is not None:
                torch.mm(grad_logits_nV, weight_VD, out=grad_hidden[at])
            if grad_weight is not None:
                grad_weight += grad_logits_nV.T @ hidden_ND[at]
        ctx.gradients = (grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype))
        divergence /= max(positions.divergence, 1)
        ce /= max(positions.ce, 1)
        total = (1 - settings.ce_weight) * settings.temperature**2 * divergence
        total = total + settings.ce_weight * settings.ce_scale * ce
        ctx.mark_non_differentiable(divergence, ce)
        return total, divergence, ce

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if g is None else g * grad_outputs[0].to(g.dtype) for g in ctx.gradients]
        return scaled[0], scaled[1], None, None, None, None, None


def pieces(raw_nV: Tensor) -> list[slice]:
    """How the rows of a chunk are taken for softmax and the like: all at once on a GPU, by 16 MB in float32 on a CPU.

    There a larger tensor is new memory in every operation, and timing single operations showed the first touch to cost
    more than the arithmetic; the whole loss was not timed against taking a chunk at once. Matrix products want the
    whole chunk, since each reads all of the head.
    """
    step = len(raw_nV) if raw_nV.is_cuda else max(1, PIECE_ELEMENTS // raw_nV.shape[1])
    return [slice(start, start + step) for start in range(0, len(raw_nV), step)]


def _loss_and_gradient(
    logits_nV: Tensor,
    teaching: Callable[[Tensor], tuple[Tensor, Tensor]],
    targets_n: Tensor,
    settings: LossSettings,
    positions: Positions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of the divergence and of cross-entropy, and d total / d logits (n, V); the logits are overwritten.

    d/dz of tau^2 D(z / tau) is tau * D', and of cross-entropy softmax(z) - onehot.
    """
    tau, w = settings.temperature, settings.ce_weight
    ce_sum, ce_gradient = logits_nV.new_zeros(()), None
    if w > 0:
        ce_sum, ce_gradient = _cross_entropy(logits_nV, targets_n, w * settings.ce_scale / max(positions.ce, 1))
    divergence_n, gradient = teaching(logits_nV.div_(tau))
    gradient *= (1 - w) * tau / max(positions.divergence, 1)
    if ce_gradient is not None:
        gradient += ce_gradient
    return divergence_n.sum(), ce_sum, gradient


def _cross_entropy(logits_nV: Tensor, targets_n: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The sum over targets that are not IGNORE, and `scale` times its gradient, (n, V)."""
    counted_n1 = (targets_n != IGNORE).unsqueeze(1)
    safe_n1 = targets_n.clamp(min=0).unsqueeze(1)
    log_q = torch.log_softmax(logits_nV, dim=-1)
    total = -log_q.gather(1, safe_n1).masked_fill_(~counted_n1, 0.0).sum()
    gradient = log_q.exp_()
    gradient.scatter_add_(1, safe_n1, torch.full_like(safe_n1, -1, dtype=gradient.dtype))
    return total, gradient.mul_(counted_n1.to(gradient.dtype).mul_(scale))


def math_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def to_math(x: Tensor) -> Tensor:
    return x.to(math_dtype(x.dtype))
