"""Whether a checkpoint's weights are numbers at all, before hours are spent on them. No torch.

A floating point number is NaN or infinite exactly when all bits of its exponent are set, so the files are read as
integers and masked, a block at a time: about as fast as the disk gives them. The answer is remembered like a file's
hash is, so that a model is read once and not each run.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.errors import InputError
from stillroom.models.source import remembered
from stillroom.models.weights import TensorEntry, file_entries, weight_files

EXPONENTS = {
    "BF16": ("<u2", 0x7F80),
    "F16": ("<u2", 0x7C00),
    "F32": ("<u4", 0x7F800000),
    "F64": ("<u8", 0x7FF0000000000000),
}
"""The integer of the same width and the bits of the exponent, by the name that safetensors files give the type."""

BLOCK_BYTES = 1 << 24


def check_finite(model_dir: Path) -> None:
    """Raise InputError naming the first tensor of a checkpoint that holds NaN or infinite values."""
    for file in weight_files(model_dir):
        if name := remembered(file, "finite.json", first_not_finite):
            raise InputError(
                f"{model_dir}: {name} in {file.name} holds NaN or infinite values; fetch the model again, or take "
                "another checkpoint of it"
            )


def first_not_finite(file: Path) -> str:
    """The first tensor of a safetensors file that holds such values, or nothing."""
    bad = (name for name, entry in file_entries(file).items() if entry.dtype in EXPONENTS and not _is_finite(entry))
    return next(bad, "")


def _is_finite(entry: TensorEntry) -> bool:
    integer, mask = EXPONENTS[entry.dtype]
    exponent = np.array(mask, dtype=integer)
    return not any(bool(((block & exponent) == exponent).any()) for block in _blocks(entry, integer))


def _blocks(entry: TensorEntry, integer: str) -> Iterator[np.ndarray[Any, Any]]:
    with entry.file.open("rb") as file:
        file.seek(entry.start)
        for start in range(0, entry.num_bytes, BLOCK_BYTES):
            yield np.frombuffer(file.read(min(BLOCK_BYTES, entry.num_bytes - start)), dtype=integer)
