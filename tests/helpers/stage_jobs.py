"""Jobs for the text and distill stages, which may be killed and started again, and progress that can do the killing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs import artifact_at
from stillroom.artifact import Artifact
from stillroom.evaluation_text import EvaluationText
from stillroom.recipe import TextSource
from stillroom.stage import Job

__all__ = ["Killed", "Remembered", "artifact_at", "job_for", "kill_at"]


class Killed(BaseException):
    """Stands for SIGKILL: nothing in a stage may catch it."""


@dataclass
class Remembered:
    """Progress that keeps what it was told, and may do something at an update, such as stop the run."""

    updates: list[tuple[int, int, dict[str, float | str]]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)
    on_update: Callable[[int], None] | None = None

    def update(self, done: int, total: int, unit: str, **facts: float | str) -> None:
        self.updates.append((done, total, facts))
        if self.on_update is not None:
            self.on_update(done)

    def log(self, message: str) -> None:
        self.messages.append(message)


def kill_at(number: int) -> Remembered:
    """Progress that kills the run when so much is done."""

    def kill(done: int) -> None:
        if done >= number:
            raise Killed

    return Remembered(on_update=kill)


def job_for(
    config: Any,
    tmp_path: Path,
    *,
    inputs: Mapping[str, Artifact],
    text: tuple[TextSource, ...] = (),
    seed: int = 0,
    progress: Remembered | None = None,
    evaluated: EvaluationText | None = None,
) -> Job:
    """A job that writes into tmp_path/out and keeps its scratch in tmp_path/scratch; both may be there already."""
    for name in ("out", "scratch"):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    out, scratch = tmp_path / "out", tmp_path / "scratch"
    return Job("job", config, inputs, text, out, scratch, seed, progress or Remembered(), evaluated)
