"""What importance is: tables of scores on the CPU, where higher matters more. What was not asked for is None.

Layers of an encoder-decoder are counted through, the decoder's after the encoder's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

from torch import Tensor

from stillroom.prune.importance.names import DepthMethod, Wanted


@dataclass(frozen=True, kw_only=True)
class WidthScores:
    """One method's scores of channels, heads and experts."""

    ffn: Tensor | None = None
    """(layers, FFN channels)."""
    heads: Tensor | None = None
    """(layers, query heads)."""
    kv_groups: Tensor | None = None
    """(layers, KV groups)."""
    cross_heads: Tensor | None = None
    """(decoder layers, heads) of the attention to the encoder."""
    hidden: Tensor | None = None
    """(hidden,)."""
    experts: Tensor | None = None
    """(layers, experts)."""
    expert_ffn: Tensor | None = None
    """(layers, experts, channels of an expert)."""

    def only(self, wanted: frozenset[Wanted]) -> WidthScores:
        """The tables that are wanted; KV groups and cross-attention come with heads."""
        with_heads = {"kv_groups", "cross_heads"} if "heads" in wanted else set()
        return WidthScores(**{name: table for name, table in self.tables().items() if name in wanted | with_heads})

    def tables(self) -> dict[str, Tensor]:
        """The tables that there are, by field."""
        found = {f.name: getattr(self, f.name) for f in dataclasses.fields(WidthScores)}
        return {name: table for name, table in found.items() if table is not None}

    def joined(self, other: WidthScores) -> WidthScores:
        """The tables of both."""
        return WidthScores(**(self.tables() | other.tables()))


@dataclass(frozen=True, kw_only=True)
class Importance(WidthScores):
    """Scores by one width method and any number of depth methods."""

    num_windows: int
    num_tokens: int
    layers: dict[DepthMethod, Tensor] = field(default_factory=dict)
    """By each depth method asked for: (layers,), but for `angular`, which is (layers + 1, layers + 1): at [l, m] the
    angular distance, 0 to 1, between the inputs of layers l < m, and zero elsewhere."""
    norm_shares: dict[str, Tensor] = field(default_factory=dict)
    """By norm over hidden channels, or over heads: each channel's mean share of the sum of squares in its divisor."""
    norm_means: dict[str, Tensor] = field(default_factory=dict)
    """By layer norm over hidden channels: each channel's mean after normalizing, before scale and bias."""

    def together(self, other: Importance) -> Importance:
        """The scores of both, those of `other` where both have some."""
        return Importance(
            num_windows=self.num_windows,
            num_tokens=self.num_tokens,
            layers=self.layers | other.layers,
            norm_shares=self.norm_shares | other.norm_shares,
            norm_means=self.norm_means | other.norm_means,
            **(self.tables() | other.tables()),
        )

    @property
    def block_influence(self) -> Tensor | None:
        """(layers,), 0 to 2."""
        return self.layers.get("block_influence")

    @property
    def angular(self) -> Tensor | None:
        """(layers + 1, layers + 1)."""
        return self.layers.get("angular")
