"""What a cut leaves of a model, tensor by tensor: which one each new tensor comes from, which numbers stay, what is
rescaled. All of it follows from the family's axes and from lists of what stays.

Cutting FFN channels, heads, KV groups, layers, or experts that no token chooses only removes terms of sums. Cutting
hidden channels also changes what a norm divides by. With x an RMS norm's input of n channels, n' of them kept, and S,
S' the sums of x^2 over all and over the kept ones, the dense norm gives scale * x / sqrt(S / n) and the cut one
scale' * x / sqrt(S' / n'); they agree on the kept channels for

    scale' = scale * sqrt((S' / S) * (n / n'))

S' / S differs from token to token; its mean over calibration tokens is used, each token counting alike, because the
few with massive activations would decide everything otherwise. Where the cut channels are always zero, S' = S and the
cut is exact (up to the norm's epsilon). A layer norm subtracts the mean m first. Now S is the sum of (x - m)^2, z
= (x - m) / sqrt(S / n) what it normalizes to, and d the mean of z over the kept channels, by which the mean moves:

    scale' = scale * sqrt((S' / S) * (n / n') - d^2)        bias' = bias + scale * d

with means over tokens for S' / S and z; exact where the cut channels always equal the mean of the kept ones. Norms over
all heads of query or key (OLMo 2) lose width when heads go, and are rescaled as RMS norms are; that is exact where the
lost heads of query or key are always zero, an approximation where only their output is.

Two more follow from the forward pass. Models that multiply embeddings by sqrt(hidden_size): the embeddings take
sqrt(n / n') to stay what they were, and where they are also the output head, the final norm gives it back by
sqrt(n' / n). Models that divide the head's input by sqrt(hidden_size): the final norm takes sqrt(n' / n).

Measured on SmolLM2-135M-Instruct (dequantized), hidden 576 -> 522, WikiText-2 perplexity on 5,120 tokens: dense 21.7,
norms left alone 47.3, rescaled 42.4. Assuming S' = S throughout gave 41.4 there, but it is wrong by any factor as soon
as a channel that carries much of S is cut, so it is not used.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from stillroom.errors import InputError
from stillroom.models.family import LAYER, axis_parts
from stillroom.models.shape import ModelShape, Place
from stillroom.prune.targets import with_config

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of a number: the integers that numpy, which knows no bfloat16, can copy instead."""

IndexArray = npt.NDArray[np.int64]
PerLayer = Mapping[int, tuple[int, ...]]
"""Kept indices by the source's layer index; layers of an encoder-decoder are counted through."""


@dataclass(frozen=True)
class Cut:
    """What stays, in the source's numbering; None where an axis is left whole.

    Ascending where it is to be cut (`tensor_cut`), but in the order of a checkpoint that another pruner cut
    (recover.py). As many stay in every layer. In a family of `heads_alike_in_stack`, the same heads stay in all layers
    of a stack.
    """

    layers: tuple[int, ...]
    hidden: tuple[int, ...] | None = None
    ffn: PerLayer | None = None
    heads: PerLayer | None = None
    kv_groups: PerLayer | None = None
    """Where key-value heads are the query heads, `heads` says which stay."""
    cross_heads: PerLayer | None = None
    """Heads of cross-attention by decoder layer, as many as of self-attention."""
    experts: PerLayer | None = None
    expert_ffn: Mapping[int, PerLayer] | None = None
    """By layer, then by the expert's index in the source."""


@dataclass(frozen=True)
class Rescale:
    """new = (old + offset) * factor - offset + shift."""

    factor: float = 1.0
    offset: float = 0.0
    """The norm's scale is offset + weight."""
    shift: Tensor | None = None
    """One number for each of the source's channels."""


