"""Block influence: how much a layer turns the residual stream, 1 - cosine(layer in, layer out), mean over tokens.

ShortGPT, arXiv 2403.03853, section 3. It looks at one layer at a time: two layers that each do little may together do
much, which is why the depth search does not stop here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stillroom.prune.importance.observers import Observers, Results, input_of, output_of

METRIC = "block_influence"


class BlockInfluence:
    """Of one layer: a score from 0 to 2."""

    def __init__(self) -> None:
        self.total: Tensor = torch.zeros((), dtype=torch.float64)
        self.num_tokens = 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before_BTD, after_BTD = input_of(args, kwargs), output_of(output)
        cosine_BT = torch.cosine_similarity(before_BTD.float(), after_BTD.float(), dim=-1)
        self.total = self.total.to(cosine_BT.device) + (1 - cosine_BT.double()).sum()
        self.num_tokens += cosine_BT.numel()

    def result(self) -> Tensor:
        return self.total.cpu() / self.num_tokens


def observers(layers: Sequence[str]) -> Observers:
    """Observers of these layers."""
    return {(METRIC, "layers", layer): BlockInfluence() for layer in layers}


def scores(results: Results) -> Tensor:
    """(layers,)."""
    return torch.stack([result for (metric, _, _), result in results.items() if metric == METRIC])
