"""Artifacts: finished directories, each sealed by a manifest that is written last.

A stage writes beside, in a work directory; when it is done, every file is hashed and flushed, `manifest.json` is
written, and the directory is renamed into place in one step. So a directory without a manifest does not exist for
anybody, and a killed run leaves nothing that could be taken for a result.

The `key` of an artifact is the hash of everything that determines it: stage, the stage's own version, its config, and
the keys of what it read. Caching and resuming follow from it: same key, same artifact.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from stillroom.errors import InputError

MANIFEST = "manifest.json"
SCHEMA_VERSION = 1
KEY_LENGTH = 16

RECORDED_LIBRARIES = (
    "stillroom", "torch", "transformers", "nvidia-modelopt", "safetensors", "compressed-tensors", "lm-eval", "guidellm",
)  # fmt: skip


class Frozen(BaseModel):
    # a value that is not finite must survive its JSON: as null the manifest could not be read again
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Measurement(Frozen):
    """One number, with what it takes to judge it."""

    name: str
    """Dotted: `quality.python-docs.perplexity`, `speed.c16.output_tok_s`, `size.parameters`."""
    value: float
    unit: str
    n: int | None = None
    """Samples behind the value: tokens, questions, requests."""
    stderr: float | None = None
    """Standard error of the value, in its unit."""
    higher_is_better: bool | None = None
    """None for a plain fact, such as a count."""


class Manifest(Frozen):
    """What an artifact is and where it came from."""

    schema_version: Literal[1] = 1
    kind: str
    name: str
    key: str
    stage_version: int
    config: dict[str, Any]
    parents: dict[str, str]
    """Keys of what the stage read, by role."""
    files: dict[str, str]
    """sha256 of each file, by path relative to the artifact."""
    location: str | None = None
    """Where the model lies when it is not copied: a local directory or the hub's cache."""
    environment: dict[str, str]
    seed: int
    seconds: float
    tokens: int | None = None
    """Tokens that the stage trained on, generated or read, where that is its cost."""
    measurements: tuple[Measurement, ...] = ()
    details: dict[str, Any] = {}
    """What a reader of the result wants to know: kept layers, loss, drift."""


@dataclass(frozen=True)
class Artifact:
    """A sealed directory."""

    path: Path
    manifest: Manifest

    @property
    def key(self) -> str:
        return self.manifest.key

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def model_dir(self) -> Path:
        """The plain Hugging Face checkpoint directory of a model artifact."""
        return Path(self.manifest.location) if self.manifest.location else self.path


def artifact_key(kind: str, stage_version: int, config: dict[str, Any], parents: dict[str, str]) -> str:
    """The first 16 hex digits of the sha256 of all that determines a result."""
    canonical = json.dumps(
        {"kind": kind, "stage_version": stage_version, "config": config, "parents": parents},
        sort_keys=True,
        separators=(",", ":"),
    )
    return hashlib.sha256(canonical.encode()).hexdigest()[:KEY_LENGTH]


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def environment() -> dict[str, str]:
    """Versions and hardware of this machine, without importing any of the libraries."""
    facts = {"python": platform.python_version(), "machine": platform.machine(), "system": platform.system()}
    for library in RECORDED_LIBRARIES:
        try:
            facts[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        driver = Path("/proc/driver/nvidia/version").read_text(encoding="utf-8")
        facts["nvidia_driver"] = driver.splitlines()[0].split("Module")[-1].strip()
    except OSError:
        pass
    return facts


def open_artifact(path: Path) -> Artifact | None:
    """The artifact at `path`, or None where there is no sealed one. Raises InputError on a broken manifest."""
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        return Artifact(path, Manifest.model_validate_json(text))
    except ValidationError as error:
        raise InputError(
            f"{path / MANIFEST} is no manifest that this version reads ({error.error_count()} errors, first: "
            f"{error.errors()[0]['msg']}); remove {path} and run again"
        ) from error


def damaged_files(artifact: Artifact) -> list[str]:
    """Files of the artifact that are missing or whose bytes differ from the manifest's hashes."""
    damaged = []
    for name, digest in artifact.manifest.files.items():
        file = artifact.model_dir / name if artifact.manifest.location else artifact.path / name
        if not file.is_file() or file_sha256(file) != digest:
            damaged.append(name)
    return damaged


def seal(work_dir: Path, final_dir: Path, manifest: Manifest) -> Artifact:
    """Hash and flush every file in `work_dir`, write the manifest last, and rename to `final_dir` in one step.

    `manifest.files` is filled in here, unless the model lies elsewhere (`location`) and was hashed there.
    """
    files = dict(manifest.files)
    for path in sorted(work_dir.rglob("*")):
        if path.is_file():
            files[path.relative_to(work_dir).as_posix()] = file_sha256(path)
            _flush(path)
    manifest = manifest.model_copy(update={"files": files})
    write_atomically(work_dir / MANIFEST, manifest.model_dump_json(indent=2) + "\n")
    if final_dir.exists():  # without a manifest it is nobody's; with one the stage would not have run
        shutil.rmtree(final_dir)
    final_dir.parent.mkdir(parents=True, exist_ok=True)
    os.rename(work_dir, final_dir)
    _flush(final_dir.parent)
    return Artifact(final_dir, manifest)


def write_atomically(path: Path, text: str) -> None:
    """Write beside, flush, rename: readers see the old file or the new one, never a part."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        _flush(beside)
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
