"""What is in a checkpoint's safetensors files, from their headers alone: names, shapes, dtypes, bytes. No torch.

A header is 8 bytes of length (little endian) and JSON; the offsets in it must cover the rest of the file exactly, so a
truncated download is found here, before any long work (safetensors' own format description).
"""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.errors import InputError
from stillroom.models.family import Family
from stillroom.models.shape import ModelShape

INDEX = "model.safetensors.index.json"
MAX_HEADER_BYTES = 100_000_000
"""The limit that the safetensors library itself sets."""


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies and what it is."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    start: int
    """Of its first byte in the file."""


def tensor_entries(model_dir: Path) -> dict[str, TensorEntry]:
    """Every tensor of a checkpoint directory. Raises InputError on missing, truncated or contradictory files."""
    entries: dict[str, TensorEntry] = {}
    for file in weight_files(model_dir):
        for name, entry in file_entries(file).items():
            if name in entries:
                raise InputError(f"{model_dir}: tensor {name} is in both {entries[name].file.name} and {file.name}")
            entries[name] = entry
    return entries


def family_entries(model_dir: Path, family: Family) -> dict[str, TensorEntry]:
    """The same under the names that the family's description uses, whatever an old checkpoint calls them."""
    entries: dict[str, TensorEntry] = {}
    for stored, entry in tensor_entries(model_dir).items():
        name = family.current_name(stored)
        if name in entries:
            raise InputError(f"{model_dir} holds the tensor {name} twice, once as {stored}")
        entries[name] = entry
    return entries


def weight_files(model_dir: Path) -> list[Path]:
    """The safetensors files of a checkpoint, by its index where it has one."""
    index = model_dir / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, AttributeError, TypeError) as error:
            raise InputError(f"{index} is no safetensors index: {error!r}") from error
        if bad := [name for name in names if Path(name).name != name]:
            raise InputError(f"{index} names {bad[0]!r}, which is not a file beside it")
        files = [model_dir / name for name in names]
        if missing := [file.name for file in files if not file.is_file()]:
            raise InputError(
                f"{model_dir} lacks {len(missing)} of its {len(files)} weight files: {', '.join(missing[:3])}"
            )
        return files
    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        pickled = sorted(p.name for p in model_dir.glob("*") if p.suffix in (".bin", ".pt", ".pth"))
        hint = f"; {pickled[0]} is pickled, which is never opened: convert it to safetensors" if pickled else ""
        raise InputError(f"{model_dir} has no .safetensors weights{hint}")
    return files


def check_weights(model_dir: Path, shape: ModelShape) -> None:
    """Every tensor that family and config promise is there, in its shape. Raises InputError naming the first that is
    not.

    For unquantized checkpoints; a tied lm_head that was written all the same is allowed.
    """
    entries = family_entries(model_dir, shape.family)
    expected = shape.tensor_shapes()
    expected |= {n: shape.tensor_shape(n) for n in shape.places if n in entries and n not in expected}
    if missing := [name for name in expected if name not in entries]:
        raise InputError(f"{model_dir} lacks {len(missing)} tensors that its config promises, the first: {missing[0]}")
    for name, wanted in expected.items():
        if entries[name].shape != wanted:
            raise InputError(f"{model_dir}: {name} has shape {entries[name].shape}; its config says {wanted}")


def check_known(model_dir: Path, shape: ModelShape) -> None:
    """Raise InputError where a checkpoint holds tensors that its family does not have: a variant with more modules."""
    known = {*shape.places, *shape.family.tied_tensors}
    names = family_entries(model_dir, shape.family)
    if unknown := [name for name in names if name not in known and not shape.family.is_ignored(name)]:
        raise InputError(
            f"{model_dir} holds {len(unknown)} tensors that a {shape.family.model_type} model with its config does not "
            f"have: {', '.join(unknown[:5])}; they would be lost, so this checkpoint cannot be pruned"
        )


def file_entries(file: Path) -> dict[str, TensorEntry]:
    """Every tensor of one safetensors file. Raises InputError where the file is truncated or damaged."""
    header, data_start = _header(file)
    data_bytes = file.stat().st_size - data_start
    entries = {}
    end = 0
    for name, fields in header.items():
        if name == "__metadata__":
            continue
        try:
            start, stop = map(int, fields["data_offsets"])
            shape = tuple(map(int, fields["shape"]))
            entries[name] = TensorEntry(file, str(fields["dtype"]), shape, stop - start, data_start + start)
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{file}: the header's entry for {name} is broken ({error!r})") from error
        end = max(end, stop)
    if end != data_bytes:
        raise InputError(
            f"{file} is truncated or damaged: its header describes {end} bytes of tensors, the file holds "
            f"{data_bytes}; "
            "fetch it again"
        )
    return entries


def _header(file: Path) -> tuple[dict[str, Any], int]:
    """The header's content, and where in the file the tensors' bytes begin."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        prefix = opened.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 0 < length <= min(size - 8, MAX_HEADER_BYTES):
            raise InputError(f"{file} is no safetensors file or is truncated (header of {length} bytes in {size})")
        try:
            header = json.loads(opened.read(length))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise InputError(f"{file} is no safetensors file: its header is not JSON") from error
    if not isinstance(header, dict):
        raise InputError(f"{file} is no safetensors file: its header is not an object")
    return header, 8 + length
