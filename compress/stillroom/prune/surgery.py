"""Cut a checkpoint directory into a smaller one, tensor by tensor, from the family's axes and lists of what stays.

No model is built and none is held: each tensor is read in blocks of rows, which are indexed along its axes and written
into shards of a few gigabytes, so memory is that of a few blocks whatever the model's size. Everything is checked from
the headers before the first byte is written.

Cutting FFN channels, heads, KV groups or layers only removes terms of sums. Cutting hidden channels also changes what
an RMS norm divides by. With x the norm's input of n channels, n' of them kept, and S, S' the sums of x^2 over all and
over the kept ones, the dense norm gives scale * x / sqrt(S / n) and the cut one scale' * x / sqrt(S' / n'); they
agree on the kept channels for

    scale' = scale * sqrt((S' / S) * (n / n'))

S' / S differs from token to token; its mean over calibration tokens is used, each token counting alike, because the
few with massive activations would decide everything otherwise. Where the cut channels are always zero, S' = S and the
cut is exact (up to the norm's epsilon). Two more follow from the forward pass of models that multiply embeddings by
sqrt(hidden_size): the embeddings take sqrt(n / n') to stay what they were, and where they are also the output head,
the final norm gives it back by sqrt(n' / n).

Measured on SmolLM2-135M-Instruct (dequantized), hidden 576 -> 522, WikiText-2 perplexity on 5,120 tokens: dense 21.7,
norms left alone 47.3, rescaled 42.4. Assuming S' = S throughout gave 41.4 there, but it is wrong by any factor as soon
as a channel that carries much of S is cut, so it is not used.
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig

from stillroom.artifact import write_atomically
from stillroom.errors import EnvironmentCannot, InputError
from stillroom.export.checkpoint import copy_companions, finish_config
from stillroom.export.writer import MAX_SHARD_BYTES, NewTensor, write_checkpoint
from stillroom.models.family import Axis
from stillroom.models.shape import ModelShape, read_config, shape_of
from stillroom.models.tensors import row_blocks
from stillroom.models.weights import check_weights, tensor_entries
from stillroom.prune.targets import with_config

HARMLESS_ENDINGS = ("rotary_emb.inv_freq",)
"""Buffers that old checkpoints carry and that every loader computes anew; they are left behind."""
LM_HEAD = "lm_head.weight"
FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")
"""As safetensors names them."""

BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of a number: the integers that numpy, which knows no bfloat16, can copy instead."""

PerLayer = Mapping[int, tuple[int, ...]]
"""Kept indices, ascending, by the source's layer index."""


@dataclass(frozen=True)
class Cut:
    """What stays, ascending and in the source's numbering; None where an axis is left whole."""

    layers: tuple[int, ...]
    hidden: tuple[int, ...] | None = None
    ffn: PerLayer | None = None
    heads: PerLayer | None = None
    kv_groups: PerLayer | None = None


def source_shape(model_dir: Path) -> ModelShape:
    """The shape of a checkpoint that can be cut, per-layer fields of its config spelled out.

    transformers derives a missing `layer_types` from the layer's index, which cutting changes. Raises InputError for a
    quantized checkpoint, unknown tensors, and whatever `check_weights` finds.
    """
    config = read_config(model_dir)
    if "quantization_config" in config or (model_dir / "hf_quant_config.json").exists():
        raise InputError(f"{model_dir} is quantized; prune before quantizing: put the prune stage before quantize")
    shape = shape_of(config, str(model_dir))
    check_weights(model_dir, shape)
    _check_known(model_dir, shape)
    if absent := [field for field in shape.family.per_layer_lists if config.get(field) is None]:
        full = AutoConfig.from_pretrained(model_dir, local_files_only=True)
        config = {**config, **{field: list(getattr(full, field)) for field in absent}}
    return dataclasses.replace(shape, config=config)


