"""The verdict as data: verdict.json holds all that the tables and the report show, so both can be made again from it.

Numbers stay what they were measured as, with unit, sample count and standard error; nothing is rounded here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from stillroom.artifact import Measurement
from stillroom.errors import InputError
from stillroom.prune.explain import Explanation
from stillroom.prune.frontier import Frontier
from stillroom.verdict.gates import GateResult

VERDICT_FILE = "verdict.json"

Role = Literal["dense", "stage", "baseline"]


class Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings")


class Row(Frozen):
    """One variant: the dense model, a stage's result, or a baseline."""

    variant: str
    role: Role
    kind: str
    """Of the stage that made it; `import` for models that came as they are."""
    artifact_key: str
    path: str
    """Its checkpoint directory."""
    config: dict[str, Any] = {}
    seconds: float = 0.0
    """That the stage took."""
    measurements: dict[str, Measurement] = {}
    """By name."""
    not_measured: dict[str, str] = {}
    """Why there are no numbers of that kind (`quality`, `speed`)."""
    verified: bool | None = None
    """Whether the exported checkpoint passed its verification; None: it was not verified."""
    notes: tuple[str, ...] = ()
    """What a reader must know beside the numbers."""

    def value(self, metric: str) -> float | None:
        found = self.measurements.get(metric)
        return None if found is None else found.value


class Standing(Frozen):
    """How the final variant stands against a baseline."""

    baseline: str
    outcome: Literal["use the baseline", "keep", "trade-off", "not comparable"]
    sentence: str


class LossPoint(Frozen):
    """One logged step of a distillation."""

    step: int
    tokens: int
    loss: float


class Verdict(Frozen):
    """Whether the result is worth serving, and everything that says so."""

    schema_version: Literal[1] = 1
    recipe: str
    sentence: str
    """In plain words."""
    passed: bool
    """Every gate passed and every verification too."""
    final: str
    """The variant that is judged."""
    headline: str | None
    """The quality metric that stands for the others in sentences and plots."""
    rows: tuple[Row, ...]
    gates: tuple[GateResult, ...] = ()
    baselines: tuple[Standing, ...] = ()
    bench: dict[str, Any] = {}
    """Engine, its version, hardware and load of the throughput measurement."""
    environment: dict[str, str] = {}
    """Library versions and hardware."""
    seed: int = 0
    losses: dict[str, tuple[LossPoint, ...]] = {}
    """By distill stage."""
    prunes: dict[str, Explanation] = {}
    """What went and what it cost, by prune stage."""
    frontiers: dict[str, Frontier] = {}
    """What was tried, by prune stage that searched for a target."""

    def row(self, variant: str) -> Row:
        return next(row for row in self.rows if row.variant == variant)

    def measured(self) -> Mapping[str, Mapping[str, Measurement]]:
        return {row.variant: row.measurements for row in self.rows}


def load_verdict(path: Path) -> Verdict:
    """The verdict at `path`, a verdict.json or a directory that holds one. Raises InputError when there is none."""
    file = path / VERDICT_FILE if path.is_dir() else path
    try:
        return Verdict.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} holds no {VERDICT_FILE}; finish the run with `stillroom run`") from None
    except ValidationError as error:
        first = error.errors()[0]
        raise InputError(
            f"{file} is no verdict that this version reads ({'.'.join(map(str, first['loc']))}: {first['msg']}); "
            "run its recipe again"
        ) from error
