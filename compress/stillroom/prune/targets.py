"""What a Prune config makes of a model's shape, before anything is measured or cut: sizes, parameters, config.json.

The plan and the stage both ask here, so what the plan promises is what the stage does. Nothing imports torch.

The result stays homogeneous: every layer has as many FFN channels, KV groups and query heads in each group as any
other, because that is what stock engines load. `head_dim` never changes and is always written, since hidden_size
divided by the heads is wrong once either has been cut. Fields with one entry a layer lose the entries of the layers
that go.
"""

from __future__ import annotations

import bisect
import dataclasses
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from stillroom.errors import InputError
from stillroom.models.shape import ModelShape
from stillroom.recipe import Prune


def target_shape(config: Prune, shape: ModelShape, keep_layers: Sequence[int] | None = None) -> ModelShape:
    """The shape that `config` cuts `shape` to, with the rewritten config.json as its `config`.

    `keep_layers` are the layers that importance chose; until they are known, a config that gives only their number is
    planned as if the first ones stayed, which changes neither a size nor a count. Raises InputError for sizes that the
    model cannot be cut to, or that no engine would load.
    """
    if config.target_params is not None:
        wanted = _for_target(config, config.target_params, shape)
    else:
        wanted = _for_sizes(config, shape)
        check_sizes(shape, wanted)
    if config.drop_layers is not None:
        keep_layers = [i for i in range(shape.num_layers) if i not in config.drop_layers]
    elif keep_layers is None:
        keep_layers = range(wanted.num_layers)
    assert len(keep_layers) == wanted.num_layers, (keep_layers, wanted.num_layers)
    return with_config(shape, wanted, keep_layers)


def with_config(shape: ModelShape, wanted: ModelShape, keep_layers: Sequence[int]) -> ModelShape:
    """`wanted` with the config.json of `shape` rewritten to its sizes and to `keep_layers`.

    Raises InputError when a per-layer field of the config does not have one entry for each layer.
    """
    config: dict[str, Any] = {
        **shape.config,
        "num_hidden_layers": wanted.num_layers,
        "hidden_size": wanted.hidden_size,
        "intermediate_size": wanted.intermediate_size,
        "num_attention_heads": wanted.num_attention_heads,
        "num_key_value_heads": wanted.num_key_value_heads,
        "head_dim": wanted.head_dim,
    }
    for field in shape.family.per_layer_lists:
        if config.get(field) is None:
            continue
        if len(config[field]) != shape.num_layers:
            raise InputError(
                f"config.json: {field} has {len(config[field])} entries for {shape.num_layers} layers; correct it"
            )
        config[field] = [config[field][layer] for layer in keep_layers]
    for field in shape.family.layer_clamps:
        if config.get(field) is not None:  # these count layers from the bottom, so what counts is what stays of those
            config[field] = sum(layer < config[field] for layer in keep_layers)
    return dataclasses.replace(wanted, config=config)


def _for_sizes(config: Prune, shape: ModelShape) -> ModelShape:
    """The sizes as given; without num_attention_heads each KV group keeps all its query heads."""
    kv_heads = config.num_key_value_heads or shape.num_key_value_heads
    return dataclasses.replace(
        shape,
        num_layers=_num_layers(config, shape),
        hidden_size=config.hidden_size or shape.hidden_size,
        intermediate_size=config.intermediate_size or shape.intermediate_size,
        num_attention_heads=config.num_attention_heads or kv_heads * _group_size(shape),
        num_key_value_heads=kv_heads,
    )


def _num_layers(config: Prune, shape: ModelShape) -> int:
    if config.drop_layers is not None:
        beyond = [layer for layer in config.drop_layers if not 0 <= layer < shape.num_layers]
        if beyond:
            raise InputError(f"drop_layers names layer {beyond[0]}; the model has layers 0 to {shape.num_layers - 1}")
        if len(config.drop_layers) == shape.num_layers:
            raise InputError(f"drop_layers names all {shape.num_layers} layers; leave at least one out of the list")
        return shape.num_layers - len(config.drop_layers)
    return config.num_layers or shape.num_layers


def check_sizes(shape: ModelShape, wanted: ModelShape) -> None:
    """Raise InputError for sizes that `shape` cannot be cut to, or that engines or transformers would refuse."""
    for field in ("num_layers", "hidden_size", "intermediate_size", "num_key_value_heads", "num_attention_heads"):
        given, own = getattr(wanted, field), getattr(shape, field)
        if given > own:
            raise InputError(f"{field} {given} is above the model's {own}; pruning only cuts: give 1 to {own}")
    for field in ("hidden_size", "intermediate_size"):
        given = getattr(wanted, field)
        if given % 2 and given != getattr(shape, field):
            raise InputError(
                f"{field} {given} is odd, which engines' kernels do not take; use {given - 1 or 2} or {given + 1}, "
                "or better a multiple of 128"
            )
    _check_groups(shape, wanted)
    if (wanted.hidden_size, wanted.num_attention_heads) != (shape.hidden_size, shape.num_attention_heads):
        _check_hidden_beside_heads(wanted)


