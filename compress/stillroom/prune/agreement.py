"""How well a cut model still agrees with the dense one on the same text: KL(dense || cut) and next-token loss.

Made to be asked hundreds of times: the dense model's logits at the scored positions are computed once and kept in its
own dtype (2 bytes x vocabulary for each position), so that a question costs one head product over these positions.
Every `stride`-th position of a window is scored; the others only serve as context. The head and the softmax cost about
as much as all layers of a small model with a large vocabulary, and neighbouring positions say much the same.

    B batch, T tokens, D hidden, n scored positions, V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.distill.losses import Head

CHUNK_POSITIONS = 256
"""Positions whose float32 logits exist at one time."""


@dataclass(frozen=True)
class Agreement:
    """Means over positions, in nats per token; lower is nearer to the dense model."""

    kl: float
    loss: float
    """Cross-entropy of the text's next token."""


@dataclass(frozen=True)
class _Scored:
    """What is known of one batch."""

    logits_nV: Tensor
    normalizer_n: Tensor
    next_ids_n: Tensor


class Yardstick:
    """The dense model's distributions at the scored positions of some batches."""

    def __init__(self, head: Head, *, stride: int) -> None:
        self.head = head
        self.stride = stride
        self._batches: list[_Scored] = []

    def add(self, ids_BT: Tensor, dense_BTD: Tensor) -> None:
        """Note a batch: its tokens, and the dense model's hidden states as the head takes them."""
        hidden_nD = self._positions(dense_BTD)
        logits = [_logits(self.head, some) for some in torch.split(hidden_nD, CHUNK_POSITIONS)]
        self._batches.append(
            _Scored(
                logits_nV=torch.cat([some.to(dense_BTD.dtype) for some in logits]),
                normalizer_n=torch.cat([some.to(dense_BTD.dtype).float().logsumexp(-1) for some in logits]),
                next_ids_n=ids_BT[:, 1:][:, :: self.stride].flatten().to(dense_BTD.device),
            )
        )

    def compare(self, batch: int, hidden_BTD: Tensor, head: Head | None = None) -> tuple[float, float, int]:
        """Sums of KL and loss over the scored positions of a batch, and their number."""
        scored = self._batches[batch]
        kl = loss = 0.0
        hidden_nD = self._positions(hidden_BTD)
        for start in range(0, len(hidden_nD), CHUNK_POSITIONS):
            some = slice(start, start + CHUNK_POSITIONS)
            logits = _logits(head or self.head, hidden_nD[some])
            normalizer = logits.logsumexp(-1)
            dense = scored.logits_nV[some].float()
            expected = ((dense - scored.normalizer_n[some, None]).exp() * (dense - logits)).sum(-1)
            kl += (expected - scored.normalizer_n[some] + normalizer).sum().item()
            loss += (normalizer - logits.gather(-1, scored.next_ids_n[some, None]).squeeze(-1)).sum().item()
        return kl, loss, len(hidden_nD)

    def _positions(self, hidden_BTD: Tensor) -> Tensor:
        """(n, D): the scored positions; the last of a window has no next token."""
        return hidden_BTD[:, :-1][:, :: self.stride].flatten(0, 1)


def _logits(head: Head, hidden_nD: Tensor) -> Tensor:
    return head.logits(hidden_nD).float()
