"""The distillation losses as their papers write them, on whole logits, for torch's autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from stillroom.distill.losses import Head, LossSettings
from stillroom.recipe import Divergence


def naive_divergence(kind: Divergence, share: float, q: Tensor, p: Tensor) -> Tensor:
    """Of the student's probabilities q and the teacher's p, over the last dimension."""

    def kl(a: Tensor, b: Tensor) -> Tensor:
        return (a * (a.log() - b.log())).sum(-1)

    mixture = share * p + (1 - share) * q
    if kind == "js":
        return share * kl(p, mixture) + (1 - share) * kl(q, mixture)
    return kl(q, p) if kind == "reverse_kl" else kl(p, mixture if kind == "skewed_kl" else q)


def naive_loss(
    student_BTD: Tensor,
    head: Head,
    teacher_BTD: Tensor,
    teacher_head: Head,
    ids_BT: Tensor,
    counted_BT: Tensor,
    config: LossSettings,
) -> tuple[Tensor, Tensor, Tensor]:
    """Total, divergence and cross-entropy; 0 where nothing counts."""

    def logits(hidden: Tensor, head: Head) -> Tensor:
        raw = hidden @ head.weight.T
        return raw if head.softcap is None else head.softcap * torch.tanh(raw / head.softcap)

    def mean(values: Tensor, counted: Tensor) -> Tensor:
        return (values * counted).sum() / max(int(counted.sum()), 1)

    tau, z, t = config.temperature, logits(student_BTD, head), logits(teacher_BTD, teacher_head)
    each = naive_divergence(config.divergence, config.teacher_share, (z / tau).softmax(-1), (t / tau).softmax(-1))
    divergence = mean(each, counted_BT)
    log_q = z[:, :-1].log_softmax(-1).gather(-1, ids_BT[:, 1:, None])[..., 0]
    ce = mean(-log_q, counted_BT[:, :-1])
    total = (1 - config.ce_weight) * tau**2 * divergence + config.ce_weight * config.ce_scale * ce
    return total, divergence, ce
