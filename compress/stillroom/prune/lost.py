"""What share of the measured importance a cut takes, and which units it leaves: what explain.py tells a reader later.

The share of one axis in one layer is 1 - (scores of what stays) / (scores of all), by the method that chose; for scores
of controls that run the other way (`reversed`) it is the same share of those. Scores are no losses: they say what was
cheap to cut beside the rest of the layer, not what it cost; that is the KL.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from stillroom.models.shape import ModelShape
from stillroom.prune.cut import Cut
from stillroom.prune.importance.scores import Importance

AXES = {
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_groups": "num_key_value_heads",
    "cross_heads": "num_attention_heads",
    "experts": "num_experts",
    "expert_ffn": "moe_intermediate_size",
}
"""What each layer chooses for itself, and how many it has."""
UNITS = ("heads", "kv_groups", "cross_heads", "experts")
"""Axes of which a reader wants to know the units that stay; channels are too many."""


def what_went(scores: Importance | None, shape: ModelShape, cut: Cut) -> dict[str, Any]:
    """For the manifest: `importance_lost`, a share for each layer that stays, by axis (None where the layer has no such
    axis); `hidden_importance_lost`, the same of the hidden channels, which are the whole model's; `kept_units`, the
    heads, KV groups and experts of each layer that stays. Axes that are not cut are left out."""
    found = scores.tables() if scores else {}
    lost = {
        axis: [_share_of_layer(axis, found[axis], shape, cut, layer) for layer in cut.layers]
        for axis in AXES
        if axis in found and _is_cut(axis, shape, cut)
    }
    units = {axis: getattr(cut, axis) for axis in UNITS if _is_cut(axis, shape, cut)}
    return {
        "importance_lost": lost,
        "hidden_importance_lost": _share(found["hidden"], cut.hidden) if "hidden" in found and cut.hidden else None,
        "kept_units": {axis: [list(kept.get(layer, ())) for layer in cut.layers] for axis, kept in units.items()},
    }


def _is_cut(axis: str, shape: ModelShape, cut: Cut) -> bool:
    kept: Any = getattr(cut, axis)
    if not kept:
        return False
    first = next(iter(kept.values()))
    number: int = getattr(shape, AXES[axis])
    return len(next(iter(first.values())) if axis == "expert_ffn" else first) < number


def _share_of_layer(axis: str, table: Tensor, shape: ModelShape, cut: Cut, layer: int) -> float | None:
    if axis == "expert_ffn":
        assert cut.expert_ffn is not None
        experts = range(shape.num_experts) if cut.experts is None else cut.experts[layer]
        kept = [table[layer, expert][list(cut.expert_ffn[layer][expert])].sum().item() for expert in experts]
        return _lost(sum(kept), table[layer][list(experts)].sum().item())
    stays = getattr(cut, axis)
    row = layer - shape.num_layers if axis == "cross_heads" else layer
    return _share(table[row], stays[layer]) if layer in stays else None


def _share(scores: Tensor, kept: Sequence[int]) -> float:
    return _lost(scores[list(kept)].double().sum().item(), scores.double().sum().item())


def _lost(kept: float, total: float) -> float:
    """Where nothing scores anything, nothing is lost."""
    return round(1 - kept / total, 6) if total else 0.0
