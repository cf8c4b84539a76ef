"""How close a model is to its teacher on text: KL and top-1 agreement in one walk, whatever the training loss was.

Shapes: N windows, B of a forward pass, T tokens, n positions of a chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel

from stillroom.distill.losses import Head, head_of, pieces, to_math
from stillroom.distill.packing import Windows, last_hidden
from stillroom.recipe import Distill


@dataclass(frozen=True)
class Closeness:
    """Means over the positions that count."""

    kl: float
    """KL(teacher || student) at temperature 1, in nats per token."""
    agreement: float
    """Share of positions where both models' likeliest next token is the same."""


@torch.no_grad()
def closeness(
    model: PreTrainedModel,
    teacher: PreTrainedModel,
    windows: Windows,
    config: Distill,
) -> Closeness:
    """Of `model` to `teacher` over the windows."""
    counted = torch.ones_like(windows.ids, dtype=torch.bool) if windows.counted is None else windows.counted
    heads = head_of(model), head_of(teacher)
    kl, agreed = 0.0, 0
    for start in range(0, len(windows), config.micro_batch_size):
        at = slice(start, start + config.micro_batch_size)
        batch, chosen = windows[at].to(model.device), counted[at].to(model.device)
        hidden, teacher_hidden = (last_hidden(m, batch)[chosen] for m in (model, teacher))
        chunks = (torch.split(h, config.chunk_tokens) for h in (hidden, teacher_hidden))
        for some, theirs in zip(*chunks, strict=True):
            kl_of_chunk, agreed_in_chunk = _compared(some, theirs, heads)
            kl += kl_of_chunk
            agreed += agreed_in_chunk
    num_positions = max(int(counted.sum()), 1)
    return Closeness(kl / num_positions, agreed / num_positions)


def _compared(hidden_nD: Tensor, teacher_hidden_nD: Tensor, heads: tuple[Head, Head]) -> tuple[float, int]:
    """Sum of KL, and number of positions that agree."""
    raw, teacher_raw = hidden_nD @ heads[0].weight.T, teacher_hidden_nD @ heads[1].weight.T
    kl, agreed = 0.0, 0
    for rows in pieces(raw):
        logits, teacher_logits = heads[0].capped(to_math(raw[rows])), heads[1].capped(to_math(teacher_raw[rows]))
        agreed += int((logits.argmax(dim=-1) == teacher_logits.argmax(dim=-1)).sum())
        log_q, log_p = logits.log_softmax(dim=-1), teacher_logits.log_softmax(dim=-1)
        kl += float(functional.kl_div(log_q, log_p, reduction="sum", log_target=True))
    return kl, agreed
