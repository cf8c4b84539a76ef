"""A run that is killed with SIGKILL in any stage finishes afterwards with the artifacts of a run that was not."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import pytest

from runs import kill_when, stillroom, tiny_recipe
from stillroom.artifact import Artifact, damaged_files, open_artifact
from stillroom.stage import STAGES


def artifacts(run_dir: Path) -> dict[str, Artifact]:
    """Every sealed artifact of a run, by step name."""
    content = json.loads((run_dir / "run.json").read_text())
    found = {name: open_artifact(run_dir / place) for name, place in content["artifacts"].items()}
    assert all(found.values())
    return {name: artifact for name, artifact in found.items() if artifact is not None}


STEPS_TRAINED = 5
"""When a distillation is killed: after the checkpoint at step 4 of 8."""


def is_at_work(step: str, event: dict[str, Any]) -> bool:
    """The event tells that `step` is being worked on; for distill, that it has trained past a checkpoint."""
    if event.get("step") != step:
        return False
    if step == "distill":
        return bool(event["event"] == "progress" and event["done"] == STEPS_TRAINED)
    return bool(event["event"] == "started")


def without_timing(path: Path) -> Any:
    """A loss curve without the speed of each step."""
    return [{k: v for k, v in point.items() if k != "tok_s"} for point in json.loads(path.read_text())]


def _works_on(step: str, line: str) -> bool:
    return is_at_work(step, json.loads(line))


@pytest.fixture(scope="module")
def unkilled(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A recipe and the directory of a run of it that nobody disturbed."""
    folder = tmp_path_factory.mktemp("runs")
    recipe = tiny_recipe(folder)
    answer = stillroom("run", recipe, "--out", folder / "whole", home=folder / "home")
    assert answer.returncode == 0, answer.stderr
    return recipe, folder / "whole"


def test_a_run_killed_in_every_stage_ends_with_the_same_artifacts(unkilled: tuple[Path, Path]) -> None:
    recipe, whole_dir = unkilled
    home, run_dir = whole_dir.parent / "home", whole_dir.parent / "killed"
    whole = artifacts(whole_dir)
    first_of_kind = {artifact.manifest.kind: name for name, artifact in reversed(whole.items())}
    assert set(first_of_kind) == set(STAGES) - {"bench"}  # that one with a real engine, in test_engine_run.py
    for step in (name for name in whole if name in first_of_kind.values()):
        kill_when(functools.partial(_works_on, step), recipe, run_dir, home)
    finished = stillroom("run", recipe, "--out", run_dir, home=home)
    assert finished.returncode == 0, finished.stderr
    resumed = artifacts(run_dir)
    assert list(resumed) == list(whole)
    for name, artifact in whole.items():
        assert resumed[name].key == artifact.key
        assert damaged_files(resumed[name]) == []
        if name != "verdict":  # it tells when and how long
            files, expected = dict(resumed[name].manifest.files), dict(artifact.manifest.files)
            if files.pop("loss.json", None):
                del expected["loss.json"]
                curves = [without_timing(made.path / "loss.json") for made in (resumed[name], artifact)]
                assert curves[0] == curves[1]
            assert files == expected, name
    assert not (run_dir / "work").exists()


def test_a_finished_run_repeated_runs_nothing(unkilled: tuple[Path, Path]) -> None:
    recipe, whole_dir = unkilled
    before = {name: artifact.path.stat().st_mtime_ns for name, artifact in artifacts(whole_dir).items()}
    answer = stillroom("run", recipe, "--out", whole_dir, home=whole_dir.parent / "home")
    assert answer.returncode == 0, answer.stderr
    assert "nothing to do" in answer.stderr
    assert {name: artifact.path.stat().st_mtime_ns for name, artifact in artifacts(whole_dir).items()} == before


def test_changing_the_quantization_does_not_distill_again(unkilled: tuple[Path, Path]) -> None:
    recipe, whole_dir = unkilled
    home = whole_dir.parent / "home"
    answer = stillroom("plan", recipe, "--out", whole_dir, "--set", "stages.3.smoothquant=true", "--json", home=home)
    cached = {step["name"]: step["cached"] for step in json.loads(answer.stdout)["steps"]}
    assert cached["distill"]
    assert cached["fp8"]
    assert not cached["int8"]
    assert not cached["verdict"]