def cut_shape(shape: ModelShape, cut: Cut) -> ModelShape:
    """The shape that remains of `shape`, its config rewritten."""
    _check(shape, cut)
    first = cut.layers[0]
    heads = shape.num_attention_heads if cut.heads is None else len(cut.heads[first])
    groups = shape.num_key_value_heads if cut.kv_groups is None else len(cut.kv_groups[first])
    wanted = dataclasses.replace(
        shape,
        num_layers=sum(layer < shape.num_layers for layer in cut.layers),
        num_decoder_layers=sum(layer >= shape.num_layers for layer in cut.layers),
        hidden_size=shape.hidden_size if cut.hidden is None else len(cut.hidden),
        intermediate_size=shape.intermediate_size if cut.ffn is None else len(cut.ffn[first]),
        num_attention_heads=heads,
        num_key_value_heads=heads if shape.family.one_key_value_head_a_head else groups,
        num_experts=shape.num_experts if cut.experts is None else len(cut.experts[first]),
        moe_intermediate_size=_expert_width(shape, cut),
    )
    return with_config(shape, wanted, cut.layers)


def source_places(shape: ModelShape, target: ModelShape, cut: Cut) -> dict[str, str]:
    """Each tensor that `target` may have, and the one of the source that it is cut from."""
    return {name: shape.spelled(*_source(shape, target, cut, place)) for name, place in target.places.items()}


@dataclass(frozen=True)
class TensorCut:
    """What is done to one tensor of the source, decided once for all its blocks of rows."""

    name: str
    kept: tuple[IndexArray | None, ...]
    """By dimension, ascending; None for all."""
    change: Rescale | None

    def of_rows(self, rows: Tensor, first_row: int = 0) -> Tensor:
        """What stays of the rows from `first_row` on, in their dtype and rescaled where the cut asks for it. Raises
        InputError for NaN or infinite numbers."""
        if not _finite(rows):
            raise InputError(f"{self.name} holds NaN or infinite values; the model is damaged: fetch or train it again")
        if (change := self.change) is not None:
            changed = (rows.double() + change.offset) * change.factor - change.offset
            if change.shift is not None:
                changed += change.shift[first_row : first_row + len(rows)]
            rows = changed.to(rows.dtype)
        for dim, kept in enumerate(self.kept):
            if kept is not None:
                rows = _taken(rows, dim, kept, first_row if dim == 0 else 0)
        return rows


def tensor_cut(name: str, shape: ModelShape, cut: Cut, rescales: Mapping[str, Rescale]) -> TensorCut:
    """What `cut` does to the source tensor `name`."""
    kept = (kept_along(axis, shape.places[name], shape, cut) for axis in shape.axes(name))
    arrays = tuple(None if indices is None else np.asarray(indices, dtype=np.int64) for indices in kept)
    return TensorCut(name, arrays, rescales.get(name))


def selected(name: str, tensor: Tensor, shape: ModelShape, cut: Cut) -> Tensor:
    """What stays of the source tensor `name`, or of some of its rows where all rows stay: on its device, in the order
    of the cut's indices, not rescaled."""
    for dim, axis in enumerate(shape.axes(name)):
        if (kept := kept_along(axis, shape.places[name], shape, cut)) is not None:
            tensor = tensor.index_select(dim, torch.tensor(kept, device=tensor.device))
    return tensor


def rescales_of(
    shape: ModelShape,
    cut: Cut,
    norm_shares: Mapping[str, Tensor] | None,
    norm_means: Mapping[str, Tensor] | None,
    read: Callable[[str], Tensor],
) -> dict[str, Rescale]:
    """What is rescaled, by source tensor; see the head of this file. `read` gives a source tensor by its name."""
    rescales: dict[str, Rescale] = {}
    if cut.hidden is not None and len(cut.hidden) < shape.hidden_size:
        _rescale_hidden(shape, cut, norm_shares, norm_means, read, rescales)
    if cut.heads is not None and len(cut.heads[cut.layers[0]]) < shape.num_attention_heads:
        _rescale_head_norms(shape, cut, norm_shares, rescales)
    return rescales


