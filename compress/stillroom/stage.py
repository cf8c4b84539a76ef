"""What a stage is: a function from a Job to a StageResult, found in a literal table.

A new stage is three things: a config class in recipe.py, a module with `run(job)`, and a line in STAGES. The pipeline
does the rest (keys, caching, sealing, resuming). A stage writes its result into `job.out_dir` only; what it needs to
continue after a kill goes into `job.scratch_dir`, which survives until the stage is sealed.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from stillroom.artifact import Artifact, Measurement
from stillroom.evaluation_text import EvaluationText
from stillroom.recipe import TextSource


class Progress(Protocol):
    """Where a stage says how far it is. A terminal shows bars, CI plain lines, `--json` events."""

    def update(self, done: int, total: int, unit: str, **facts: float | str) -> None:
        """`done` of `total` units; facts such as loss or tok_s are shown beside."""

    def log(self, message: str) -> None:
        """One line that stays."""


@dataclass(frozen=True)
class Job:
    """All that a stage may read, and where it may write."""

    name: str
    config: Any
    """The stage's own config model."""
    inputs: Mapping[str, Artifact]
    """Sealed results by role: `source`, `dense`, `text:LABEL` (what the teacher wrote), or a variant's name."""
    text: tuple[TextSource, ...]
    """The text that this stage may look at."""
    out_dir: Path
    """Empty at the start; its files become the artifact."""
    scratch_dir: Path
    """Kept across kills, thrown away when the stage is sealed."""
    seed: int
    progress: Progress
    evaluated: EvaluationText | None = None
    """What `text` is kept clear of; None: nothing."""

    @property
    def source(self) -> Artifact:
        return self.inputs["source"]

    @property
    def dense(self) -> Artifact:
        return self.inputs["dense"]


@dataclass(frozen=True)
class StageResult:
    """What a stage says about what it wrote."""

    tokens: int | None = None
    measurements: tuple[Measurement, ...] = ()
    details: dict[str, Any] = field(default_factory=dict)
    location: Path | None = None
    """Set when the model stays where it is and only its hashes are kept; `files` holds them."""
    files: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class StageKind:
    """A row of the table: where the code is, and its version (a new one makes old results stale)."""

    target: str
    version: int
    writes_model: bool

    def load(self) -> Callable[[Job], StageResult]:
        """Import the stage; this is where torch comes in."""
        module, _, function = self.target.partition(":")
        loaded: Callable[[Job], StageResult] = getattr(importlib.import_module(module), function)
        return loaded


STAGES: dict[str, StageKind] = {
    "import": StageKind("stillroom.models.importer:run", version=1, writes_model=True),
    "text": StageKind("stillroom.distill.teacher:run", version=1, writes_model=False),
    "prune": StageKind("stillroom.prune.stage:run", version=2, writes_model=True),
    "distill": StageKind("stillroom.distill.stage:run", version=1, writes_model=True),
    "quantize": StageKind("stillroom.quantize.stage:run", version=1, writes_model=True),
    "verify": StageKind("stillroom.export.verify:run", version=1, writes_model=False),
    "evaluate": StageKind("stillroom.quality.stage:run", version=1, writes_model=False),
    "bench": StageKind("stillroom.speed.stage:run", version=1, writes_model=False),
    "verdict": StageKind("stillroom.verdict.stage:run", version=2, writes_model=False),
}


def canonical_config(config: BaseModel) -> dict[str, Any]:
    """The config as plain data, without the names that do not change a result."""
    return config.model_dump(mode="json", exclude={"name", "source"})
