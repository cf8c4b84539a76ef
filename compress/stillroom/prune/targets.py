"""What a Prune config makes of a model's shape, before anything is measured or cut: sizes, parameters, config.json.

The plan and the stage both ask here, so what the plan promises is what the stage does. Nothing imports torch.

The result stays homogeneous: every layer has as many FFN channels, KV groups and query heads in each group as any
other, because that is what stock engines load. `head_dim` never changes and is always written, since hidden_size
divided by the heads is wrong once either has been cut. Fields with one entry a layer lose the entries of the layers
that go. Layers of an encoder-decoder are counted through, the encoder's first.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from stillroom.errors import InputError
from stillroom.models.family import OpensAs, PlainAxis, Size, families
from stillroom.models.shape import ModelShape
from stillroom.recipe import Prune

CUT_AXES: dict[Size, PlainAxis] = {
    "intermediate_size": "ffn",
    "num_experts": "experts",
    "moe_intermediate_size": "expert_ffn",
}
"""Sizes that only some families have, by the axis that they are of."""


def target_shape(config: Prune, shape: ModelShape, keep_layers: Sequence[int] | None = None) -> ModelShape:
    """The shape that `config` cuts `shape` to, with the rewritten config.json as its `config`.

    `keep_layers` are the layers that importance chose; until they are known, a config that gives only their number is
    planned as if the first ones stayed, which changes neither a size nor a count. Raises InputError for sizes that the
    model cannot be cut to, or that no engine would load.
    """
    assert config.target is None, "a target's shape is searched for (prune/search.py)"
    wanted = _for_sizes(config, shape)
    check_sizes(shape, wanted)
    if config.drop_layers is not None:
        keep_layers = [i for i in range(shape.total_layers) if i not in config.drop_layers]
    elif keep_layers is None:
        decoder = range(shape.num_layers, shape.num_layers + wanted.num_decoder_layers)
        keep_layers = [*range(wanted.num_layers), *decoder]
    assert len(keep_layers) == wanted.total_layers, (keep_layers, wanted.total_layers)
    return with_config(shape, wanted, keep_layers)


def with_config(shape: ModelShape, wanted: ModelShape, keep_layers: Sequence[int]) -> ModelShape:
    """`wanted` with the config.json of `shape` rewritten to its sizes and to `keep_layers`; of another family where
    transformers refuses this one's class for the sizes and the description names an equal one.

    Raises InputError when a per-layer field of the config does not have one entry for each layer.
    """
    family = shape.family
    config = dict(shape.config)
    for size in _written_sizes(shape):
        names = family.config_names(size)
        config |= {name: getattr(wanted, size) for name in names if name == names[0] or name in config}
    if _heads_forbid_hidden(wanted) and (opens_as := _opens_otherwise(shape)):
        family = families()[opens_as.family]
        config |= {"model_type": family.model_type, "architectures": [family.architecture]}
        config |= opens_as.config
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
    return dataclasses.replace(wanted, family=family, config=config)


def _written_sizes(shape: ModelShape) -> list[Size]:
    """What the config of such a model says, as far as pruning changes it or other fields no longer tell it."""
    sizes: list[Size] = ["num_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"]
    sizes += ["num_decoder_layers"] if shape.family.decoder else []
    return sizes + [size for size, axis in CUT_AXES.items() if shape.family.has_axis(axis)]


def _for_sizes(config: Prune, shape: ModelShape) -> ModelShape:
    """The sizes as given; without num_attention_heads each KV group keeps all its query heads."""
    family = shape.family
    absent = [size for size, axis in CUT_AXES.items() if not family.has_axis(axis)]
    absent += [] if family.decoder else ["num_decoder_layers"]
    if given := [size for size in absent if getattr(config, size) is not None]:
        raise InputError(
            f"{given[0]} {getattr(config, given[0])}: {family.model_type} models have nothing of that name to cut; "
            f"they have {', '.join(_written_sizes(shape))} (head_dim stays)"
        )
    heads = config.num_attention_heads
    kv_heads = config.num_key_value_heads or shape.num_key_value_heads
    if family.one_key_value_head_a_head:
        kv_heads = config.num_key_value_heads or heads or shape.num_key_value_heads
    num_layers, num_decoder_layers = _num_layers(config, shape)
    return dataclasses.replace(
        shape,
        num_layers=num_layers,
        num_decoder_layers=num_decoder_layers,
        hidden_size=config.hidden_size or shape.hidden_size,
        intermediate_size=config.intermediate_size or shape.intermediate_size,
        num_attention_heads=heads or kv_heads * _group_size(shape),
        num_key_value_heads=kv_heads,
        num_experts=config.num_experts or shape.num_experts,
        moe_intermediate_size=config.moe_intermediate_size or shape.moe_intermediate_size,
    )


def _num_layers(config: Prune, shape: ModelShape) -> tuple[int, int]:
    """Layers that stay, and decoder layers where those are another stack."""
    if config.drop_layers is None:
        return config.num_layers or shape.num_layers, config.num_decoder_layers or shape.num_decoder_layers
    total = shape.total_layers
    if beyond := [layer for layer in config.drop_layers if not 0 <= layer < total]:
        raise InputError(f"drop_layers names layer {beyond[0]}; the model has layers 0 to {total - 1}")
    stay = [layer for layer in range(total) if layer not in config.drop_layers]
    in_encoder = sum(layer < shape.num_layers for layer in stay)
    for stack in {shape.stack_of(0), shape.stack_of(total - 1)}:
        if not set(stack).intersection(stay):
            of = f" of the {'decoder' if stack[0] else 'encoder'}" if shape.family.decoder else ""
            raise InputError(f"drop_layers names all {len(stack)} layers{of}; leave at least one out of the list")
    return in_encoder, len(stay) - in_encoder


def check_sizes(shape: ModelShape, wanted: ModelShape) -> None:
    """Raise InputError for sizes that `shape` cannot be cut to, or that engines or transformers would refuse."""
    for field in (
        "num_layers", "num_decoder_layers", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_experts",
        "num_key_value_heads", "num_attention_heads",
    ):  # fmt: skip
        given, own = getattr(wanted, field), getattr(shape, field)
        if given > own:
            raise InputError(f"{field} {given} is above the model's {own}; pruning only cuts: give 1 to {own}")
    for field in ("hidden_size", "intermediate_size", "moe_intermediate_size"):
        given = getattr(wanted, field)
        if given % 2 and given != getattr(shape, field):
            raise InputError(
                f"{field} {given} is odd, which engines' kernels do not take; use {given - 1 or 2} or {given + 1}, "
                "or better a multiple of 128"
            )
    _check_groups(shape, wanted)
    if wanted.num_experts < wanted.num_experts_per_token:
        raise InputError(
            f"num_experts {wanted.num_experts} is fewer than the {wanted.num_experts_per_token} that each token is "
            f"sent to; give {wanted.num_experts_per_token} to {shape.num_experts}"
        )
    if (wanted.hidden_size, wanted.num_attention_heads) != (shape.hidden_size, shape.num_attention_heads):
        _check_hidden_beside_heads(wanted)


def _check_groups(shape: ModelShape, wanted: ModelShape) -> None:
    """Each kept KV group keeps the same number of query heads, and no more than it has."""
    heads, groups = wanted.num_attention_heads, wanted.num_key_value_heads
    if shape.family.one_key_value_head_a_head and heads != groups:
        raise InputError(
            f"num_attention_heads {heads} with num_key_value_heads {groups}: {shape.family.model_type} models have one "
            "key-value head for each query head; give num_attention_heads alone"
        )
    allowed = [groups * each for each in range(1, _group_size(shape) + 1)]
    if heads not in allowed:
        raise InputError(
            f"num_attention_heads {heads} with {groups} KV groups: each group keeps the same number of its "
            f"{_group_size(shape)} query heads; use one of {allowed}, or another num_key_value_heads"
        )


def _check_hidden_beside_heads(wanted: ModelShape) -> None:
    family, hidden, heads = wanted.family, wanted.hidden_size, wanted.num_attention_heads
    if family.computes_head_dim(wanted.config) and hidden != heads * wanted.head_dim:
        raise InputError(
            f"hidden_size {hidden} with num_attention_heads {heads}: engines or transformers compute the head size of "
            f"{family.model_type} as hidden_size / num_attention_heads, and it must stay {wanted.head_dim}; use "
            f"hidden_size {heads * wanted.head_dim} with these heads, or cut both so that hidden_size = "
            f"{wanted.head_dim} x num_attention_heads"
        )
    if _heads_forbid_hidden(wanted) and not _opens_otherwise(wanted):
        step = math.lcm(heads, 2)
        below = hidden // step * step
        nearest = f"{below} or {below + step}" if below else f"{step}"
        raise InputError(
            f"hidden_size {hidden} with num_attention_heads {heads}: transformers opens {family.model_type} only where "
            f"the heads divide hidden_size; use hidden_size {nearest}, or other heads"
        )


def _heads_forbid_hidden(wanted: ModelShape) -> bool:
    """Whether transformers' class of this family refuses hidden_size beside the heads."""
    return wanted.family.heads_divide_hidden and wanted.hidden_size % wanted.num_attention_heads != 0


def _opens_otherwise(shape: ModelShape) -> OpensAs | None:
    """The other family whose class is the same function for this model, if there is one."""
    opens_as = shape.family.opens_as
    if opens_as is None or any(shape.family.holds(condition, shape.config) for condition in opens_as.not_when):
        return None
    return opens_as


def _group_size(shape: ModelShape) -> int:
    """Query heads in a KV group."""
    return shape.num_attention_heads // shape.num_key_value_heads
