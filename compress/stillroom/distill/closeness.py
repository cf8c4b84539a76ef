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
    windows_NT: Tensor,
    config: Distill,
    *,
    counted_NT: Tensor | None = None,
) -> Closeness:
    """Of `model` to `teacher` over the windows, at all positions unless `counted_NT` says which."""
    counted = torch.ones_like(windows_NT, dtype=torch.bool) if counted_NT is None else counted_NT
    heads = head_of(model), head_of(teacher)
    kl, agreed = 0.0, 0
    for start in range(0, len(windows_NT), config.micro_batch_size):
        at = slice(start, start + config.micro_batch_size)
        ids, chosen = windows_NT[at].to(model.device, torch.int64), counted[at].to(model.device)
        hidden, teacher_hidden = (
            m.base_model(ids, use_cache=False).last_hidden_state[chosen] for m in (model, teacher)
        )
        for some, theirs in zip(
            hidden.split(config.chunk_tokens), teacher_hidden.split(config.chunk_tokens), strict=True
        ):
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
