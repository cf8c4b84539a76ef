"""Cut a checkpoint directory into a smaller one, tensor by tensor, from the family's axes and lists of what stays.

No model is built and none is held: each tensor is read in blocks of rows, which are indexed along its axes and written
into shards of a few gigabytes, so memory is that of a few blocks whatever the model's size. Everything is checked from
the headers before the first byte is written.

What stays of each tensor, and what is rescaled, is cut.py's.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoConfig

from stillroom.artifact import write_atomically
from stillroom.errors import EnvironmentCannot, InputError
from stillroom.export.checkpoint import copy_companions, finish_config
from stillroom.export.writer import MAX_SHARD_BYTES, NewTensor, write_checkpoint
from stillroom.models.shape import ModelShape, read_config, shape_of
from stillroom.models.tensors import read_tensor, row_blocks
from stillroom.models.weights import TensorEntry, check_known, check_weights, family_entries
from stillroom.prune.cut import Cut, cut_shape, rescales_of, source_places, tensor_cut

FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")
"""As safetensors names them."""


def source_shape(model_dir: Path) -> ModelShape:
    """The shape of a checkpoint that can be cut, per-layer fields of its config spelled out.

    transformers derives a missing `layer_types` from the layer's index, which cutting changes. Raises InputError for a
    quantized checkpoint, unknown tensors, and whatever `check_weights` finds.
    """
    config = read_config(model_dir)
    if "quantization_config" in config or (model_dir / "hf_quant_config.json").exists():
        raise InputError(f"{model_dir} is quantized; prune before quantizing: put the prune stage before quantize")
    shape = shape_of(config, str(model_dir))
    entries = family_entries(model_dir, shape.family)
    if shape.tied and not _is_tied(shape, entries):
        shape = dataclasses.replace(shape, tied=False)
    check_weights(model_dir, shape)
    _check_known(model_dir, shape, entries)
    if absent := [field for field in shape.family.per_layer_lists if config.get(field) is None]:
        full = AutoConfig.from_pretrained(model_dir, local_files_only=True)
        config = {**config, **{field: list(getattr(full, field)) for field in absent}}
    return dataclasses.replace(shape, config=config)


def _is_tied(shape: ModelShape, entries: Mapping[str, TensorEntry]) -> bool:
    """Whether a head that was written for all its being tied is the embedding; transformers 5 does not tie it where it
    is not (T5 v1.1 and FLAN-T5, whose config it rewrites to tied)."""
    head, embedding = entries.get(shape.family.tied_tensors[0]), entries.get(shape.family.embedding)
    if head is None or embedding is None:
        return True
    if (head.shape, head.dtype) != (embedding.shape, embedding.dtype):
        return False
    blocks = zip(row_blocks(head), row_blocks(embedding), strict=True)
    return all(torch.equal(rows, others) for (_, rows), (_, others) in blocks)


def cut_checkpoint(
    source_dir: Path,
    shape: ModelShape,
    cut: Cut,
    out_dir: Path,
    *,
    norm_shares: Mapping[str, Tensor] | None = None,
    norm_means: Mapping[str, Tensor] | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> ModelShape:
    """Write what `cut` leaves of `source_dir` (whose `source_shape` is `shape`) to `out_dir`; returns the new shape.

    `norm_shares` are needed when hidden channels go, or heads that a norm is over: for each such norm, by module name,
    each channel's mean share of its input's sum of squares (for layer norms: about its mean). `norm_means` are needed
    for layer norms when hidden channels go: each channel's mean after normalizing, before scale and bias. Both are
    (channels,). `progress` is told tensors done and in all.
    Raises InputError for NaN or infinite weights, EnvironmentCannot for a full disk.
    """
    target = cut_shape(shape, cut)
    entries = family_entries(source_dir, shape.family)
    plan = {name: source for name, source in source_places(shape, target, cut).items() if source in entries}
    rescales = rescales_of(shape, cut, norm_shares, norm_means, lambda name: read_tensor(entries[name]))
    new = {name: NewTensor(entries[source].dtype, target.tensor_shape(name)) for name, source in plan.items()}
    out_dir.mkdir(parents=True, exist_ok=True)
    _check_room(out_dir, sum(tensor.num_bytes for tensor in new.values()))

    def blocks(name: str) -> Iterator[Tensor]:
        this_cut = tensor_cut(plan[name], shape, cut, rescales)
        for first_row, rows in row_blocks(entries[plan[name]]):
            yield this_cut.of_rows(rows, first_row)

    write_checkpoint(out_dir, new, blocks, max_shard_bytes=max_shard_bytes, progress=progress)
    write_atomically(out_dir / "config.json", json.dumps(target.config, indent=2) + "\n")
    copy_companions(source_dir, out_dir)
    finish_config(out_dir)
    return target


def _check_known(model_dir: Path, shape: ModelShape, entries: Mapping[str, TensorEntry]) -> None:
    """Raise InputError for tensors that the family does not have, or that hold no plain floating point numbers."""
    check_known(model_dir, shape)
    known = [name for name in shape.places if name in entries]
    if odd := [name for name in known if entries[name].dtype not in FLOAT_DTYPES]:
        raise InputError(
            f"{model_dir}: {odd[0]} is {entries[odd[0]].dtype}; only {', '.join(FLOAT_DTYPES)} can be pruned: prune "
            "before quantizing"
        )


def _check_room(out_dir: Path, num_bytes: int) -> None:
    free = shutil.disk_usage(out_dir).free
    if num_bytes > free:
        raise EnvironmentCannot(
            f"{out_dir} has {free} bytes free; the pruned model needs {num_bytes}: free some or move --out"
        )
