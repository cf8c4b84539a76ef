"""How far the student's distribution q over the next token is from the teacher's p, with its gradient, in place.

    forward_kl   KL(p || q)                              Hinton et al., arXiv 1503.02531: q covers all that p says
    reverse_kl   KL(q || p)                              MiniLLM, arXiv 2306.08543: q keeps to what p says most
    skewed_kl    KL(p || m)                              DistiLLM, arXiv 2402.03898: p / m stays below 1 / s
    js           s KL(p || m) + (1 - s) KL(q || m)       generalized Jensen-Shannon, GKD, arXiv 2306.13649

    m = s p + (1 - s) q,  s the teacher's share: DistiLLM's alpha, GKD's beta

skewed_kl becomes forward_kl as s goes to 0; js / s becomes forward_kl, js / (1 - s) reverse_kl as s goes to 0 and to 1.
Where p and q are close, all four are one quadratic form times 1, 1, (1 - s)^2 and s (1 - s): js at 1/2 is a quarter of
KL, and so is its gradient. Nothing here evens that out, so learning rate, clipping and a static cross-entropy weight
mean other things for each.

With p and q the softmax at temperature tau, and D a function of q, dD/dz = (q * D' - q * sum(q * D')) / tau for the
student's logits z. All are in nats and read log p - log q alone, which is finite where p and q underflow.

Shapes: n positions, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stillroom.recipe import Divergence


def divergence_and_gradient(
    kind: Divergence, teacher_share: float, logits_nV: Tensor, teacher_logits_nV: Tensor
) -> tuple[Tensor, Tensor]:
    """Divergence (n,) of two softmaxes and its gradient (n, V) toward `logits_nV`; both logits are overwritten.

    `teacher_share` is s of the mixture, between 0 and 1; the two KLs have none.
    """
    log_p = torch.log_softmax(teacher_logits_nV, dim=-1)
    log_q = torch.log_softmax(logits_nV, dim=-1)
    if kind == "forward_kl":
        return _forward_kl(log_p, log_q, teacher_logits_nV)
    if kind == "reverse_kl":
        return _reverse_kl(log_p, log_q, teacher_logits_nV)
    if kind == "skewed_kl":
        return _skewed_kl(teacher_share, log_p, log_q, teacher_logits_nV, logits_nV)
    return _jensen_shannon(teacher_share, log_p, log_q, teacher_logits_nV, logits_nV)


def _forward_kl(log_p: Tensor, log_q: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """D = sum(p * log p/q); the gradient is q - p."""
    p = torch.exp(log_p, out=buffer)
    divergence = log_p.sub_(log_q).mul_(p).sum(dim=-1)
    return divergence, log_q.exp_().sub_(p)


def _reverse_kl(log_p: Tensor, log_q: Tensor, buffer: Tensor) -> tuple[Tensor, Tensor]:
    """D = sum(q * log q/p); the gradient is q * (log q/p - D)."""
    q = torch.exp(log_q, out=buffer)
    ratio = log_q.sub_(log_p)
    divergence = torch.mul(q, ratio, out=log_p).sum(dim=-1)
    return divergence, ratio.sub_(divergence.unsqueeze(1)).mul_(q)


def _skewed_kl(
    share: float, log_p: Tensor, log_q: Tensor, buffer: Tensor, other_buffer: Tensor
) -> tuple[Tensor, Tensor]:
    """D = sum(p * log p/m); with u = (1 - s) * q * p/m the gradient is q * sum(u) - u."""
    p, q = torch.exp(log_p, out=buffer), torch.exp(log_q, out=other_buffer)
    ratio, mixture = _ratios(share, log_p, log_q)
    log_p_over_m = ratio.sub_(mixture)
    divergence = p.mul_(log_p_over_m).sum(dim=-1)
    u = log_p_over_m.exp_().mul_(q).mul_(1 - share)
    return divergence, q.mul_(u.sum(dim=-1, keepdim=True)).sub_(u)


def _jensen_shannon(
    share: float, log_p: Tensor, log_q: Tensor, buffer: Tensor, other_buffer: Tensor
) -> tuple[Tensor, Tensor]:
    """D = s KL(p || m) + (1 - s) KL(q || m); the gradient is (1 - s) * q * (log q/m - KL(q || m))."""
    p, q = torch.exp(log_p, out=buffer), torch.exp(log_q, out=other_buffer)
    ratio, mixture = _ratios(share, log_p, log_q)
    of_p = p.mul_(ratio.sub_(mixture)).sum(dim=-1)
    of_q = -torch.mul(q, mixture, out=ratio).sum(dim=-1)
    gradient = mixture.add_(of_q.unsqueeze(1)).mul_(q).mul_(share - 1)
    return of_p.mul_(share).add_(of_q, alpha=1 - share), gradient


def _ratios(share: float, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
    """log p/q and log m/q = log s + log(p/q + (1 - s)/s), in place of log p and log q."""
    ratio = log_p.sub_(log_q)
    student = ratio.new_tensor(math.log((1 - share) / share))
    return ratio, torch.logaddexp(ratio, student, out=log_q).add_(math.log(share))
