"""Artifacts: sealed or not there."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom import artifact as artifact_module
from stillroom.artifact import Manifest, artifact_key, damaged_files, open_artifact, seal, write_atomically
from stillroom.errors import InputError


def manifest(**fields: Any) -> Manifest:
    base = {
        "kind": "prune", "name": "prune", "key": "0" * 16, "stage_version": 1, "config": {}, "parents": {}, "files": {},
        "environment": {}, "seed": 0, "seconds": 1.0,
    }  # fmt: skip
    return Manifest.model_validate(base | fields)


def sealed(tmp_path: Path) -> artifact_module.Artifact:
    work = tmp_path / "work"
    work.mkdir()
    (work / "weights.bin").write_bytes(b"abc")
    (work / "sub").mkdir()
    (work / "sub" / "more.txt").write_text("text")
    return seal(work, tmp_path / "artifacts" / "prune-1", manifest())


def test_a_sealed_directory_opens_with_the_hash_of_every_file(tmp_path: Path) -> None:
    made = sealed(tmp_path)
    opened = open_artifact(made.path)
    assert opened == made
    assert set(made.manifest.files) == {"weights.bin", "sub/more.txt"}
    assert not (tmp_path / "work").exists()
    assert damaged_files(made) == []


def test_a_changed_byte_and_a_missing_file_are_found(tmp_path: Path) -> None:
    made = sealed(tmp_path)
    (made.path / "weights.bin").write_bytes(b"abd")
    (made.path / "sub" / "more.txt").unlink()
    assert sorted(damaged_files(made)) == ["sub/more.txt", "weights.bin"]


def test_a_directory_without_a_manifest_does_not_exist(tmp_path: Path) -> None:
    (tmp_path / "weights.bin").write_bytes(b"abc")
    assert open_artifact(tmp_path) is None
    assert open_artifact(tmp_path / "nowhere") is None


def test_a_broken_manifest_is_an_error_and_not_a_miss(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"kind": "prune"')
    with pytest.raises(InputError, match="is no manifest"):
        open_artifact(tmp_path)


def test_a_disk_that_fills_up_while_sealing_leaves_no_artifact(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(artifact_module, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"):
        sealed(tmp_path)
    assert open_artifact(tmp_path / "artifacts" / "prune-1") is None


def test_writing_atomically_keeps_the_old_file_when_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "state.json"
    write_atomically(path, "old")

    def fail(source: object, target: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3),
    max_leaves=5,
)


@given(config=st.dictionaries(st.text(max_size=5), json_values, max_size=4), version=st.integers(1, 9))
def test_the_key_depends_on_every_part_and_not_on_the_order(config: dict[str, Any], version: int) -> None:
    key = artifact_key("prune", version, config, {"source": "a"})
    assert key == artifact_key("prune", version, dict(reversed(config.items())), {"source": "a"})
    others = {
        artifact_key("distill", version, config, {"source": "a"}),
        artifact_key("prune", version + 1, config, {"source": "a"}),
        artifact_key("prune", version, {**config, "new field": 1}, {"source": "a"}),
        artifact_key("prune", version, config, {"source": "b"}),
    }
    assert key not in others
    assert len(others) == 4
