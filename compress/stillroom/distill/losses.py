"""The distillation loss, in chunks, so that a batch x sequence x vocabulary tensor never exists.

    loss = (1 - w) * tau^2 * mean KL(teacher || student at temperature tau)  +  w * mean cross-entropy at temperature 1

after Hinton et al. (arXiv 1503.02531, section 2); tau^2 keeps the gradient's size as tau changes. The input is not
logits but the last hidden states of both models and their heads. For `chunk_tokens` positions at a time the logits are
computed, turned into loss and into the gradients of hidden states and head weight, and thrown away (the way of Liger
Kernel, arXiv 2410.10989, section 3.2). So the backward pass only multiplies stored gradients of the size of hidden
states and head. Softmax, KL and sums are in float32 or better, whatever the inputs are; matrix products are in the
inputs' dtype.

ModelOpt 0.47's LogitsDistillationLoss and KDTrainer are not used, for four reasons: the default reduction divides by
the vocabulary too, so that the loss all but vanishes beside cross-entropy; `compute_loss` ignores how many tokens the
whole optimizer batch has, so gradient accumulation scales the gradient; it wants the whole logits of both models; and
it has neither top-k nor cached teachers to grow into.

Shapes: B batch, T tokens, N = B * T positions, n of a chunk, D hidden (teacher and student may differ), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillroom.errors import InputError

IGNORE = -100
"""The label of padding."""

PIECE_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class Head:
    """From hidden states to logits: softcap * tanh(hidden @ weight.T / softcap), or without the cap."""

    weight: Tensor
    """(V, D)"""
    softcap: float | None = None

    def logits(self, hidden: Tensor) -> Tensor:
        """(n, D) to (n, V), in float32 or better."""
        return self.capped(_to_math(hidden @ self.weight.T))

    def capped(self, raw: Tensor) -> Tensor:
        """The soft cap, in place."""
        return raw if self.softcap is None else raw.div_(self.softcap).tanh_().mul_(self.softcap)


@dataclass(frozen=True)
class LossSettings:
    temperature: float
    """tau"""
    ce_weight: float
    """w"""
    chunk_tokens: int


@dataclass(frozen=True)
class Positions:
    """Over how many positions the means of a whole optimizer step are taken, however many forward passes it has."""

    kl: int
    ce: int


@dataclass(frozen=True)
class DistillationLoss:
    """Scalars in float32 or better; only `total` carries a gradient. Summed over a step's passes they are its means."""

    total: Tensor
    kl: Tensor
    """Nats per token at temperature tau, without tau^2."""
    ce: Tensor
    """Nats per token; 0 where ce_weight is 0 and it was not computed."""


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


def count_positions(labels_BT: Tensor) -> Positions:
    """Every token that is no padding is a position for KL, and a target for cross-entropy where one precedes it."""
    return Positions(kl=int((labels_BT != IGNORE).sum()), ce=int((_targets(labels_BT) != IGNORE).sum()))


def distillation_loss(
    student_hidden_BTD: Tensor,
    student: Head,
    teacher_hidden_BTD: Tensor,
    teacher: Head,
    labels_BT: Tensor,
    settings: LossSettings,
    positions: Positions,
) -> DistillationLoss:
    """The share of these sequences in the step's mean loss.

    `labels_BT` are the tokens themselves (they are shifted here), IGNORE for padding. KL counts every position that is
    no padding. `positions` are those of the whole step. The gradient reaches the student's hidden states and head.
    """
    total, kl, ce = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
        student_hidden_BTD.flatten(0, 1),
        student.weight,
        student.softcap,
        teacher_hidden_BTD.detach().flatten(0, 1),
        Head(teacher.weight.detach(), teacher.softcap),
        (labels_BT != IGNORE).flatten(),
        _targets(labels_BT).flatten(),
        settings,
        positions,
    )
    return DistillationLoss(total, kl, ce)


def _targets(labels_BT: Tensor) -> Tensor:
    """The token that follows, (B, T); IGNORE at the end and for padding."""
    targets = torch.full_like(labels_BT, IGNORE)
    targets[:, :-1] = labels_BT[:, 1:]
    return targets.masked_fill(labels_BT == IGNORE, IGNORE)


