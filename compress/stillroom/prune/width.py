"""Which channels, heads and KV groups stay, from their scores: pure functions, sorted results.

Each layer chooses for itself (only the hidden channels are the model's), but always the same number, and the same
number of query heads in each KV group that stays. Of equal scores the lower index stays, so a result can be repeated.
"""

from __future__ import annotations

from collections.abc import Sequence


def strongest(scores: Sequence[float], count: int) -> tuple[int, ...]:
    """Indices of the `count` highest scores, ascending; of equal scores the lower index stays."""
    assert 0 < count <= len(scores)
    return tuple(sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:count]))


def keep_heads(
    head_scores: Sequence[float], kv_groups: Sequence[int], *, num_kv_groups: int, heads_per_group: int
) -> tuple[int, ...]:
    """The `heads_per_group` strongest query heads of each group in `kv_groups`, as ascending head indices.

    `head_scores` are one layer's, group by group, as query heads lie: heads of group g are g * size to (g + 1) * size.
    """
    size = len(head_scores) // num_kv_groups
    kept: list[int] = []
    for group in sorted(kv_groups):
        first = group * size
        kept += [first + i for i in strongest(head_scores[first : first + size], heads_per_group)]
    return tuple(kept)
