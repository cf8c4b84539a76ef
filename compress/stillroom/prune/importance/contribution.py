"""How much of a module's output each channel or head makes: ModelOpt's contribution hooks.

FFN channels: mean |activation| times the L2 norm of the output weights that read the channel
(`IndependentChannelContributionHook`). Heads and KV groups: the mean over tokens of the L2 norm of what the head, or
the group, adds to the residual stream (`IndependentKvHeadContributionHook`; for heads it is told that each is a group
of its own). Hidden channels: mean |activation| after the norms (`LayerNormContributionHook`), summed over norms: the
same as `mean_abs`. In these sums of one-channel terms the parts that cancel between channels are not seen;
`IterativeChannelContributionHook` would, with a pass for each step of its schedule, and is not used.

It is no clear gain over activations alone. SmolLM2-135M-Instruct (dequantized), perplexity by Minitron's scores and by
those times the norms of the output weights, nothing retrained: FFN 1536 -> 1152, 35.3 and 37.3; 3 -> 2 KV groups, 46.1
and 62.5; 3 -> 2 heads in each group, 170 and 99 (4,096 tokens of mixed text, dense 21.8).

The hooks add up means of batches, in which a short last batch would count too much. So they are given windows one by
one, all of one length, and the sum is divided by their number. The hook for heads keeps its module's weights and
holds (tokens, heads, hidden) for a window; it is made anew for each window, so that no layer is kept in memory, and
computes in the model's own dtype.

The hooks know nn.Linear's weights, (out, in). A transposed Conv1D is shown to them as one.

    # B batch, T tokens, C channels, D hidden
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from modelopt.torch.prune.importance_hooks import (
    IndependentChannelContributionHook,
    IndependentKvHeadContributionHook,
    LayerNormContributionHook,
)
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stillroom.models.shape import ModelShape
from stillroom.prune.importance.names import Wanted
from stillroom.prune.importance.observers import Observers, Results, input_of, output_of
from stillroom.prune.importance.points import Points
from stillroom.prune.importance.scores import WidthScores

METRIC = "contribution"


def as_linear(module: nn.Module) -> SimpleNamespace:
    """The module's weight as (out, in), without a copy."""
    weight: Any = module.weight
    weight = weight.detach().T if isinstance(module, Conv1D) else weight.detach()
    return SimpleNamespace(weight=weight, in_features=weight.shape[1])


class _Channels:
    """Of the channels that a linear module reads."""

    def __init__(self) -> None:
        self.hook: Any = None
        self.num_windows = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.hook is None:
            self.hook = IndependentChannelContributionHook(as_linear(module))
        for window_TC in input_of(args, kwargs):
            self.hook(module, (window_TC[None],), output)
            self.num_windows += 1

    def result(self) -> Tensor:
        scores: Tensor = self.hook.accumulate()
        return scores.double() / self.num_windows


class _Groups:
    """Of equal groups of the channels that a linear module reads."""

    def __init__(self, num_groups: int) -> None:
        self.num_groups = num_groups
        self.total = torch.zeros(num_groups, dtype=torch.float64)
        self.num_windows = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        linear = as_linear(module)
        arguments = self._as_heads(linear)
        for window_TC in input_of(args, kwargs):
            hook = IndependentKvHeadContributionHook(linear, arguments)
            hook(module, (window_TC[None].contiguous(),), output)
            self.total += hook.accumulate().double().cpu()
            self.num_windows += 1

    def result(self) -> Tensor:
        return self.total / self.num_windows

    def _as_heads(self, linear: SimpleNamespace) -> dict[str, Any]:
        """The groups as the hook wants to hear of them."""
        config = SimpleNamespace(
            hidden_size=linear.weight.shape[0],
            num_attention_heads=self.num_groups,
            head_dim=linear.in_features // self.num_groups,
        )
        attention = SimpleNamespace(num_key_value_heads=self.num_groups)
        return {"model": SimpleNamespace(config=config), "block_config": SimpleNamespace(attention=attention)}


class _Hidden:
    """Of the channels that a norm gives."""

    def __init__(self) -> None:
        self.hook: Any = None
        self.num_windows = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if self.hook is None:
            self.hook = LayerNormContributionHook(module, {})
        for window_TD in output_of(output):
            self.hook(module, args, window_TD[None])
            self.num_windows += 1

    def result(self) -> Tensor:
        scores: Tensor = self.hook.accumulate()
        return scores.double().cpu() / self.num_windows


def observers(shape: ModelShape, points: Points, wanted: frozenset[Wanted]) -> Observers:
    """Observers of every channel that is wanted."""
    found: Observers = {}
    if "heads" in wanted:
        found |= {(METRIC, "heads", module): _Groups(shape.num_attention_heads) for module in points.heads}
        found |= {(METRIC, "kv_groups", module): _Groups(shape.num_key_value_heads) for module in points.heads}
        found |= {(METRIC, "cross_heads", module): _Groups(shape.num_attention_heads) for module in points.cross_heads}
    if "ffn" in wanted:
        found |= {(METRIC, "ffn", module): _Channels() for module in points.ffn}
    if "hidden" in wanted:
        found |= {(METRIC, "hidden", module): _Hidden() for module in points.norms}
    return found


def tables(results: Results) -> WidthScores:
    """The tables of what was observed."""
    stacks: dict[str, list[Tensor]] = {}
    for (metric, what, _), result in results.items():
        if metric == METRIC:
            stacks.setdefault(what, []).append(result)
    stacked = {what: torch.stack(parts) for what, parts in stacks.items()}
    return WidthScores(
        ffn=stacked.get("ffn"),
        heads=stacked.get("heads"),
        kv_groups=stacked.get("kv_groups"),
        cross_heads=stacked.get("cross_heads"),
        hidden=stacked["hidden"].sum(0) if "hidden" in stacked else None,
    )
