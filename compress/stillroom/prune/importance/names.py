"""The names of the ways to score, for recipes and plans; nothing here imports torch.

`methods.py` maps each name to what computes it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from stillroom.errors import InputError

Wanted = Literal["layers", "ffn", "heads", "hidden", "experts", "expert_ffn"]
"""What there is to choose among; `heads` brings KV groups and the heads of cross-attention with it."""

WidthMethod = Literal["minitron", "mean_abs", "l2", "contribution", "magnitude", "taylor", "random", "reversed"]
"""How channels, heads and experts are scored."""

DepthMethod = Literal["block_influence", "angular", "magnitude", "taylor", "random", "reversed"]
"""How layers are scored."""


def check_method(method: WidthMethod, wanted: Iterable[Wanted]) -> None:
    """Raise InputError where a method cannot score what is wanted."""
    inside = sorted({"experts", "expert_ffn"} & set(wanted))
    if method == "taylor" and inside:
        raise InputError(
            f"width_importance: taylor cannot score {' and '.join(inside)}: the gradients inside a module of experts "
            "are out of reach; use minitron, mean_abs, l2, contribution or magnitude"
        )
