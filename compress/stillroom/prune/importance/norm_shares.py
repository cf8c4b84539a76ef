"""What the input of each norm is made of: each channel's mean share of the sum of squares that the norm divides by.

No choice is made from it; a hidden cut needs it to rescale the norms (surgery.py says how). Each token counts alike,
because the few with massive activations would decide everything otherwise.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.prune.importance.observers import Observers, Results, input_of

METRIC = "norm_shares"


class NormShares:
    """Of one norm; tokens of zeros have no shares."""

    def __init__(self, centred: bool) -> None:
        self.centred = centred
        self.total: Tensor | None = None
        self.num_tokens = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        values_ND = input_of(args, kwargs).float().flatten(0, -2)
        if self.centred:
            values_ND = values_ND - values_ND.mean(-1, keepdim=True)
        squares_ND = values_ND.square()
        shares_ND = squares_ND / squares_ND.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        batch = shares_ND.sum(0, dtype=torch.float64)
        self.total = batch if self.total is None else self.total + batch
        self.num_tokens += len(shares_ND)

    def result(self) -> Tensor:
        assert self.total is not None
        return (self.total / self.num_tokens).cpu()


def observers(norms: Iterable[str], *, centred: bool) -> Observers:
    """Observers of these norms; `centred`: of layer norms, which subtract the mean first."""
    return {(METRIC, "shares", norm): NormShares(centred) for norm in norms}


def tables(results: Results) -> dict[str, Tensor]:
    """By norm: (hidden,)."""
    return {module: result for (metric, _, module), result in results.items() if metric == METRIC}
