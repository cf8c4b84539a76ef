"""Read a checkpoint's tensors with plain reads: whole, or in blocks of rows, so that none need fit in memory.

`safe_open` maps the file, and every page of a map that was touched counts as resident until the system wants it back;
what is read here is resident only as long as its tensor lives.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from stillroom.errors import InputError
from stillroom.models.weights import TensorEntry

BLOCK_BYTES = 2**21
"""Small enough to stay in the processor's cache and for malloc to hand the same memory out again: cutting 3 GB took
1.6 to 2.2 s of CPU time with blocks of 1 to 4 MB, 3.1 to 5.0 s with 16 MB, which are mapped and faulted in anew."""
TORCH_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""The types that weights may have, by their names in safetensors files, in the order in which it lays them out."""


def read_tensor(entry: TensorEntry) -> Tensor:
    """A whole tensor on the CPU. Raises InputError where the file cannot be read."""
    return read_rows(entry, 0, _num_rows(entry)).reshape(entry.shape)


def row_blocks(entry: TensorEntry, block_bytes: int = BLOCK_BYTES) -> Iterator[tuple[int, Tensor]]:
    """A tensor from front to back: (first row, rows), each block of about `block_bytes` and at least one row.

    Raises InputError where the file cannot be read.
    """
    num_rows = _num_rows(entry)
    step = max(1, block_bytes * num_rows // max(1, entry.num_bytes))
    for start in range(0, num_rows, step):
        yield start, read_rows(entry, start, min(start + step, num_rows))


def read_rows(entry: TensorEntry, start: int, stop: int) -> Tensor:
    """Rows `start` to `stop` along the first dimension; a number without dimensions is one row."""
    row_shape = entry.shape[1:]
    row_bytes = math.prod(row_shape) * TORCH_DTYPES[entry.dtype].itemsize
    if _num_rows(entry) * row_bytes != entry.num_bytes:
        raise InputError(f"{entry.file}: a tensor's offsets contradict its shape {entry.shape}; fetch the file again")
    rows = torch.empty((stop - start, *row_shape), dtype=TORCH_DTYPES[entry.dtype])
    data = rows.reshape(-1).view(torch.uint8).numpy().data
    try:
        with entry.file.open("rb", buffering=0) as file:
            file.seek(entry.start + start * row_bytes)
            while data:
                if not (count := file.readinto(data)):
                    raise InputError(f"{entry.file} ends before its tensors do; fetch it again")
                data = data[count:]
    except OSError as error:
        raise InputError(f"{entry.file} cannot be read ({error.strerror}); fetch it again") from error
    return rows


def _num_rows(entry: TensorEntry) -> int:
    return entry.shape[0] if entry.shape else 1
