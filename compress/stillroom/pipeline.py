"""Run a plan in a run directory: skip what is sealed, seal what is done, survive being killed at any moment.

RUN/run.json        says that the directory is ours, which recipe ran last, and which artifact has which name
RUN/recipe.yaml     the recipe as resolved, overrides included
RUN/artifacts/      sealed results, NAME-KEY
RUN/work/           what is being written; a killed stage goes on from its scratch
RUN/model           link to the final stage's checkpoint, ready to serve
RUN/verdict.json, RUN/report.html    links into the verdict's artifact
RUN/events.jsonl    what happened, one JSON object a line
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from stillroom.artifact import Artifact, Manifest, Measurement, environment, open_artifact, seal, write_atomically
from stillroom.console import Reporter, quiet_libraries
from stillroom.errors import EnvironmentCannot, InputError
from stillroom.models.shape import read_config, shape_of
from stillroom.models.weights import tensor_entries
from stillroom.plan import ARTIFACTS, Plan, Step, cached
from stillroom.stage import STAGES, Job, StageResult, canonical_config

RUN_FILE = "run.json"


class VerifyFailed(Exception):
    """An exported checkpoint does not hold what its source promised; the run stops before anything is served."""


@dataclass(frozen=True)
class RunResult:
    """Every step's artifact by name, and which of them this run had to make."""

    run_dir: Path
    artifacts: Mapping[str, Artifact]
    ran: tuple[str, ...]

    @property
    def verdict_dir(self) -> Path:
        return self.artifacts["verdict"].path


def run_plan(
    plan: Plan, run_dir: Path, reporter: Reporter, *, force: tuple[str, ...] = (), until: str | None = None
) -> RunResult:
    """Bring every step of the plan to a sealed artifact in `run_dir`.

    With `until` only that step and what it needs; what is sealed of the others stays in the run. `force` names steps
    to run again, with everything that reads them. Raises InputError for a directory that is not ours,
    EnvironmentCannot when another run holds it, VerifyFailed when a checkpoint does not pass its verification.
    """
    prepare_run_dir(run_dir)
    with lock(run_dir):
        drop_forced(plan, run_dir, force)
        write_atomically(run_dir / "recipe.yaml", yaml.safe_dump(plan.recipe.model_dump(mode="json"), sort_keys=False))
        artifacts: dict[str, Artifact] = {}
        ran: list[str] = []
        wanted = [step.name for step in (plan.up_to(until) if until else plan).steps]
        for step in plan.steps:
            artifact = cached(step, run_dir)
            if artifact is None:
                if step.name not in wanted:
                    continue
                ran.append(step.name)
                number = f"{wanted.index(step.name) + 1}/{len(wanted)}"
                artifact = run_step(step, artifacts, run_dir, reporter, number)
            else:
                reporter.cached(step.name, artifact)
            artifacts[step.name] = artifact
            link_results(plan, artifacts, run_dir)
            if step.kind == "verify" and step.name in wanted:
                require_verified(step.name, artifact)
        if until is None:
            discard_finished_work(run_dir)
        return RunResult(run_dir, artifacts, tuple(ran))


def run_step(step: Step, artifacts: Mapping[str, Artifact], run_dir: Path, reporter: Reporter, number: str) -> Artifact:
    """Run one step in its work directory and seal the result."""
    work = run_dir / "work" / step.dir_name
    out, scratch = work / "out", work / "scratch"
    shutil.rmtree(out, ignore_errors=True)  # what a killed attempt left half-written
    out.mkdir(parents=True)
    scratch.mkdir(exist_ok=True)
    inputs = {role: artifacts[name] for role, name in step.inputs.items()}
    reporter.started(step.name, step.kind, number)
    began = time.monotonic()
    progress = reporter.progress(step.name)
    job = Job(step.name, step.config, inputs, step.text, out, scratch, step.seed, progress, step.evaluated)
    try:
        quiet_libraries()
        run_stage = STAGES[step.kind].load()
        quiet_libraries()
        result = run_stage(job)
        artifact = seal(
            out, run_dir / ARTIFACTS / step.dir_name, manifest_of(step, result, inputs, out, time.monotonic() - began)
        )
    except BaseException:
        reporter.stopped(step.name)
        shutil.rmtree(out, ignore_errors=True)  # scratch stays: the next run goes on from it
        raise
    shutil.rmtree(work)
    reporter.finished(step.name, artifact)
    return artifact


def manifest_of(step: Step, result: StageResult, inputs: Mapping[str, Artifact], out: Path, seconds: float) -> Manifest:
    measurements = result.measurements
    if STAGES[step.kind].writes_model:
        measurements = (*model_size(result.location or out), *measurements)
    return Manifest(
        kind=step.kind,
        name=step.name,
        key=step.key,
        stage_version=STAGES[step.kind].version,
        config=canonical_config(step.config) | {"text": [source.model_dump(mode="json") for source in step.text]},
        parents={role: artifact.key for role, artifact in inputs.items()},
        files=result.files,
        location=str(result.location) if result.location else None,
        environment=environment(),
        seed=step.seed,
        seconds=round(seconds, 3),
        tokens=result.tokens,
        measurements=measurements,
        details=result.details,
    )


