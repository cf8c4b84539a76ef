"""A run that is killed with SIGKILL in any stage finishes afterwards with the artifacts of a run that was not."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest

from runs import stillroom, stillroom_command, stillroom_environment, tiny_recipe
from stillroom.artifact import Artifact, damaged_files, open_artifact


def artifacts(run_dir: Path) -> dict[str, Artifact]:
    """Every sealed artifact of a run, by step name."""
    content = json.loads((run_dir / "run.json").read_text())
    found = {name: open_artifact(run_dir / place) for name, place in content["artifacts"].items()}
    assert all(found.values())
    return {name: artifact for name, artifact in found.items() if artifact is not None}


def kill_in(step: str, recipe: Path, run_dir: Path, home: Path) -> None:
    """Start the run and SIGKILL it as soon as it says that it works on `step` (for distill: once it has trained a
    while)."""
    process = subprocess.Popen(
        stillroom_command("run", recipe, "--out", run_dir, "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=stillroom_environment(home),
    )
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event.get("step") == step and event["event"] == ("log" if step == "distill" else "started"):
            process.kill()
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL, f"the run ended before {step} could be killed"


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
    for step in whole:
        kill_in(step, recipe, run_dir, home)
    finished = stillroom("run", recipe, "--out", run_dir, home=home)
    assert finished.returncode == 0, finished.stderr
    resumed = artifacts(run_dir)
    assert list(resumed) == list(whole)
    for name, artifact in whole.items():
        assert resumed[name].key == artifact.key
        assert damaged_files(resumed[name]) == []
        if name != "verdict":  # it tells when and how long
            assert resumed[name].manifest.files == artifact.manifest.files, name
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
