"""Where a model of a family is observed: module names, spelled out layer by layer. Nothing here imports torch.

Layers are counted through: a decoder's after its encoder's.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from stillroom.models.family import EXPERT, LAYER
from stillroom.models.shape import ModelShape


@dataclass(frozen=True)
class Points:
    """Module names, in the order of layers."""

    layers: tuple[str, ...]
    num_first: int
    """How many of them are the first stack's."""
    ffn: tuple[str, ...]
    """Modules whose input is the FFN channels; none where layers have experts."""
    heads: tuple[str, ...]
    """Modules whose input is the concatenated heads of self-attention."""
    cross_heads: tuple[str, ...]
    """The same of a decoder's attention to its encoder."""
    experts: tuple[str, ...]
    """Modules that hold a layer's experts."""
    norms: tuple[str, ...]
    """Norms over the hidden channels."""
    head_norms: tuple[str, ...]
    """Norms over all heads of query or key at once."""

    @property
    def stacks(self) -> tuple[tuple[str, ...], ...]:
        """The layers of each stack."""
        return tuple(stack for stack in (self.layers[: self.num_first], self.layers[self.num_first :]) if stack)


def points_of(shape: ModelShape) -> Points:
    """The points of a model of this shape."""
    family, decoder = shape.family, shape.family.decoder

    def named(patterns: Iterable[str]) -> tuple[str, ...]:
        return tuple(name for pattern in patterns for name in _spelled(shape, pattern))

    ffn = [] if EXPERT in family.ffn_output else [family.ffn_output]

    return Points(
        layers=shape.layer_names(),
        num_first=shape.num_layers,
        ffn=named(ffn + ([decoder.ffn_output] if decoder else [])),
        heads=named([family.attention_output] + ([decoder.attention_output] if decoder else [])),
        cross_heads=named([decoder.cross_attention_output] if decoder else []),
        experts=named([family.experts] if family.experts else []),
        norms=named(family.hidden_norms),
        head_norms=named(family.head_norms),
    )


def _spelled(shape: ModelShape, pattern: str) -> tuple[str, ...]:
    """A name once for each layer of its stack, or once where it names no layer."""
    return tuple(shape.spelled_out(pattern).values()) if LAYER in pattern else (pattern,)
