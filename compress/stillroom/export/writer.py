"""Write a sharded safetensors checkpoint of any size in the memory of a few blocks.

safetensors' own `save_file` wants all tensors of a file at once, 5 GB for a shard of the usual size. But a file is only
a header (names, dtypes, shapes, offsets: known beforehand) and the tensors' bytes one after another, so it can be
written block by block. While one block is written, the next is made in another thread; that hides the making behind the
disk. Each file is the same, byte for byte, as what `save_file` writes for its tensors: the largest dtype first, then by
name; compact JSON, padded with spaces to a multiple of eight bytes (the format's description and its Rust sources).

Nothing half-written is left behind: each file is written beside and renamed, and on any error all of them go. Flushing
to the disk is left to whoever seals the directory.
"""

from __future__ import annotations

import io
import json
import math
import struct
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from stillroom.artifact import write_atomically
from stillroom.errors import EnvironmentCannot
from stillroom.models.tensors import TORCH_DTYPES
from stillroom.models.weights import INDEX

MAX_SHARD_BYTES = 5_000_000_000


@dataclass(frozen=True)
class NewTensor:
    """What a tensor will be; `dtype` as safetensors names it, one of TORCH_DTYPES."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * TORCH_DTYPES[self.dtype].itemsize


def write_checkpoint(
    out_dir: Path,
    tensors: Mapping[str, NewTensor],
    blocks: Callable[[str], Iterable[Tensor]],
    *,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Write `tensors`, in their order, as `model.safetensors` or as shards with an index.

    `blocks(name)` gives the content of a tensor from front to back: blocks whose elements, one block after another, are
    the tensor's in row-major order, in its dtype. It runs in a thread of its own, one tensor at a time. `progress` is
    told tensors done and in all.
    Raises EnvironmentCannot where the disk is full. Whatever is raised, by `blocks` too, no file is left.
    """
    out_dir.mkdir(parents=True, exist_ok=True)
    shards = {file: _in_file_order(names, tensors) for file, names in _shards(tensors, max_shard_bytes).items()}
    stream = _made_ahead(block for names in shards.values() for name in names for block in blocks(name))
    written: list[Path] = []
    done = 0
    try:
        with closing(stream):
            for file_name, names in shards.items():
                beside = out_dir / f".{file_name}.part"
                written.append(beside)
                for _ in _write_file(beside, {name: tensors[name] for name in names}, stream):
                    done += 1
                    progress(done, len(tensors))
                written[-1] = beside.rename(out_dir / file_name)
        if len(shards) > 1:
            _write_index(shards, tensors, out_dir)
    except BaseException:
        for path in written:
            path.unlink(missing_ok=True)
        raise


def _shards(tensors: Mapping[str, NewTensor], max_shard_bytes: int) -> dict[str, list[str]]:
    """Tensors by file, in order, each file as full as `max_shard_bytes` allows."""
    groups: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if groups[-1] and filled + tensor.num_bytes > max_shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += tensor.num_bytes
    if len(groups) == 1:
        return {"model.safetensors": groups[0]}
    return {f"model-{i:05d}-of-{len(groups):05d}.safetensors": group for i, group in enumerate(groups, start=1)}


def _in_file_order(names: Iterable[str], tensors: Mapping[str, NewTensor]) -> list[str]:
    order = list(TORCH_DTYPES)
    return sorted(names, key=lambda name: (order.index(tensors[name].dtype), name))


def _write_file(path: Path, tensors: Mapping[str, NewTensor], stream: Iterator[Tensor]) -> Iterator[str]:
    """Write one file from the blocks that come next; yields the name of each tensor that is complete."""
    with path.open("wb", buffering=0) as file:
        _write(file, _header(tensors))
        for name, tensor in tensors.items():
            missing = tensor.num_bytes
            while missing:
                block = next(stream)
                assert block.dtype == TORCH_DTYPES[tensor.dtype], (name, block.dtype)
                _write(file, block.contiguous().reshape(-1).view(torch.uint8).numpy().data)
                missing -= block.nbytes
            assert not missing, (name, missing)
            yield name


def _header(tensors: Mapping[str, NewTensor]) -> bytes:
    """The length and the JSON that come before the tensors' bytes."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        stop = start + tensor.num_bytes
        fields[name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (start, stop)}
        start = stop
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write(file: io.FileIO, data: bytes | memoryview) -> None:
    remaining = memoryview(data)
    try:
        while remaining:
            remaining = remaining[file.write(remaining) :]
    except OSError as error:
        raise EnvironmentCannot(f"{file.name!s} could not be written: {error.strerror}") from error


def _made_ahead(blocks: Iterator[Tensor]) -> Generator[Tensor]:
    """The blocks that are not empty, each made in another thread while the caller uses the one before."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        upcoming = pool.submit(next, blocks, None)
        while (block := upcoming.result()) is not None:
            upcoming = pool.submit(next, blocks, None)
            if block.numel():
                yield block


def _write_index(shards: Mapping[str, list[str]], tensors: Mapping[str, NewTensor], out_dir: Path) -> None:
    weight_map = {name: file_name for file_name, names in shards.items() for name in names}
    total_bytes = sum(tensor.num_bytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    write_atomically(out_dir / INDEX, json.dumps(index, indent=2) + "\n")