def model_size(model_dir: Path) -> tuple[Measurement, ...]:
    """Parameters as the config says, and the bytes that the weight files hold."""
    weight_bytes = sum(entry.num_bytes for entry in tensor_entries(model_dir).values())
    num_params = shape_of(read_config(model_dir), str(model_dir)).num_params
    return (
        Measurement(name="size.parameters", value=num_params, unit="parameters", higher_is_better=False),
        Measurement(name="size.weight_bytes", value=weight_bytes, unit="bytes", higher_is_better=False),
    )


def require_verified(name: str, artifact: Artifact) -> None:
    """Raises VerifyFailed with the reasons that the verify stage found."""
    if not artifact.manifest.details.get("passed", False):
        reasons = "; ".join(artifact.manifest.details.get("failures", ["no reason recorded"]))
        raise VerifyFailed(f"{name} failed: {reasons}")


def prepare_run_dir(run_dir: Path) -> None:
    """Make the directory, or check that it is a run of ours. Raises InputError when it holds something else."""
    check_run_dir(run_dir)
    if not (run_dir / RUN_FILE).exists():
        run_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(
            run_dir / RUN_FILE, json.dumps({"schema_version": 1, "recipe": None, "final": None, "artifacts": {}}) + "\n"
        )


def check_run_dir(run_dir: Path) -> None:
    """Raise InputError for what is neither new nor a run of ours."""
    if run_dir.exists() and not run_dir.is_dir():
        raise InputError(f"--out {run_dir} is a file; give a new directory or one of an earlier run")
    if run_dir.is_dir() and not (run_dir / RUN_FILE).exists() and any(run_dir.iterdir()):
        raise InputError(f"--out {run_dir} is not empty and holds no run of stillroom; give a new directory")


@contextlib.contextmanager
def lock(run_dir: Path) -> Iterator[None]:
    """Hold the run directory; the kernel lets go of it when this process ends, however it ends."""
    with (run_dir / ".lock").open("a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise EnvironmentCannot(
                f"another run (process {file.read().strip() or 'unknown'}) is working in {run_dir}; wait for it or "
                f"give "
                "another --out"
            ) from None
        file.seek(0)
        file.truncate()
        file.write(str(os.getpid()))
        file.flush()
        yield


def drop_forced(plan: Plan, run_dir: Path, force: tuple[str, ...]) -> None:
    """Remove the artifacts of the forced steps and of all that read them."""
    names = [step.name for step in plan.steps]
    if unknown := [name for name in force if name not in names]:
        raise InputError(f"--force {unknown[0]!r} is no step of this recipe; steps: {', '.join(names)}")
    stale = set(force)
    for step in plan.steps:
        if step.name in stale or stale & set(step.inputs.values()):
            stale.add(step.name)
            shutil.rmtree(run_dir / "work" / step.dir_name, ignore_errors=True)
            if (artifact := cached(step, run_dir)) is not None:
                shutil.rmtree(artifact.path)


def link_results(plan: Plan, artifacts: Mapping[str, Artifact], run_dir: Path) -> None:
    """Point run.json and the links at the results so far."""
    names = {name: artifact.path.relative_to(run_dir).as_posix() for name, artifact in artifacts.items()}
    content = {"schema_version": 1, "recipe": plan.recipe.name, "final": plan.recipe.final, "artifacts": names}
    write_atomically(run_dir / RUN_FILE, json.dumps(content, indent=2) + "\n")
    if plan.recipe.final in artifacts:
        link(run_dir / "model", artifacts[plan.recipe.final].model_dir, run_dir)
    if "verdict" in artifacts:
        for file in ("verdict.json", "report.html"):
            link(run_dir / file, artifacts["verdict"].path / file, run_dir)


def link(path: Path, target: Path, run_dir: Path) -> None:
    """Make `path` a link to `target`, relative where both lie in the run."""
    shown = target.relative_to(run_dir) if target.is_relative_to(run_dir) else target
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.unlink(missing_ok=True)
    beside.symlink_to(shown)
    os.replace(beside, path)


def discard_finished_work(run_dir: Path) -> None:
    """Remove the scratch of steps that have been sealed since, and of recipes that were changed away."""
    shutil.rmtree(run_dir / "work", ignore_errors=True)


def locate_model(path: Path) -> tuple[Path, Artifact | None]:
    """The checkpoint directory behind a path: a run (its final model), an artifact, or a plain checkpoint directory."""
    if (path / RUN_FILE).is_file():
        content = json.loads((path / RUN_FILE).read_text(encoding="utf-8"))
        final = content["artifacts"].get(content["final"])
        if final is None:
            raise InputError(f"{path} is a run without a finished final model; finish it with `stillroom run`")
        path = path / final
    artifact = open_artifact(path)
    if artifact is not None:
        return artifact.model_dir, artifact
    if not (path / "config.json").is_file():
        raise InputError(
            f"{path} is no run, no artifact and no Hugging Face checkpoint directory (config.json is missing)"
        )
    return path, None