def kept_along(axis: str, place: Place, shape: ModelShape, cut: Cut) -> Sequence[int] | None:
    """Indices that stay along an axis of a source tensor, in the order of the cut's; None for all."""
    parts = axis_parts(axis)
    kept_parts = [_kept_part(part, place, shape, cut) for part in parts]
    if all(kept is None for kept in kept_parts):
        return None
    indices: list[int] = []
    start = 0
    for part, kept in zip(parts, kept_parts, strict=True):
        size = shape.axis_size(part)
        indices += range(start, start + size) if kept is None else [start + i for i in kept]
        start += size
    return indices


def _kept_part(axis: str, place: Place, shape: ModelShape, cut: Cut) -> Sequence[int] | None:
    """The same along a plain axis."""
    if axis == "hidden":
        return cut.hidden
    if axis == "expert_ffn":
        if cut.expert_ffn is None:
            return None
        assert place.layer is not None
        assert place.expert is not None
        return cut.expert_ffn[place.layer][place.expert]
    groups = cut.heads if shape.family.one_key_value_head_a_head else cut.kv_groups
    per_layer = {"ffn": cut.ffn, "query": cut.heads, "key_value": groups, "cross_query": cut.cross_heads,
                 "heads": cut.heads, "experts": cut.experts}.get(axis)  # fmt: skip
    if per_layer is None:
        return None
    assert place.layer is not None
    kept = per_layer[_kept_layer(place, shape, cut)]
    if axis in ("query", "key_value", "cross_query"):
        return [head * shape.head_dim + i for head in kept for i in range(shape.head_dim)]
    return kept


def _kept_layer(place: Place, shape: ModelShape, cut: Cut) -> int:
    """The layer whose choice a tensor follows: its own, or the first that stays where it serves all of a stack."""
    assert place.layer is not None
    if place.pattern in shape.family.first_layer_only:
        return next(layer for layer in cut.layers if layer in shape.stack_of(place.layer))
    return place.layer


def _source(shape: ModelShape, target: ModelShape, cut: Cut, place: Place) -> Place:
    """The place in the source of a tensor in the target: layers and experts are counted anew."""
    if place.layer is None:
        return place
    if place.pattern in shape.family.first_layer_only:
        return place._replace(layer=shape.layers_of(place.pattern)[0])
    layer = cut.layers[place.layer]  # the target's layers are the kept ones, counted through
    expert = place.expert
    if expert is not None and cut.experts is not None:
        expert = cut.experts[layer][expert]
    return place._replace(layer=layer, expert=expert)


def _check(shape: ModelShape, cut: Cut) -> None:
    """A cut is homogeneous and leaves something of each stack; whoever chose it sees to that."""
    per_layer = (cut.ffn, cut.heads, cut.kv_groups, cut.experts)
    for kept in per_layer:
        assert kept is None or len({len(kept[layer]) for layer in cut.layers}) == 1, "as many stay in every layer"
    stacks = {shape.stack_of(layer) for layer in cut.layers}
    assert len(stacks) == 1 + (shape.num_decoder_layers > 0), "each stack keeps a layer"
    if cut.heads is not None and shape.family.heads_alike_in_stack:
        for stack in stacks:
            assert len({cut.heads[layer] for layer in cut.layers if layer in stack}) == 1, "the same heads in a stack"
    if shape.family.has_axis("cross_query"):
        assert (cut.heads is None) == (cut.cross_heads is None), "cross-attention keeps as many heads"
    if cut.heads is not None and cut.cross_heads is not None:
        counts = {len(kept) for kept in cut.cross_heads.values()} | {len(cut.heads[cut.layers[0]])}
        assert len(counts) == 1, "cross-attention keeps as many heads"


def _expert_width(shape: ModelShape, cut: Cut) -> int:
    if cut.expert_ffn is None:
        return shape.moe_intermediate_size
    widths = {len(kept) for layer in cut.layers for kept in cut.expert_ffn[layer].values()}
    assert len(widths) == 1, "as many channels stay in every expert"
    return widths.pop()


