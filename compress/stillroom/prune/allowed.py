"""What a Prune config may ask of a model, known from its config.json, so that a plan can ask. No torch.

Searching layers, searching a target and repairing run decoders layer by layer and compare distributions of next tokens,
so encoders and encoder-decoders are cut by scores of their activations or weights alone.
"""

from __future__ import annotations

from stillroom.errors import InputError
from stillroom.models.shape import ModelShape
from stillroom.prune.importance.names import Wanted, check_method
from stillroom.prune.repair.kinds import repair_kinds
from stillroom.prune.targets import target_shape
from stillroom.recipe import Prune

SEARCHES = ("search", "greedy", "evolutionary", "leave_one_out_kl", "leave_one_out_loss")
"""Ways to choose layers that ask the cut model itself."""

WIDTHS: dict[Wanted, str] = {
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "hidden": "hidden_size",
    "experts": "num_experts",
    "expert_ffn": "moe_intermediate_size",
}
"""The size that each width is of."""


def check_prune(config: Prune, shape: ModelShape) -> None:
    """Raise InputError for what this family, these sizes or this many positions do not allow, with the reason."""
    if shape.family.task != "causal_lm":
        _check_no_decoder(config, shape.family.model_type)
    if config.target is None:
        target = target_shape(config, shape)
        repair_kinds(config.repair, shape, target)
        check_method(config.width_importance, what_to_score(shape, target))
    if reads_text(config, shape):
        shape.check_length(config.calibration.sequence_length, "calibration.sequence_length")
        if config.calibration.samples < 2:
            raise InputError("calibration.samples 1: pruning needs two windows, one to choose on and one kept apart")


def _check_no_decoder(config: Prune, model_type: str) -> None:
    if config.target is not None:
        raise InputError(
            f"target: candidates are compared by the next tokens that they predict, and {model_type} is no decoder; "
            "give sizes, such as num_layers"
        )
    if config.depth_importance in SEARCHES:
        raise InputError(
            f"depth_importance {config.depth_importance}: that runs decoders layer by layer, and {model_type} is none; "
            "use block_influence, angular, magnitude or taylor"
        )


def reads_text(config: Prune, shape: ModelShape) -> bool:
    """Whether anything is chosen or repaired, which takes windows of calibration text; Megatron-Bridge's script reads
    the text by itself to choose."""
    own = config.backend == "stillroom"
    if config.target is not None:
        return own or config.repair.kinds != ()
    target = target_shape(config, shape)
    layers_go = target.total_layers < shape.total_layers and not config.drop_layers
    chosen = own and (layers_go or bool(what_to_score(shape, target)))
    return chosen or bool(repair_kinds(config.repair, shape, target))


def what_to_score(shape: ModelShape, target: ModelShape) -> frozenset[Wanted]:
    """The widths that there is something to choose in."""
    return frozenset(what for what, size in WIDTHS.items() if getattr(target, size) < getattr(shape, size))
