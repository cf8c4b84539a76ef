"""Which repairs a model and a cut allow; no torch, so that a plan can say it."""

from __future__ import annotations

from stillroom.errors import InputError
from stillroom.models.family import Family
from stillroom.models.shape import ModelShape
from stillroom.recipe import Repair, RepairKind


def repair_kinds(repair: Repair, shape: ModelShape, target: ModelShape) -> frozenset[RepairKind]:
    """What `repair` asks for. Raises InputError where it names what cannot be done, and why."""
    reasons = {kind: forbidden(kind, shape, target) for kind in ("fold", "reconstruct", "refit", "readout")}
    if repair.kinds == "auto":
        return frozenset(kind for kind, reason in reasons.items() if reason is None)  # type: ignore[misc]
    for kind in repair.kinds:
        if (reason := reasons[kind]) is not None:
            allowed = [name for name, why in reasons.items() if why is None]
            raise InputError(f"repair {kind}: {reason}; possible here: {', '.join(allowed) or 'none, so give []'}")
    return frozenset(repair.kinds)


def forbidden(kind: str, shape: ModelShape, target: ModelShape) -> str | None:
    """Why this cannot be done, or None."""
    family = shape.family
    if family.task != "causal_lm":
        return f"repair runs decoders layer by layer, and {family.model_type} is none"
    if kind in ("fold", "reconstruct", "refit") and not family.writes_residual_directly:
        return (
            f"in {family.model_type} a norm stands between attention or FFN and the residual stream, and no linear map "
            "passes through it"
        )
    if kind in ("fold", "readout") and family.experts is not None:
        return f"the FFN of {family.model_type} is many experts, not one module"
    narrowed = is_narrowed(shape, target)
    if kind == "fold" and target.num_layers == shape.num_layers:
        return "no layer is cut, so there is nothing to stand for"
    if kind == "reconstruct" and not narrowed:
        return "no FFN channel or head is cut, so nothing is to be reconstructed"
    if kind == "refit" and narrowed:
        return "FFN channels or heads are cut in every layer, which is what `reconstruct` is for"
    if kind == "readout" and target.hidden_size == shape.hidden_size:
        return "no hidden channel is cut"
    return None


def is_narrowed(shape: ModelShape, target: ModelShape) -> bool:
    """Whether layers lose FFN channels or heads."""
    sizes = ("intermediate_size", "num_attention_heads", "num_key_value_heads")
    return any(getattr(target, size) < getattr(shape, size) for size in sizes)


def has_ffn_output(family: Family) -> bool:
    """Whether a layer's FFN ends in one linear module."""
    return "{expert}" not in family.ffn_output
