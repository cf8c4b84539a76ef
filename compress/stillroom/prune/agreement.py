"""How well a cut model still agrees with the dense one on the same text: KL(dense || cut) and next-token loss.

Made to be asked hundreds of times. With p the dense model's distribution at a position, h and g the dense and the cut
model's states there, W and U their heads, and Z the logarithm of a softmax's sum,

    KL = (p^T W h - Z(W h)) - (p^T U g - Z(U g))

so once p^T W h - Z(W h), a number, and p^T U, a vector of the hidden size, are known, a question costs one head product
and one logsumexp; no distribution is kept. A soft cap is not linear: there p is computed anew each time.

Every `stride`-th position of a window is scored; the others only serve as context. Head and softmax cost as much as all
layers of a small model with a large vocabulary, and neighbouring positions say much the same.

    B batch, T tokens, D hidden of the dense model, d of the cut one, n scored positions, V vocabulary
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


class Yardstick:
    """The dense model's states at the scored positions of some batches."""

    def __init__(self, head: Head, *, stride: int) -> None:
        self.head = head
        self.stride = stride
        self.dense: list[Tensor] = []
        """(n, D) of each batch, as the head takes them."""
        self.next_ids: list[Tensor] = []
        """(n,) of each batch."""

    def add(self, ids_BT: Tensor, dense_BTD: Tensor) -> None:
        """Note a batch: its tokens, and the dense model's hidden states as the head takes them."""
        self.dense.append(self.positions(dense_BTD))
        self.next_ids.append(ids_BT[:, 1:][:, :: self.stride].flatten().to(dense_BTD.device))

    def positions(self, hidden_BTD: Tensor) -> Tensor:
        """(n, D): the scored positions; the last of a window has no next token."""
        return hidden_BTD[:, :-1][:, :: self.stride].flatten(0, 1)


class Comparison:
    """The dense model held against one with this head; the head's weight must not change meanwhile."""

    def __init__(self, yardstick: Yardstick, head: Head) -> None:
        self.yardstick, self.head = yardstick, head
        self.linear = head.softcap is None and yardstick.head.softcap is None
        self._known = [self._prepared(dense_nD) for dense_nD in yardstick.dense]

    def sums(self, batch: int, hidden_BTd: Tensor) -> tuple[float, float, int]:
        """Sums of KL and loss over the scored positions of a batch, and their number; `hidden_BTd` is what the head
        takes."""
        hidden_nd = self.yardstick.positions(hidden_BTd)
        certainty_n, rows_nd = self._known[batch]
        kl = loss = 0.0
        for start in range(0, len(hidden_nd), CHUNK_POSITIONS):
            some = slice(start, start + CHUNK_POSITIONS)
            logits = self.head.logits(hidden_nd[some]).float()
            normalizer = logits.logsumexp(-1)
            if self.linear:
                expected = (rows_nd[some] * hidden_nd[some].float()).sum(-1)
            else:
                expected = (self._distribution(self.yardstick.dense[batch][some])[0] * logits).sum(-1)
            kl += (certainty_n[some] - expected + normalizer).sum().item()
            next_ids = self.yardstick.next_ids[batch][some]
            loss += (normalizer - logits.gather(-1, next_ids[:, None]).squeeze(-1)).sum().item()
        return kl, loss, len(hidden_nd)

    def _prepared(self, dense_nD: Tensor) -> tuple[Tensor, Tensor]:
        """p^T W h - Z(W h), (n,), and p^T U, (n, d), which is empty where a cap forbids it."""
        certainty, rows = [], []
        for some_nD in torch.split(dense_nD, CHUNK_POSITIONS):
            distribution, logits = self._distribution(some_nD)
            if self.linear:  # as `sums` computes it, so that the dense model itself is at no distance
                expected = (_rows(distribution, self.yardstick.head) * some_nD.float()).sum(-1)
                rows.append(_rows(distribution, self.head))
            else:
                expected = (distribution * logits).sum(-1)
                rows.append(some_nD[:, :0])
            certainty.append(expected - logits.logsumexp(-1))
        return torch.cat(certainty), torch.cat(rows)

    def _distribution(self, some_nD: Tensor) -> tuple[Tensor, Tensor]:
        """The dense model's distribution and logits, (n, V) float32."""
        logits = self.yardstick.head.logits(some_nD).float()
        return logits.softmax(-1), logits


def _rows(distribution_nV: Tensor, head: Head) -> Tensor:
    """p^T U, (n, d) float32."""
    return (distribution_nV.to(head.weight.dtype) @ head.weight).float()
