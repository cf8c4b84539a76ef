"""What stayed of a model that another pruner cut, found from the two checkpoints alone; of decoders.

ModelOpt's mcore_minitron slices tensors and changes none of their numbers, but it does not say what it kept, and it
sorts what it cuts by importance before it slices, so that kept channels come in another order. Repair (pruner.py) needs
to know which channel of the unpruned model is which of the result. The numbers themselves tell:

    hidden channels   columns of the tensors outside the layers that end in that axis (embedding, head, final norm); of
                      long tables a sample of rows
    layers            in order, by norms and by all that follows
    in each layer     FFN channels, heads, KV groups, experts and their channels: each by the hash of all the numbers
                      that belong to it in the layer's tensors, once the hidden channels are selected

Every number of the result is compared, byte for byte, with the one that it is said to come from; a checkpoint in
another type is compared with the unpruned model's numbers rounded to it. What is alike in all of its numbers inside a
layer does the same, and is taken in order; hidden channels or layers that are alike are not told apart, and that is a
reason not to repair. Nothing is held but one tensor of either model.
"""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from stillroom.models.family import PlainAxis, axis_parts
from stillroom.models.shape import ModelShape
from stillroom.models.tensors import read_rows, read_tensor, row_blocks
from stillroom.models.weights import TensorEntry, family_entries
from stillroom.prune.cut import BITS, Cut, selected

SAMPLED_ROWS = 256
"""Of each table over hidden channels: enough to tell thousands of columns apart, and 2 MB of a 4,096-channel model."""
FIXED: frozenset[PlainAxis] = frozenset({"vocab", "hidden", "head_dim", "positions", "token_types", "buckets"})
"""Axes along which nothing is cut, or where it is known by then what stayed."""
Place = tuple[int | None, int | None]
"""Layer and expert."""
OUTSIDE: Place = (None, None)
"""Of all layers."""
Pairs = Mapping[str, tuple[str, str]]
"""By the description's name of a tensor: its name in the unpruned model, and in the result."""


class NotRecovered(Exception):
    """Why it cannot be told what stayed."""


def recover_cut(source_dir: Path, shape: ModelShape, out_dir: Path, target: ModelShape) -> Cut:
    """What stayed of `source_dir` (whose `source_shape` is `shape`) in the checkpoint `out_dir` of shape `target`.

    Channels, heads and experts are in the result's order, which need not ascend. Raises NotRecovered with the reason
    where the result is not made of parts of the source, or of parts that cannot be told apart; InputError where a file
    cannot be read.
    """
    for size in ("vocab_size", "head_dim"):
        if getattr(shape, size) != getattr(target, size):
            raise NotRecovered(f"{size} is {getattr(target, size)}, and the unpruned model's {getattr(shape, size)}")
    source = _Checkpoint(shape, family_entries(source_dir, shape.family))
    result = _Checkpoint(target, family_entries(out_dir, target.family))
    hidden = _hidden_channels(source, result)
    both = _Both(source, result, None if hidden == tuple(range(shape.hidden_size)) else hidden)
    outside = both.pairs(OUTSIDE, OUTSIDE)
    if different := next((pattern for pattern, pair in outside.items() if not both.equal(*pair)), None):
        raise NotRecovered(f"{different} has other numbers than the unpruned model's")
    layers = _layers(both)
    return Cut(tuple(layers), hidden=both.hidden, **_per_layer(layers, shape))


@dataclass(frozen=True)
class _Checkpoint:
    shape: ModelShape
    entries: Mapping[str, TensorEntry]

    @functools.cached_property
    def _names(self) -> dict[Place, dict[str, str]]:
        grouped: dict[Place, dict[str, str]] = defaultdict(dict)
        for name, place in self.shape.places.items():
            if name in self.entries:
                grouped[place.layer, place.expert][place.pattern] = name
        return grouped

    def names(self, place: Place) -> dict[str, str]:
        """The tensors of a layer, of one of its experts or outside of all layers, by the description's names."""
        return self._names.get(place, {})


