"""Weight magnitude: the sum of |w| over all weights that would go with a channel, a head or a layer. No text is needed.

Li et al., "Pruning Filters for Efficient ConvNets", arXiv 1608.08710, section 3, for channels; the baseline `Mag` of
Shortened LLaMA, arXiv 2402.02834, section 3, for layers. Which weights go with what follows from the family's axes,
so fused, transposed and biased projections need no care. Biases and norms are left out: beside the matrices they are
few, and a norm's scale is near one whatever it scales. An expert has the weights of its channels.

It reads a checkpoint's tensors by their names, one at a time, from a model or from files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from stillroom.errors import InputError
from stillroom.models.family import Axis, Family, axis_parts
from stillroom.models.shape import ModelShape, Place
from stillroom.models.tensors import read_tensor
from stillroom.models.weights import family_entries
from stillroom.prune.importance.scores import WidthScores

Read = Callable[[str], Tensor]
"""A tensor of the checkpoint by its name."""


@dataclass(frozen=True)
class Magnitudes:
    """Sums of |w|, float64 on the CPU."""

    layers: Tensor
    """(layers,)."""
    width: WidthScores


def magnitudes(shape: ModelShape, read: Read) -> Magnitudes:
    """All sums, from one reading of every matrix; a KV group has those of its query heads and of its keys and values.

    Raises InputError naming the first tensor that holds NaN or infinities.
    """
    layers = torch.zeros(shape.total_layers, dtype=torch.float64)
    sums = _Sums(shape)
    for name, place in shape.places.items():
        axes = shape.axes(name)
        if len(axes) < 2 or place.pattern in shape.family.optional:
            continue
        weight = read(name).detach().abs()
        total = weight.sum(dtype=torch.float64).item()
        if not math.isfinite(total):
            raise InputError(f"{name} holds NaN or infinite weights: the checkpoint is damaged; fetch it again")
        if place.layer is not None:
            layers[place.layer] += total
        for dim, axis in enumerate(axes):
            others = [other for other in range(weight.ndim) if other != dim]
            sums.add(axis, place, weight.sum(others, dtype=torch.float64).cpu())
    return Magnitudes(layers, sums.width())


class _Sums:
    """Sums along each plain axis, by layer and expert."""

    def __init__(self, shape: ModelShape) -> None:
        self.shape = shape
        self.found: dict[tuple[str, int | None, int | None], Tensor] = {}

    def add(self, axis: Axis, place: Place, sums: Tensor) -> None:
        """Those of one tensor along an axis, which may join several."""
        parts = axis_parts(axis)
        for part, piece in zip(parts, torch.split(sums, [self.shape.axis_size(part) for part in parts]), strict=True):
            key = (part, None, None) if part == "hidden" else (part, place.layer, place.expert)
            self.found[key] = self.found[key] + piece if key in self.found else piece

    def width(self) -> WidthScores:
        shape = self.shape
        heads, cross_heads = (self._by_head(axis, shape.num_attention_heads) for axis in ("query", "cross_query"))
        keys_and_values = self._by_head("key_value", shape.num_key_value_heads)
        assert heads is not None
        assert keys_and_values is not None
        channels = self._expert_channels()
        return WidthScores(
            ffn=self._stacked("ffn"),
            heads=heads,
            kv_groups=heads.reshape(len(heads), shape.num_key_value_heads, -1).sum(-1) + keys_and_values,
            cross_heads=cross_heads,
            hidden=self.found["hidden", None, None],
            experts=None if channels is None else channels.sum(-1),
            expert_ffn=channels,
        )

    def _stacked(self, axis: str) -> Tensor | None:
        """(layers that have the axis, channels)."""
        found = sorted((layer, sums) for (a, layer, _), sums in self.found.items() if a == axis and layer is not None)
        return torch.stack([sums for _, sums in found]) if found else None

    def _by_head(self, axis: str, num_heads: int) -> Tensor | None:
        stacked = self._stacked(axis)
        return None if stacked is None else stacked.reshape(len(stacked), num_heads, -1).sum(-1)

    def _expert_channels(self) -> Tensor | None:
        """(layers, experts, channels); each weight of an expert belongs to one of its channels."""
        shape = self.shape
        found = [sums for (axis, _, _), sums in self.found.items() if axis == "expert_ffn"]
        return torch.stack(found).reshape(shape.num_layers, shape.num_experts, -1) if found else None


def reader_of(model: PreTrainedModel) -> Read:
    """The tensors of a model in memory under the names of its checkpoint."""
    tensors = revert_weight_conversion(model, model.state_dict())
    return lambda name: tensors[name]


def reader_of_files(model_dir: Path, family: Family) -> Read:
    """The tensors of a checkpoint directory, one in memory at a time."""
    entries = family_entries(model_dir, family)
    return lambda name: read_tensor(entries[name])
