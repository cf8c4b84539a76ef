"""Writing checkpoints block by block: the same files as safetensors writes, and nothing where it fails."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from stillroom.errors import EnvironmentCannot, InputError
from stillroom.export.writer import NewTensor, write_checkpoint
from stillroom.models.tensors import TORCH_DTYPES, read_rows, read_tensor, row_blocks
from stillroom.models.weights import INDEX, tensor_entries

NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def described(tensors: dict[str, Tensor]) -> dict[str, NewTensor]:
    return {name: NewTensor(NAMES[tensor.dtype], tuple(tensor.shape)) for name, tensor in tensors.items()}


def bits(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


@st.composite
def some_tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    """Up to six tensors of any type, with no to three dimensions, some of them empty."""
    names = draw(st.lists(st.text(min_size=1, max_size=8).filter(lambda n: n.isprintable()), unique=True, min_size=1))
    tensors = {}
    for name in names[:6]:
        size = draw(st.lists(st.integers(0, 5), max_size=3))
        tensors[name] = torch.randn(size).to(draw(st.sampled_from(list(NAMES))))
    return tensors


@settings(max_examples=60, deadline=None)
@given(tensors=some_tensors(), block_bytes=st.integers(1, 100))
def test_one_file_is_byte_for_byte_what_safetensors_writes(
    tensors: dict[str, Tensor], block_bytes: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("drawn")
    save_file(tensors, folder / "theirs.safetensors", metadata={"format": "pt"})
    entries = tensor_entries(folder)

    def blocks(name: str) -> Iterator[Tensor]:
        yield from (rows for _, rows in row_blocks(entries[name], block_bytes))

    write_checkpoint(folder / "ours", described(tensors), blocks)
    assert (folder / "ours" / "model.safetensors").read_bytes() == (folder / "theirs.safetensors").read_bytes()
    for name, tensor in tensors.items():
        assert torch.equal(bits(read_tensor(entries[name])), bits(tensor))


def test_shards_hold_what_fits_and_the_index_says_where(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((5, 5), float(i)) for i in range(7)}
    told: list[tuple[int, int]] = []
    write_checkpoint(
        tmp_path,
        described(tensors),
        lambda name: [tensors[name][:2], tensors[name][2:]],
        max_shard_bytes=350,
        progress=lambda done, total: told.append((done, total)),
    )
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"]["total_size"] == 7 * 100
    assert len(set(index["weight_map"].values())) == 3
    assert told == [(i, 7) for i in range(1, 8)]
    for file in tmp_path.glob("*.safetensors"):
        content = load_file(file)
        save_file(content, tmp_path / "theirs", metadata={"format": "pt"})
        assert file.read_bytes() == (tmp_path / "theirs").read_bytes()
        assert all(
            index["weight_map"][name] == file.name and torch.equal(content[name], tensors[name]) for name in content
        )


def test_whatever_goes_wrong_while_a_tensor_is_made_leaves_no_file(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.ones(5, 5) for i in range(7)}
    threads_before = threading.active_count()

    def blocks(name: str) -> Iterator[Tensor]:
        if name == "t5":
            raise InputError("t5 is damaged")
        yield tensors[name]

    with pytest.raises(InputError, match="t5 is damaged"):
        write_checkpoint(tmp_path, described(tensors), blocks, max_shard_bytes=200)
    assert list(tmp_path.iterdir()) == []
    assert threading.active_count() == threads_before


def test_a_disk_that_fills_up_on_the_way_is_the_environments_fault_and_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / ".model.safetensors.part").symlink_to("/dev/full")
    with pytest.raises(EnvironmentCannot, match="could not be written: No space left on device"):
        write_checkpoint(tmp_path, {"t": NewTensor("F32", (2,))}, lambda name: [torch.ones(2)])
    assert list(tmp_path.iterdir()) == []


def test_rows_are_read_from_their_place(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(3), "b": torch.randn(10, 2, 3).to(torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors")
    entry = tensor_entries(tmp_path)["b"]
    assert torch.equal(read_rows(entry, 4, 9), tensors["b"][4:9])
    assert [(first, len(rows)) for first, rows in row_blocks(entry, block_bytes=36)] == [(0, 3), (3, 3), (6, 3), (9, 1)]


def test_a_file_that_shrinks_while_it_is_read_is_named(tmp_path: Path) -> None:
    save_file({"a": torch.randn(300)}, tmp_path / "model.safetensors")
    entry = tensor_entries(tmp_path)["a"]
    os.truncate(entry.file, entry.start + 100)
    with pytest.raises(InputError, match=r"model\.safetensors ends before its tensors do"):
        read_tensor(entry)
    entry.file.unlink()
    with pytest.raises(InputError, match="cannot be read"):
        read_tensor(entry)


def test_offsets_that_contradict_a_shape_are_refused(tmp_path: Path) -> None:
    save_file({"a": torch.randn(4), "b": torch.randn(4)}, tmp_path / "model.safetensors")
    content = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content.replace(b'"shape":[4]', b'"shape":[2]', 1))
    with pytest.raises(InputError, match="contradict its shape"):
        read_tensor(tensor_entries(tmp_path)["a"])
