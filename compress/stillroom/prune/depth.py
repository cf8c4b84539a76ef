"""Which layers stay: those that change the residual stream most.

Block influence is ShortGPT's (arXiv 2403.03853, section 3): a layer whose output points where its input pointed adds
little, and is cut first. All are ranked from one pass over the whole model, not again after each cut.
"""

from __future__ import annotations

from collections.abc import Sequence

from stillroom.prune.width import strongest


def keep_layers(block_influence: Sequence[float], num_layers: int) -> tuple[int, ...]:
    """The `num_layers` layers with the highest influence, ascending; of equal ones the lower stays."""
    return strongest(block_influence, num_layers)