@dataclass(frozen=True)
class _Both:
    """The unpruned model and the result, read tensor by tensor."""

    source: _Checkpoint
    result: _Checkpoint
    hidden: tuple[int, ...] | None
    """The source's hidden channels in the result's order; None: as they were."""

    def pairs(self, place: Place, new_place: Place) -> Pairs:
        """The tensors of the source's layer or expert, and of the result's."""
        old, new = self.source.names(place), self.result.names(new_place)
        if unpaired := sorted(old.keys() ^ new.keys()):
            raise NotRecovered(f"only one of the two models has {unpaired[0]}")
        return {pattern: (old[pattern], name) for pattern, name in new.items()}

    def read(self, name: str, new_name: str) -> tuple[Tensor, Tensor]:
        """A tensor of the source, its hidden channels selected, and that of the result, both in the result's type."""
        new = read_tensor(self.result.entries[new_name])
        return self._selected(name, read_tensor(self.source.entries[name])).to(new.dtype), new

    def equal(self, name: str, new_name: str) -> bool:
        """Whether a tensor of which only hidden channels went is what the result has."""
        entry, by_channel = self.source.entries[name], self.source.shape.axes(name)[0] == "hidden"
        if by_channel or len(entry.shape) < 2:
            return _equal(*self.read(name, new_name))
        if entry.shape[0] != self.result.entries[new_name].shape[0]:
            return False
        return all(
            _equal(self._selected(name, read_rows(entry, first, first + len(rows))).to(rows.dtype), rows)
            for first, rows in row_blocks(self.result.entries[new_name])
        )

    def matched(self, pairs: Pairs, axes: frozenset[str], width: int = 1) -> tuple[int, ...] | None:
        """For each unit of the result, which lies along these axes in `width` indices, that of the source; None where
        one is not there."""
        hashes: tuple[defaultdict[int, Any], ...] = defaultdict(_hash), defaultdict(_hash)
        for pattern, pair in pairs.items():
            if axes.isdisjoint(_parts(self.source, pattern)):
                continue
            for tensor, checkpoint, found in zip(self.read(*pair), (self.source, self.result), hashes, strict=True):
                for rows in _along(tensor, pattern, axes, checkpoint.shape):
                    for unit, row in enumerate(_bytes(rows.reshape(len(rows) // width, -1))):
                        found[unit].update(row)
        old, new = ([digest.digest() for digest in found.values()] for found in hashes)
        return _positions(old, new)

    def _selected(self, name: str, tensor: Tensor) -> Tensor:
        return selected(name, tensor, self.source.shape, Cut((), hidden=self.hidden))


def _hidden_channels(source: _Checkpoint, result: _Checkpoint) -> tuple[int, ...]:
    """The source's channel for each of the result's."""
    both = _Both(source, result, None)
    columns: tuple[list[Tensor], list[Tensor]] = [], []
    for pattern, (name, new_name) in both.pairs(OUTSIDE, OUTSIDE).items():
        axes = source.shape.family.tensors[pattern]
        if axes[-1] == "hidden" and "hidden" not in axes[:-1]:
            new = _sampled_rows(result.entries[new_name])
            columns[1].append(new)
            columns[0].append(_sampled_rows(source.entries[name]).to(new.dtype))
    old, new_columns = ([bytes(row) for row in _bytes(torch.cat(tables).T)] for tables in columns)
    positions = _positions(old, new_columns)
    if positions is None:
        raise NotRecovered("the embedding, the head or the final norm has other numbers than the unpruned model's")
    if positions != tuple(range(len(old))):
        counts = Counter(old)
        if alike := next((column for column in new_columns if counts[column] > 1), None):
            channels = [i for i, column in enumerate(old) if column == alike]
            raise NotRecovered(f"hidden channels {channels[0]} and {channels[1]} have the same embedding")
    return positions


def _layers(both: _Both) -> dict[int, dict[str, Any]]:
    """By the layers of the source that stayed, in order: what stayed in them, by fields of a Cut."""
    found: dict[int, dict[str, Any]] = {}
    num_layers, num_kept = both.source.shape.num_layers, both.result.shape.num_layers
    first = 0
    for layer in range(num_kept):
        choices = range(first, num_layers - (num_kept - layer) + 1)
        alike = {old: units for old in choices if (units := _units(both, old, layer)) is not None}
        if not alike:
            which = f"layer {first}" if len(choices) == 1 else f"any of layers {first} to {choices[-1]}"
            raise NotRecovered(f"layer {layer} is not made of numbers of {which} of the unpruned model")
        if len(alike) > 1:
            one, other, *_ = alike
            raise NotRecovered(f"layer {layer} may be layer {one} of the unpruned model, or {other}: they are alike")
        found |= alike
        first = next(iter(alike)) + 1
    return found


def _units(both: _Both, layer: int, new_layer: int) -> dict[str, Any] | None:
    """What stayed of a layer of the source, by fields of a Cut; None where it is not this layer of the result."""
    pairs = both.pairs((layer, None), (new_layer, None))
    uncut = [pair for pattern, pair in pairs.items() if _parts(both.source, pattern) <= FIXED]
    if not all(both.equal(*pair) for pair in uncut):
        return None
    shape = both.source.shape
    axes: dict[str, tuple[frozenset[str], int]] = {"ffn": (frozenset({"ffn"}), 1)}
    if shape.family.one_key_value_head_a_head:
        axes["heads"] = frozenset({"query", "key_value"}), shape.head_dim
    else:
        axes["heads"] = frozenset({"query"}), shape.head_dim
        axes["kv_groups"] = frozenset({"key_value"}), shape.head_dim
    axes["experts"] = frozenset({"experts"}), 1
    found: dict[str, Any] = {}
    for field, (names, width) in axes.items():
        if (units := both.matched(pairs, names, width)) is None:
            return None
        found[field] = units
    found["expert_ffn"] = {}
    for new_expert, expert in enumerate(found["experts"]):
        pairs = both.pairs((layer, expert), (new_layer, new_expert))
        if (units := both.matched(pairs, frozenset({"expert_ffn"}))) is None:
            return None
        found["expert_ffn"][expert] = units
    return found


def _per_layer(layers: Mapping[int, Mapping[str, Any]], shape: ModelShape) -> dict[str, Any]:
    """The fields of a Cut; those of which nothing went and which are in their order are left out."""
    sizes = {
        "ffn": shape.intermediate_size,
        "heads": shape.num_attention_heads,
        "kv_groups": shape.num_key_value_heads,
        "experts": shape.num_experts,
    }
    fields: dict[str, Any] = {
        field: {layer: units[field] for layer, units in layers.items()}
        for field, size in sizes.items()
        if any(units.get(field, ()) not in ((), tuple(range(size))) for units in layers.values())
    }
    whole = tuple(range(shape.moe_intermediate_size))
    if any(kept != whole for units in layers.values() for kept in units["expert_ffn"].values()):
        fields["expert_ffn"] = {layer: units["expert_ffn"] for layer, units in layers.items()}
    return fields


def _along(tensor: Tensor, pattern: str, axes: frozenset[str], shape: ModelShape) -> list[Tensor]:
    """Those parts of a tensor that lie along any of these axes, this dimension first."""
    found = []
    for dim, axis in enumerate(shape.family.tensors[pattern]):
        parts = axis_parts(axis)
        if axes.isdisjoint(parts):
            continue
        pieces = torch.split(tensor.movedim(dim, 0), [shape.axis_size(part) for part in parts])
        found += [piece for part, piece in zip(parts, pieces, strict=True) if part in axes]
    return found


def _parts(checkpoint: _Checkpoint, pattern: str) -> frozenset[str]:
    """The plain axes of a tensor of the description."""
    axes = (part for axis in checkpoint.shape.family.tensors[pattern] for part in axis_parts(axis))
    return frozenset(part for part in axes if part in get_args(PlainAxis))


def _positions(old: Sequence[bytes], new: Sequence[bytes]) -> tuple[int, ...] | None:
    """For each of `new` the index of its like in `old`, none of them twice; None where one has no like."""
    if old == new:
        return tuple(range(len(new)))
    places: dict[bytes, list[int]] = defaultdict(list)
    for index in reversed(range(len(old))):
        places[old[index]].append(index)
    if any(count > len(places[value]) for value, count in Counter(new).items()):
        return None
    return tuple(places[value].pop() for value in new)


def _sampled_rows(entry: TensorEntry) -> Tensor:
    """Some rows of a table, from all over it, or a vector as one row."""
    if len(entry.shape) == 1:
        return read_tensor(entry)[None]
    count = min(SAMPLED_ROWS, entry.shape[0])
    return torch.cat([read_rows(entry, row, row + 1) for i in range(count) for row in [i * entry.shape[0] // count]])


def _hash() -> Any:
    return blake2b(digest_size=16)


def _bytes(rows: Tensor) -> Any:
    """The bytes of each row, as a numpy array (rows, bytes)."""
    return rows.contiguous().view(torch.uint8).numpy()


def _equal(one: Tensor, other: Tensor) -> bool:
    """Byte for byte."""
    bits = BITS[one.itemsize]
    return torch.equal(one.contiguous().view(bits), other.contiguous().view(bits))
