"""What the input of each norm is made of, by channel; no choice is made from it, but cuts rescale the norms by it.

Shares of the sum of squares that the norm divides by, and, for layer norms, which subtract the mean first, the means of
the normalized input too (cut.py says what is done with them). Each token counts alike, because the few with massive
activations would decide everything otherwise.

    # N tokens, D channels
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.prune.importance.observers import Observers, Results, input_of

SHARES, MEANS = "norm_shares", "norm_means"


class _TokenMean:
    """Mean over all tokens of a function of a norm and its input, which is centred first for a layer norm."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], centred: bool) -> None:
        self.function, self.centred = function, centred
        self.total: Tensor | None = None
        self.num_tokens = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        values_ND = input_of(args, kwargs).float().flatten(0, -2)
        if self.centred:
            values_ND = values_ND - values_ND.mean(-1, keepdim=True)
        batch = self.function(module, values_ND).sum(0, dtype=torch.float64)
        self.total = batch if self.total is None else self.total + batch
        self.num_tokens += len(values_ND)

    def result(self) -> Tensor:
        assert self.total is not None
        return (self.total / self.num_tokens).cpu()


def _shares(module: nn.Module, values_ND: Tensor) -> Tensor:
    """Each channel's share of the sum of squares; tokens of zeros have none."""
    squares_ND = values_ND.square()
    return squares_ND / squares_ND.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)


def _normalized(module: nn.Module, values_ND: Tensor) -> Tensor:
    """Each channel after a layer norm, before its scale and bias."""
    assert isinstance(module, nn.LayerNorm)
    return values_ND * (values_ND.square().mean(-1, keepdim=True) + module.eps).rsqrt()


def observers(norms: Iterable[str], *, centred: bool) -> Observers:
    """Observers of these norms; `centred`: of layer norms, which subtract the mean first."""
    found: Observers = {}
    for norm in norms:
        found[SHARES, "hidden", norm] = _TokenMean(_shares, centred)
        if centred:
            found[MEANS, "hidden", norm] = _TokenMean(_normalized, centred)
    return found


def tables(metric: str, results: Results) -> dict[str, Tensor]:
    """By norm: (channels,), of SHARES or MEANS."""
    return {module: result for (measured, _, module), result in results.items() if measured == metric}
