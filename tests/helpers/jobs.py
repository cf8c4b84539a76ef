"""Jobs for testing one stage by itself: artifacts around plain directories, and progress that is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stillroom.artifact import Artifact, Manifest
from stillroom.recipe import TextSource
from stillroom.stage import Job


class Kept:
    """Progress that remembers what a stage said."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.updates: list[tuple[int, int, str]] = []

    def update(self, done: int, total: int, unit: str, **facts: float | str) -> None:
        self.updates.append((done, total, unit))

    def log(self, message: str) -> None:
        self.lines.append(message)


def artifact_at(model_dir: Path, kind: str = "import", name: str = "dense", **details: Any) -> Artifact:
    """An artifact whose model is the directory as it is, unsealed."""
    manifest = Manifest(
        kind=kind, name=name, key="0" * 16, stage_version=1, config={}, parents={}, files={}, environment={}, seed=0,
        seconds=0.0, details=details,
    )  # fmt: skip
    return Artifact(model_dir, manifest)


def job_of(
    config: Any, inputs: dict[str, Artifact], text: Path, folder: Path, *, name: str = "stage", seed: int = 0
) -> Job:
    """A job that reads one text file and works under `folder`."""
    out, scratch = folder / "out", folder / "scratch"
    out.mkdir(parents=True)
    scratch.mkdir()
    return Job(name, config, inputs, (TextSource(source=str(text)),), out, scratch, seed, Kept())
