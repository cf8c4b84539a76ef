"""Activation magnitudes of channels: Minitron's, and its two ingredients alone.

`minitron`: mean |activation| over a sequence, then the L2 norm over sequences (arXiv 2407.14679, section 2.2).
`mean_abs` is the mean over all tokens, `l2` the root mean square over all tokens, in which the few tokens with massive
activations weigh most.

FFN channels are read where the down projection takes them, heads where the output projection takes them (L2 over the
channels of a head, and over the heads of a group for a KV group), hidden channels at the outputs of the norms, summed
over norms. Fused or transposed projections before or after do not matter: only inputs and outputs are looked at.

ModelOpt's `L2NormHook` does Minitron's accumulation and is reused; it wants Megatron's [seq, batch, channels], hence
the transpose.

    # B batch, T tokens, C channels
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Protocol

import torch
from modelopt.torch.prune.importance_hooks import L2NormHook
from torch import Tensor, nn

from stillroom.models.shape import ModelShape
from stillroom.prune.importance.names import Wanted
from stillroom.prune.importance.observers import Observers, Results, input_of, output_of
from stillroom.prune.importance.points import Points
from stillroom.prune.importance.scores import WidthScores

Side = Literal["input", "output"]


class Statistic(Protocol):
    """A score of each channel, added up batch by batch."""

    def add(self, values_BTC: Tensor) -> None: ...

    def result(self) -> Tensor: ...


class Minitron:
    """Mean |activation| over each sequence, L2 over sequences."""

    def __init__(self) -> None:
        self.hook = L2NormHook()

    def add(self, values_BTC: Tensor) -> None:
        self.hook(nn.Identity(), (values_BTC.transpose(0, 1),), values_BTC)

    def result(self) -> Tensor:
        scores: Tensor = self.hook.accumulate()
        return scores.double().cpu()


class _TokenMean:
    """Mean over all tokens of a function of the activation."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        self.function = function
        self.total: Tensor | None = None
        self.num_tokens = 0

    def add(self, values_BTC: Tensor) -> None:
        batch = self.function(values_BTC.float()).flatten(0, -2).sum(0, dtype=torch.float64)
        self.total = batch if self.total is None else self.total + batch
        self.num_tokens += values_BTC[..., 0].numel()

    def result(self) -> Tensor:
        assert self.total is not None
        return (self.total / self.num_tokens).cpu()


class MeanAbs(_TokenMean):
    """Mean |activation|."""

    def __init__(self) -> None:
        super().__init__(torch.abs)


class L2(_TokenMean):
    """Root mean square."""

    def __init__(self) -> None:
        super().__init__(torch.square)

    def result(self) -> Tensor:
        return super().result().sqrt()


class _Watch:
    """A statistic of what goes into a module, or of what comes out."""

    def __init__(self, statistic: Statistic, side: Side) -> None:
        self.statistic, self.side = statistic, side

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self.statistic.add(input_of(args, kwargs) if self.side == "input" else output_of(output))

    def result(self) -> Tensor:
        return self.statistic.result()


Magnitude = Literal["minitron", "mean_abs", "l2"]

STATISTICS: dict[Magnitude, type[Minitron | MeanAbs | L2]] = {"minitron": Minitron, "mean_abs": MeanAbs, "l2": L2}


def observers(metric: Magnitude, points: Points, wanted: frozenset[Wanted]) -> Observers:
    """Observers of every channel that is wanted."""
    statistic = STATISTICS[metric]
    sides: dict[str, tuple[Side, tuple[str, ...]]] = {
        "ffn": ("input", points.ffn),
        "heads": ("input", points.heads),
        "cross_heads": ("input", points.cross_heads),
        "hidden": ("output", points.norms),
    }
    return {
        (metric, what, module): _Watch(statistic(), side)
        for what, (side, modules) in sides.items()
        if (what if what != "cross_heads" else "heads") in wanted
        for module in modules
    }


def tables(metric: Magnitude, shape: ModelShape, results: Results) -> WidthScores:
    """The tables of what was observed."""
    stacks: dict[str, list[Tensor]] = {}
    for (measured, what, _), result in results.items():
        if measured == metric:
            stacks.setdefault(what, []).append(result)
    channels = {what: torch.stack(parts) for what, parts in stacks.items()}
    return WidthScores(
        ffn=channels.get("ffn"),
        heads=_grouped(channels.get("heads"), shape.num_attention_heads),
        kv_groups=_grouped(channels.get("heads"), shape.num_key_value_heads),
        cross_heads=_grouped(channels.get("cross_heads"), shape.num_attention_heads),
        hidden=channels["hidden"].sum(0) if "hidden" in channels else None,
    )


def _grouped(channels_LC: Tensor | None, num_groups: int) -> Tensor | None:
    """L2 over the channels of each group, (layers, groups)."""
    return None if channels_LC is None else channels_LC.reshape(len(channels_LC), num_groups, -1).norm(dim=-1)
