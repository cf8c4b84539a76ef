"""Controls that any method must beat: scores by lot, and a method's own scores upside down."""

from __future__ import annotations

import torch
from torch import Tensor

from stillroom.models.shape import ModelShape
from stillroom.prune.importance.names import Wanted
from stillroom.prune.importance.scores import WidthScores


def random_layers(shape: ModelShape, seed: int) -> Tensor:
    """(layers,), 0 to 1; the same for the same seed."""
    return torch.rand(shape.total_layers, generator=_generator(seed), dtype=torch.float64)


def random_width(shape: ModelShape, wanted: frozenset[Wanted], seed: int) -> WidthScores:
    """Scores from 0 to 1; those of one axis do not depend on what else is wanted."""
    layers, heads = shape.total_layers, shape.num_attention_heads
    sizes = {
        "ffn": (layers, shape.intermediate_size),
        "heads": (layers, heads),
        "kv_groups": (layers, shape.num_key_value_heads),
        "hidden": (shape.hidden_size,),
        "cross_heads": (shape.num_decoder_layers, heads),
        "experts": (layers, shape.num_experts),
        "expert_ffn": (layers, shape.num_experts, shape.moe_intermediate_size),
    }
    generator = _generator(seed)
    tables = {name: torch.rand(*size, generator=generator, dtype=torch.float64) for name, size in sizes.items()}
    return WidthScores(**{name: table for name, table in tables.items() if table.numel()}).only(wanted)


def reversed_width(scores: WidthScores) -> WidthScores:
    """What mattered most now matters least."""
    return WidthScores(**{name: -table for name, table in scores.tables().items()})


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
