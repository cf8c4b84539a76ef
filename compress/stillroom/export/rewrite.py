"""Replace the values of some tensors in a checkpoint directory; everything else stays byte for byte."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from torch import Tensor

from stillroom.export.writer import NewTensor, write_checkpoint
from stillroom.models.tensors import row_blocks
from stillroom.models.weights import INDEX, tensor_entries


def replace_tensors(model_dir: Path, values: Mapping[str, Tensor], work_dir: Path) -> None:
    """Give these tensors of the checkpoint new values of the same shape and dtype.

    The new files are written in `work_dir`, on the same file system, and moved when all are there. Raises
    EnvironmentCannot where the disk is full; the checkpoint is as before then.
    """
    entries = tensor_entries(model_dir)
    for name, value in values.items():
        assert tuple(value.shape) == entries[name].shape, name

    def blocks(name: str) -> Iterator[Tensor]:
        if name in values:
            yield values[name].cpu().contiguous()
        else:
            yield from (rows for _, rows in row_blocks(entries[name]))

    shutil.rmtree(work_dir, ignore_errors=True)
    write_checkpoint(work_dir, {name: NewTensor(e.dtype, e.shape) for name, e in entries.items()}, blocks)
    for file in {entry.file for entry in entries.values()}:
        file.unlink()
    (model_dir / INDEX).unlink(missing_ok=True)
    for path in work_dir.iterdir():
        shutil.move(path, model_dir / path.name)
    work_dir.rmdir()