def cut_shape(shape: ModelShape, cut: Cut) -> ModelShape:
    """The shape that remains of `shape`, its config rewritten."""
    first = cut.layers[0]
    wanted = dataclasses.replace(
        shape,
        num_layers=len(cut.layers),
        hidden_size=shape.hidden_size if cut.hidden is None else len(cut.hidden),
        intermediate_size=shape.intermediate_size if cut.ffn is None else len(cut.ffn[first]),
        num_attention_heads=shape.num_attention_heads if cut.heads is None else len(cut.heads[first]),
        num_key_value_heads=shape.num_key_value_heads if cut.kv_groups is None else len(cut.kv_groups[first]),
    )
    return with_config(shape, wanted, cut.layers)


def cut_checkpoint(
    source_dir: Path,
    shape: ModelShape,
    cut: Cut,
    out_dir: Path,
    *,
    norm_shares: Mapping[str, Tensor] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ModelShape:
    """Write what `cut` leaves of `source_dir` (whose `source_shape` is `shape`) to `out_dir`; returns the new shape.

    `norm_shares` are needed when hidden channels go: for each hidden norm, by module name, each channel's mean share of
    its input's sum of squares, (hidden,). `progress` is told tensors done and in all.
    Raises InputError for NaN or infinite weights, EnvironmentCannot for a full disk.
    """
    target = cut_shape(shape, cut)
    factors = _scale_factors(shape, cut, norm_shares)
    entries = tensor_entries(source_dir)
    plan = {name: _source_name(shape, cut, name) for name in target.tensor_shapes()}
    new = {n: NewTensor(entries[plan[n]].dtype, size) for n, size in target.tensor_shapes().items()}
    out_dir.mkdir(parents=True, exist_ok=True)
    _check_room(out_dir, sum(tensor.num_bytes for tensor in new.values()))

    def blocks(name: str) -> Iterator[Tensor]:
        source_name = plan[name]
        for first_row, rows in row_blocks(entries[source_name]):
            yield _cut_tensor(rows, source_name, shape, cut, factors, first_row)

    write_checkpoint(out_dir, new, blocks, max_shard_bytes=max_shard_bytes, progress=progress)
    write_atomically(out_dir / "config.json", json.dumps(target.config, indent=2) + "\n")
    copy_companions(source_dir, out_dir)
    finish_config(out_dir)
    return target


def _check_known(model_dir: Path, shape: ModelShape) -> None:
    """Raise InputError for tensors that the family does not have, or that hold no plain floating point numbers."""
    known = shape.tensor_shapes()
    entries = tensor_entries(model_dir)
    unknown = [n for n in entries if n not in known and n != LM_HEAD and not n.endswith(HARMLESS_ENDINGS)]
    if unknown:
        raise InputError(
            f"{model_dir} holds {len(unknown)} tensors that a {shape.family.model_type} model with its config does not "
            f"have: {', '.join(unknown[:5])}; they would be lost, so this checkpoint cannot be pruned"
        )
    if odd := [name for name in known if entries[name].dtype not in FLOAT_DTYPES]:
        raise InputError(
            f"{model_dir}: {odd[0]} is {entries[odd[0]].dtype}; only {', '.join(FLOAT_DTYPES)} can be pruned: prune "
            "before quantizing"
        )


def _layer_of(shape: ModelShape, name: str) -> int | None:
    """The layer that a tensor belongs to, None for embeddings, final norm and head."""
    prefix = f"{shape.family.layers}."
    return int(name.removeprefix(prefix).split(".")[0]) if name.startswith(prefix) else None


def _source_name(shape: ModelShape, cut: Cut, name: str) -> str:
    """What the source calls the tensor that will be `name`: layers are counted anew."""
    layer = _layer_of(shape, name)
    if layer is None:
        return name
    prefix = f"{shape.family.layers}."
    return name.replace(f"{prefix}{layer}.", f"{prefix}{cut.layers[layer]}.", 1)


def _cut_tensor(
    tensor: Tensor, name: str, shape: ModelShape, cut: Cut, factors: Mapping[str, float], first_row: int = 0
) -> Tensor:
    """What stays of a source tensor, or of its rows from `first_row` on, in its dtype and rescaled where the cut of
    hidden channels asks for it."""
    if not _finite(tensor):
        raise InputError(f"{name} holds NaN or infinite values; the model is damaged: fetch or train it again")
    layer = _layer_of(shape, name)
    for dim, axis in enumerate(_axes(shape, name)):
        if (kept := _kept(axis, layer, shape, cut)) is not None:
            tensor = _taken(tensor, dim, kept, first_row if dim == 0 else 0)
    if name in factors:
        offset = shape.family.norm_offset if tensor.ndim == 1 else 0.0
        tensor = ((tensor.double() + offset) * factors[name] - offset).to(tensor.dtype)
    return tensor


def _finite(tensor: Tensor) -> bool:
    """No NaN and nothing infinite: least and greatest carry either along. 50 times as fast as `isfinite().all()` on
    bfloat16."""
    return not tensor.numel() or all(math.isfinite(extreme.item()) for extreme in tensor.aminmax())


def _taken(tensor: Tensor, dim: int, kept: Sequence[int], first: int) -> Tensor:
    """Those of the `kept` indices, ascending, that `tensor` holds; along `dim` it begins with index `first`.

    numpy's take copies 2-byte numbers along the last dimension 4 times as fast as torch's index_select.
    """
    here = kept[bisect_left(kept, first) : bisect_left(kept, first + tensor.shape[dim])]
    bits = tensor.view(BITS[tensor.itemsize]).numpy()
    return torch.from_numpy(np.take(bits, np.asarray(here, dtype=np.int64) - first, axis=dim)).view(tensor.dtype)


def _axes(shape: ModelShape, name: str) -> tuple[Axis, ...]:
    layer = _layer_of(shape, name)
    prefix = f"{shape.family.layers}."
    pattern = name if layer is None else name.replace(f"{prefix}{layer}.", f"{prefix}{{layer}}.", 1)
    return shape.family.tensors[pattern]


def _kept(axis: Axis, layer: int | None, shape: ModelShape, cut: Cut) -> Sequence[int] | None:
    """Indices that stay along an axis, None for all."""
    if axis == "hidden":
        return cut.hidden
    per_layer = {"ffn": cut.ffn, "query": cut.heads, "key_value": cut.kv_groups}.get(axis)
    if per_layer is None:
        return None
    assert layer is not None
    if axis == "ffn":
        return per_layer[layer]
    return [head * shape.head_dim + i for head in per_layer[layer] for i in range(shape.head_dim)]


def _scale_factors(shape: ModelShape, cut: Cut, norm_shares: Mapping[str, Tensor] | None) -> dict[str, float]:
    """What norm scales and embeddings are multiplied by, by source tensor; see the head of this file."""
    if cut.hidden is None:
        return {}
    assert norm_shares is not None, "cutting hidden channels needs the norms' shares"
    wider = shape.hidden_size / len(cut.hidden)
    kept = torch.tensor(cut.hidden)
    factors = {}
    for module in _hidden_norms(shape, cut):
        shares = norm_shares[module].double()
        total = shares.sum().item()
        kept_share = shares[kept].sum().item() / total if total else 1.0
        factors[f"{module}.weight"] = math.sqrt(kept_share * wider)
    if shape.family.embedding_scaled_by_sqrt_hidden:
        factors[_embedding(shape)] = math.sqrt(wider)
        if shape.tied:
            (final,) = (module for module in shape.family.hidden_norms if "{layer}" not in module)
            factors[f"{final}.weight"] /= math.sqrt(wider)
    return factors


def _hidden_norms(shape: ModelShape, cut: Cut) -> Iterator[str]:
    """The norm modules that stay, by their names in the source."""
    for pattern in shape.family.hidden_norms:
        if "{layer}" in pattern:
            yield from (pattern.format(layer=layer) for layer in cut.layers)
        else:
            yield pattern


def _embedding(shape: ModelShape) -> str:
    """The table of input embeddings."""
    (name,) = (n for n, axes in shape.family.tensors.items() if axes == ("vocab", "hidden") and n != LM_HEAD)
    return name


def _check_room(out_dir: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(out_dir).free
    if num_bytes > free:
        raise EnvironmentCannot(
            f"{out_dir} has {free} bytes free; the pruned model needs {num_bytes}: free some or move --out"
        )
