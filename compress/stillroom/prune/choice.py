"""From scores to what stays of channels, heads and experts; which layers stay is decided before (pruner.py).

Each layer chooses for itself, but always the same number, and the same number of query heads in each KV group that
stays: only so does the model stay of one shape. Hidden channels are the whole model's; heads that share a tensor over a
stack (T5's relative positions) are the stack's.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from torch import Tensor

from stillroom.models.shape import ModelShape
from stillroom.prune.allowed import what_to_score
from stillroom.prune.cut import Cut, PerLayer
from stillroom.prune.importance.scores import Importance
from stillroom.prune.width import keep_heads, strongest


def width_cut(shape: ModelShape, target: ModelShape, layers: Sequence[int], scores: Importance | None) -> Cut:
    """What stays in these layers; an axis that keeps its size is left alone."""
    cut = Cut(tuple(layers))
    wanted = what_to_score(shape, target)
    if not wanted:
        return cut
    assert scores is not None
    if "hidden" in wanted and scores.hidden is not None:
        cut = dataclasses.replace(cut, hidden=strongest(scores.hidden.tolist(), target.hidden_size))
    if "ffn" in wanted and scores.ffn is not None:
        cut = dataclasses.replace(cut, ffn=_each(scores.ffn, layers, target.intermediate_size))
    if "heads" in wanted:
        cut = _with_heads(cut, shape, target, scores)
    if "experts" in wanted and scores.experts is not None:
        cut = dataclasses.replace(cut, experts=_each(scores.experts, layers, target.num_experts))
    if "expert_ffn" in wanted and scores.expert_ffn is not None:
        kept = {
            layer: _each(scores.expert_ffn[layer], range(shape.num_experts), target.moe_intermediate_size)
            for layer in layers
        }
        cut = dataclasses.replace(cut, expert_ffn=kept)
    return cut


def _each(scores: Tensor, rows: Sequence[int], count: int) -> dict[int, tuple[int, ...]]:
    """The strongest `count` of each of these rows."""
    return {row: strongest(scores[row].tolist(), count) for row in rows}


def _with_heads(cut: Cut, shape: ModelShape, target: ModelShape, scores: Importance) -> Cut:
    """KV groups first, then the query heads in each group that stays."""
    assert scores.heads is not None
    heads = _alike_in_stacks(shape, scores.heads) if shape.family.heads_alike_in_stack else scores.heads
    if shape.family.one_key_value_head_a_head:
        kept = _each(heads, cut.layers, target.num_attention_heads)
        return dataclasses.replace(cut, heads=kept, cross_heads=_cross_heads(cut, shape, target, scores))
    assert scores.kv_groups is not None
    groups = _each(scores.kv_groups, cut.layers, target.num_key_value_heads)
    per_group = target.num_attention_heads // target.num_key_value_heads
    kept = {
        layer: keep_heads(
            heads[layer].tolist(), groups[layer], num_kv_groups=shape.num_key_value_heads, heads_per_group=per_group
        )
        for layer in cut.layers
    }
    return dataclasses.replace(cut, heads=kept, kv_groups=groups)


def _alike_in_stacks(shape: ModelShape, heads: Tensor) -> Tensor:
    """Each layer's head scores replaced by the sum over its stack, (layers, heads)."""
    summed = heads.clone()
    for stack in {shape.stack_of(layer) for layer in range(len(heads))}:
        summed[list(stack)] = heads[list(stack)].sum(0)
    return summed


def _cross_heads(cut: Cut, shape: ModelShape, target: ModelShape, scores: Importance) -> PerLayer | None:
    """Heads of the attention to the encoder, by decoder layer."""
    if scores.cross_heads is None:
        return None
    first = shape.num_layers
    rows = [layer - first for layer in cut.layers if layer >= first]
    return {row + first: kept for row, kept in _each(scores.cross_heads, rows, target.num_attention_heads).items()}