class _ChunkedLoss(torch.autograd.Function):
    """Loss and gradients in one walk over the chunks."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        softcap: float | None,
        teacher_hidden_ND: Tensor,
        teacher: Head,
        counted_N: Tensor,
        targets_N: Tensor,
        settings: LossSettings,
        positions: Positions,
    ) -> tuple[Tensor, Tensor, Tensor]:
        student = Head(weight_VD, softcap)
        math = _math_dtype(hidden_ND.dtype)
        kl, ce = hidden_ND.new_zeros((), dtype=math), hidden_ND.new_zeros((), dtype=math)
        grad_hidden = torch.zeros_like(hidden_ND) if ctx.needs_input_grad[0] else None
        grad_weight = torch.zeros_like(weight_VD, dtype=math) if ctx.needs_input_grad[1] else None
        for start in range(0, len(hidden_ND), settings.chunk_tokens):
            at = slice(start, start + settings.chunk_tokens)
            raw_nV, teacher_raw_nV = hidden_ND[at] @ weight_VD.T, teacher_hidden_ND[at] @ teacher.weight.T
            counted_n, targets_n = counted_N[at], targets_N[at]
            for rows in _pieces(raw_nV):
                logits = student.capped(_to_math(raw_nV[rows]))
                # d tanh: 1 - tanh^2, from the capped logits, which the next line overwrites
                slope = None if softcap is None else 1 - (logits / softcap).square_()
                kl_sum, ce_sum, grad_logits = _loss_and_gradient(
                    logits,
                    teacher.capped(_to_math(teacher_raw_nV[rows])),
                    counted_n[rows],
                    targets_n[rows],
                    settings,
                    positions,
                )
                kl += kl_sum
                ce += ce_sum
                raw_nV[rows] = grad_logits if slope is None else grad_logits.mul_(slope)
            grad_logits_nV = raw_nV
            if grad_hidden is not None:
                torch.mm(grad_logits_nV, weight_VD, out=grad_hidden[at])
            if grad_weight is not None:
                grad_weight += grad_logits_nV.T @ hidden_ND[at]
        ctx.gradients = (grad_hidden, None if grad_weight is None else grad_weight.to(weight_VD.dtype))
        kl /= max(positions.kl, 1)
        ce /= max(positions.ce, 1)
        total = (1 - settings.ce_weight) * settings.temperature**2 * kl + settings.ce_weight * ce
        ctx.mark_non_differentiable(kl, ce)
        return total, kl, ce

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        scaled = [None if g is None else g * grad_outputs[0].to(g.dtype) for g in ctx.gradients]
        return scaled[0], scaled[1], None, None, None, None, None, None, None


def _pieces(raw_nV: Tensor) -> list[slice]:
    """How the rows of a chunk are taken for softmax and the like: all at once on a GPU, by 16 MB in float32 on a CPU.

    There a larger tensor is new memory in every operation, and timing single operations showed the first touch to cost
    more than the arithmetic; the whole loss was not timed against taking a chunk at once. Matrix products want the
    whole chunk, since each reads all of the head.
    """
    step = len(raw_nV) if raw_nV.is_cuda else max(1, PIECE_ELEMENTS // raw_nV.shape[1])
    return [slice(start, start + step) for start in range(0, len(raw_nV), step)]


def _loss_and_gradient(
    logits_nV: Tensor,
    teacher_logits_nV: Tensor,
    counted_n: Tensor,
    targets_n: Tensor,
    settings: LossSettings,
    positions: Positions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums of KL and of cross-entropy, and d total / d logits (n, V); both logits are overwritten.

    d/dz of tau^2 KL is tau * (softmax(z / tau) - softmax(t / tau)); of cross-entropy softmax(z) - onehot.
    """
    tau, w = settings.temperature, settings.ce_weight
    ce_sum, ce_gradient = logits_nV.new_zeros(()), None
    if w > 0:
        ce_sum, ce_gradient = _cross_entropy(logits_nV, targets_n, w / max(positions.ce, 1))
    log_p = torch.log_softmax(teacher_logits_nV.div_(tau), dim=-1)
    log_q = torch.log_softmax(logits_nV.div_(tau), dim=-1)
    p = torch.exp(log_p, out=teacher_logits_nV)
    kl_n = log_p.sub_(log_q).mul_(p).sum(dim=-1)
    kl_sum = kl_n.masked_fill_(~counted_n, 0.0).sum()
    gradient = log_q.exp_().sub_(p)
    gradient *= counted_n.to(gradient.dtype).mul_((1 - w) * tau / max(positions.kl, 1)).unsqueeze(1)
    if ce_gradient is not None:
        gradient += ce_gradient
    return kl_sum, ce_sum, gradient


def _cross_entropy(logits_nV: Tensor, targets_n: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """The sum over targets that are not IGNORE, and `scale` times its gradient, (n, V)."""
    counted_n1 = (targets_n != IGNORE).unsqueeze(1)
    safe_n1 = targets_n.clamp(min=0).unsqueeze(1)
    log_q = torch.log_softmax(logits_nV, dim=-1)
    total = -log_q.gather(1, safe_n1).masked_fill_(~counted_n1, 0.0).sum()
    gradient = log_q.exp_()
    gradient.scatter_add_(1, safe_n1, torch.full_like(safe_n1, -1, dtype=gradient.dtype))
    return total, gradient.mul_(counted_n1.to(gradient.dtype).mul_(scale))


def _math_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _to_math(x: Tensor) -> Tensor:
    return x.to(_math_dtype(x.dtype))
