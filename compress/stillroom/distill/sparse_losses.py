"""Forward KL toward a teacher of which a few tokens are known at each position (`teacher_cache`), with its gradient.

    D = -sum(w * log q) - r * log(q outside)  -  H          w of the known tokens, r of all others as one

`sampled` has w = counts / draws and no r: then -sum(w * log q) is an unbiased estimate of the teacher's cross-entropy
and, its entropy H being stored, D one of KL(p || q); so is the gradient q - w of q - p. The same draws are read in
every epoch. `top_k` has the probabilities of K tokens and r, the mass outside: D is the KL of K + 1 outcomes (H their
entropy), at most KL(p || q), and the student's odds among the others stay as they are. Sharing r out among the K would
teach the student to be surer than the teacher is; the paper measured that as worse quality and calibration (arXiv
2503.16870). With K = V it is forward KL.

r and q outside are sums of the small terms, never 1 minus the large ones: that would be rounding noise in float32.

Shapes: N positions, n of a chunk, K the most known tokens at one, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from stillroom.distill.losses import Rows


@dataclass(frozen=True)
class SparseTeaching:
    """What is known of the teacher's distribution at temperature tau."""

    ids_NK: Tensor
    """int64; where fewer are known, anything with weight 0."""
    weights_NK: Tensor
    """float32 or better"""
    entropy_N: Tensor
    outside_N: Tensor | None = None
    """The mass of all other tokens; then K are known everywhere. None: the weights stand for all."""

    def chunk(self, at: slice) -> Rows:
        ids, weights, entropy = self.ids_NK[at], self.weights_NK[at], self.entropy_N[at]
        outside = None if self.outside_N is None else self.outside_N[at]

        def divergence(rows: slice, logits_nV: Tensor) -> tuple[Tensor, Tensor]:
            mass = None if outside is None else outside[rows]
            cross_entropy, gradient = cross_entropy_and_gradient(logits_nV, ids[rows], weights[rows], mass)
            return cross_entropy - entropy[rows], gradient

        return divergence


def cross_entropy_and_gradient(
    logits_nV: Tensor, ids_nK: Tensor, weights_nK: Tensor, outside_n: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Cross-entropy (n,) and its gradient (n, V), in place of the logits' softmax."""
    log_q = torch.log_softmax(logits_nV, dim=-1)
    weights_nK = weights_nK.to(log_q.dtype)
    cross_entropy = -(weights_nK * log_q.gather(1, ids_nK)).sum(dim=-1)
    total_n1 = weights_nK.sum(dim=-1, keepdim=True)
    q = log_q.exp_()
    if outside_n is None:
        return cross_entropy, q.mul_(total_n1).scatter_add_(1, ids_nK, -weights_nK)
    mass_n1 = outside_n.to(q.dtype).unsqueeze(1)
    known_nK = q.gather(1, ids_nK)
    q.scatter_(1, ids_nK, 0.0)
    q_outside_n1 = q.sum(dim=-1, keepdim=True).clamp_(min=torch.finfo(q.dtype).tiny)
    cross_entropy -= (mass_n1 * q_outside_n1.log()).squeeze(1)
    total_n1 = total_n1 + mass_n1
    gradient = q.mul_(total_n1 - mass_n1 / q_outside_n1)
    return cross_entropy, gradient.scatter_(1, ids_nK, known_nK * total_n1 - weights_nK)