def _check_groups(shape: ModelShape, wanted: ModelShape) -> None:
    """Each kept KV group keeps the same number of query heads, and no more than it has."""
    heads, groups = wanted.num_attention_heads, wanted.num_key_value_heads
    allowed = [groups * each for each in range(1, _group_size(shape) + 1)]
    if heads not in allowed:
        raise InputError(
            f"num_attention_heads {heads} with {groups} KV groups: each group keeps the same number of its "
            f"{_group_size(shape)} query heads; use one of {allowed}, or another num_key_value_heads"
        )


def _check_hidden_beside_heads(wanted: ModelShape) -> None:
    family, hidden, heads = wanted.family, wanted.hidden_size, wanted.num_attention_heads
    if not family.head_dim_free and hidden != heads * wanted.head_dim:
        raise InputError(
            f"hidden_size {hidden} with num_attention_heads {heads}: engines compute the head size of "
            f"{family.model_type} as hidden_size / num_attention_heads, and it must stay {wanted.head_dim}; use "
            f"hidden_size {heads * wanted.head_dim} with these heads, or cut both so that hidden_size = "
            f"{wanted.head_dim} x num_attention_heads"
        )
    if family.heads_divide_hidden and hidden % heads:
        step = math.lcm(heads, 2)
        below = hidden // step * step
        nearest = f"{below} or {below + step}" if below else f"{step}"
        raise InputError(
            f"hidden_size {hidden} with num_attention_heads {heads}: transformers opens {family.model_type} only where "
            f"the heads divide hidden_size; use hidden_size {nearest}, or other heads"
        )


def _group_size(shape: ModelShape) -> int:
    """Query heads in a KV group."""
    return shape.num_attention_heads // shape.num_key_value_heads


def _for_target(config: Prune, target: int, shape: ModelShape) -> ModelShape:
    """The largest shape of at most `target` parameters along `config.shrink`. Raises InputError where there is none."""
    if target > shape.num_params:
        raise InputError(
            f"target_params {target} is above the model's {shape.num_params}; pruning only cuts: give less"
        )
    if config.shrink == "depth":
        candidates = [dataclasses.replace(shape, num_layers=n) for n in range(1, shape.num_layers + 1)]
    else:
        candidates = _narrower(shape, config.multiple_of)
    fitting = bisect.bisect_right(candidates, target, key=lambda candidate: candidate.num_params)
    if fitting == 0:
        least = candidates[0]
        raise InputError(
            f"target_params {target} cannot be reached by shrink: {config.shrink}; the least is {least.num_params} "
            f"(num_layers {least.num_layers}, hidden_size {least.hidden_size}, intermediate_size "
            f"{least.intermediate_size}). Give at least that, or sizes that cut both depth and width"
        )
    return candidates[fitting - 1]


def _narrower(shape: ModelShape, multiple_of: int) -> list[ModelShape]:
    """Shapes with hidden and FFN channels scaled alike and rounded down to multiples, from small to large.

    The scales are those at which one of the two reaches its next multiple. Raises InputError where one has none.
    """
    if not shape.family.head_dim_free:
        raise InputError(
            f"shrink: width would cut hidden_size {shape.hidden_size} and leave the heads, but engines compute the "
            f"head size of {shape.family.model_type} as hidden_size / num_attention_heads; use shrink: depth, or give "
            "hidden_size and num_attention_heads, or intermediate_size"
        )
    heads = shape.num_attention_heads if shape.family.heads_divide_hidden else 1
    steps = {"hidden_size": math.lcm(multiple_of, heads), "intermediate_size": multiple_of}
    for field, step in steps.items():
        if step > getattr(shape, field):
            because = f" (transformers also wants a multiple of the {heads} heads)" if step != multiple_of else ""
            raise InputError(
                f"multiple_of {multiple_of} leaves nothing of {field} {getattr(shape, field)}: its least multiple is "
                f"{step}{because}; give a smaller multiple_of, or sizes"
            )
    scales = {
        Fraction(count * step, getattr(shape, field))
        for field, step in steps.items()
        for count in range(1, getattr(shape, field) // step + 1)
    }
    narrower = [
        dataclasses.replace(
            shape,
            hidden_size=_rounded_down(scale * shape.hidden_size, steps["hidden_size"]),
            intermediate_size=_rounded_down(scale * shape.intermediate_size, steps["intermediate_size"]),
        )
        for scale in sorted(scales)
    ]
    return [candidate for candidate in narrower if candidate.hidden_size and candidate.intermediate_size]


def _rounded_down(size: Fraction, step: int) -> int:
    """The largest multiple of `step` that is at most `size`."""
    return int(size // step) * step