def _rescale_hidden(
    shape: ModelShape,
    cut: Cut,
    norm_shares: Mapping[str, Tensor] | None,
    norm_means: Mapping[str, Tensor] | None,
    read: Callable[[str], Tensor],
    rescales: dict[str, Rescale],
) -> None:
    """Add what a cut of hidden channels rescales: norms, scaled embeddings, the norm before a scaled head."""
    assert cut.hidden is not None
    assert norm_shares is not None, "cutting hidden channels needs the norms' shares"
    family, wider = shape.family, shape.hidden_size / len(cut.hidden)
    undone = {family.final_norm: _undone_at_the_end(shape, wider)}
    for module in (name for pattern in family.hidden_norms for name in _kept_modules(pattern, shape, cut)):
        factor, bias = _factor(norm_shares[module], cut.hidden), f"{module}.bias"
        if family.norm == "layer":
            assert norm_means is not None, "cutting hidden channels of layer norms needs their inputs' means"
            means = norm_means[module].double()
            moved = (means[list(cut.hidden)].mean() - means.mean()).item()
            factor = math.sqrt(max(0.0, factor**2 - moved**2))
            scale = read(f"{module}.weight").double() + family.norm_offset
            rescales[bias] = Rescale(undone.get(module, 1.0), shift=scale * moved * undone.get(module, 1.0))
        rescales[f"{module}.weight"] = Rescale(factor * undone.get(module, 1.0), family.norm_offset)
    if family.embedding_scaled_by_sqrt_hidden:
        rescales[family.embedding] = Rescale(math.sqrt(wider))


def _rescale_head_norms(
    shape: ModelShape, cut: Cut, norm_shares: Mapping[str, Tensor] | None, rescales: dict[str, Rescale]
) -> None:
    """Add what a cut of heads rescales: norms over all of them at once."""
    for pattern in shape.family.head_norms:
        for module in _kept_modules(pattern, shape, cut):
            name = f"{module}.weight"
            (axis,) = shape.axes(name)
            if (kept := kept_along(axis, shape.places[name], shape, cut)) is not None:
                assert norm_shares is not None, "cutting heads needs the shares of the norms over all heads"
                rescales[name] = Rescale(_factor(norm_shares[module], kept), shape.family.norm_offset)


def _undone_at_the_end(shape: ModelShape, wider: float) -> float:
    """What the norm before the head makes good: embeddings that were scaled up, a head that divides by less."""
    family = shape.family
    factor = 1.0
    if family.embedding_scaled_by_sqrt_hidden and shape.tied:
        factor /= math.sqrt(wider)
    if family.output_scaled_when:
        given = (shape.config[field] for field in family.output_scaled_when if field in shape.config)
        if next(given, True):
            factor /= math.sqrt(wider)
    return factor


def _factor(shares: Tensor, kept: Sequence[int]) -> float:
    """sqrt of the kept channels' share of the squares, times how many more there were."""
    shares = shares.double()
    total = shares.sum().item()
    kept_share = shares[list(kept)].sum().item() / total if total else 1.0
    return math.sqrt(kept_share * len(shares) / len(kept))


def _kept_modules(pattern: str, shape: ModelShape, cut: Cut) -> list[str]:
    """A module of the description in the layers that stay, or wherever it is, by its names in the source."""
    if LAYER not in pattern:
        return [pattern]
    return [module for layer, module in shape.spelled_out(pattern).items() if layer in cut.layers]


def _finite(tensor: Tensor) -> bool:
    """No NaN and nothing infinite: least and greatest carry either along. 50 times as fast as `isfinite().all()` on
    bfloat16."""
    return not tensor.numel() or all(math.isfinite(extreme.item()) for extreme in tensor.aminmax())


def _taken(tensor: Tensor, dim: int, kept: IndexArray, first: int) -> Tensor:
    """Those of the `kept` indices, ascending, that `tensor` holds; along `dim` it begins with index `first`.

    numpy's take copies 2-byte numbers along the last dimension 4 times as fast as torch's index_select.
    """
    begin, end = np.searchsorted(kept, (first, first + tensor.shape[dim]))
    bits = tensor.view(BITS[tensor.itemsize]).numpy()
    return torch.from_numpy(np.take(bits, kept[begin:end] - first, axis=dim)).view(tensor.dtype)
