"""The command line as a user meets it: help, errors in one line, exit codes."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import pytest
import yaml

from runs import stillroom, stillroom_command, stillroom_environment, tiny_recipe
from stillroom.pipeline import lock, prepare_run_dir
from tiny import tiny_checkpoint

COMMANDS = (
    "run",
    "prune",
    "plan",
    "recipes",
    "doctor",
    "inspect",
    "verify",
    "evaluate",
    "bench",
    "serve",
    "report",
    "engine",
)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


def test_help_teaches_and_imports_nothing_heavy(home: Path) -> None:
    answer = stillroom("--help", home=home)
    assert answer.returncode == 0
    assert "stillroom run smollm2-135m-cpu --out runs/demo" in answer.stdout
    assert "130  interrupted" in answer.stdout
    assert all(command in answer.stdout for command in COMMANDS)
    traced = subprocess.run(
        [*stillroom_command("--help")[:1], "-X", "importtime", "-m", "stillroom.cli", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not any(name in traced.stderr for name in ("torch", "pydantic", "numpy", "rich"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, home: Path) -> None:
    answer = stillroom(command, "--help", home=home)
    assert answer.returncode == 0
    assert len(answer.stdout.splitlines()) >= 5


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("run", "smollm2-135m-cpu"), 2, "Missing option '--out'"),
        (("fly",), 2, "No such command 'fly'"),
        (("plan", "no-such-recipe"), 2, "neither a file nor a shipped recipe; shipped:"),
        (("inspect", "/nowhere"), 2, "does not exist"),
        (("plan", "smollm2-135m-cpu", "--set", "stages.0.num_layers=31"), 2, "num_layers 31 is above the model's 30"),
        (("plan", "qwen3-8b-width-6b-fp8", "--set", "stages.0.num_attention_heads=20"), 2, "num_attention_heads 20"),
        (
            ("plan", "qwen3-8b-depth-6b-fp8", "--set", "stages.0={kind: prune, drop_layers: [36]}"),
            2,
            "drop_layers names layer 36; the model has layers 0 to 35",
        ),
        (("plan", "smollm2-135m-cpu", "--set", "model=./nowhere"), 2, "is no directory"),
        (("plan", "smollm2-135m-cpu", "--set", "data.heldout=[nowhere.txt]"), 2, "nowhere.txt"),
        (
            ("run", "smollm2-135m-cpu", "--out", "x", "--set", "bench.engine=tensorrt-llm"),
            4,
            "engine tensorrt-llm is not on this machine",
        ),
    ],
)
def test_bad_input_is_one_line_and_an_exit_code(
    arguments: tuple[str, ...], code: int, message: str, home: Path, tmp_path: Path
) -> None:
    answer = stillroom(*arguments, home=home, cwd=tmp_path)
    assert answer.returncode == code, answer.stderr
    assert message in answer.stderr
    assert "Traceback" not in answer.stderr
    assert not list(tmp_path.glob("x/artifacts/*"))


@pytest.mark.parametrize("recipe", ["qwen3-8b-depth-6b-fp8", "qwen3-8b-width-6b-fp8", "smollm2-135m-cpu"])
def test_shipped_recipes_are_planned_without_a_hub(recipe: str, home: Path) -> None:
    answer = stillroom("plan", recipe, "--json", home=home)
    assert answer.returncode == 0, answer.stderr
    steps = {step["name"]: step for step in json.loads(answer.stdout)["steps"]}
    assert steps["prune"]["parameters"] < steps["dense"]["parameters"]
    assert steps["verdict"]["reads"]["bench"] == "bench"


def test_the_depth_recipe_comes_out_at_six_billion(home: Path) -> None:
    """36 to 24 layers of Qwen3-8B: 1.244B of embeddings and 24/36 of 6.946B."""
    answer = stillroom("plan", "qwen3-8b-depth-6b-fp8", "--json", home=home)
    steps = {step["name"]: step for step in json.loads(answer.stdout)["steps"]}
    assert steps["fp8"]["parameters"] == 5_875_378_176
    assert steps["fp8"]["weight_bytes"] < 0.45 * steps["dense"]["weight_bytes"]


def test_a_directory_that_is_not_ours_is_left_alone(home: Path, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    answer = stillroom("run", tiny_recipe(tmp_path / "recipe"), "--out", theirs, home=home)
    assert answer.returncode == 2
    assert "is not empty and holds no run of stillroom" in answer.stderr
    assert [path.name for path in theirs.iterdir()] == ["thesis.txt"]


def test_two_runs_may_not_share_a_directory(home: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    prepare_run_dir(run_dir)
    with lock(run_dir):
        answer = stillroom("run", tiny_recipe(tmp_path / "recipe"), "--out", run_dir, home=home)
    assert answer.returncode == 4
    assert f"another run (process {os.getpid()})" in answer.stderr


def test_text_shorter_than_a_sequence_stops_before_training(home: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "recipe")
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    answer = stillroom("run", recipe, "--out", tmp_path / "run", "--set", f"data.train=[{short}]", home=home)
    assert answer.returncode == 2
    assert "a window needs" in answer.stderr


def test_a_truncated_model_stops_before_anything(home: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "recipe")
    weights = tmp_path / "recipe" / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    answer = stillroom("run", recipe, "--out", tmp_path / "run", home=home)
    assert answer.returncode == 2
    assert "truncated" in answer.stderr
    assert not (tmp_path / "run").exists()


def test_inspect_describes_any_checkpoint_directory(home: Path, tmp_path: Path) -> None:
    answer = stillroom("inspect", tiny_checkpoint(tmp_path / "model", "qwen3"), "--json", home=home)
    model = json.loads(answer.stdout)["model"]
    assert (model["family"], model["num_layers"], model["quantization"]) == ("qwen3", 4, "none")


def test_serving_on_a_port_in_use_is_refused_at_once(home: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        answer = stillroom(
            "serve", tiny_checkpoint(tmp_path / "model"), "--engine", "transformers", "--port", port, home=home
        )
    assert answer.returncode == 2, answer.stderr
    assert f"port {port} on 127.0.0.1" in answer.stderr


def test_a_failed_gate_exits_with_3(home: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        tmp_path / "recipe",
        stages=[{"kind": "prune", "drop_layers": [0]}],
        evaluate=None,
        gates=["size.parameters <= 1", "quality.never.measured >= 1"],
    )
    answer = stillroom("run", recipe, "--out", tmp_path / "run", home=home)
    assert answer.returncode == 3, answer.stderr
    assert "never.measured" in answer.stdout
    verdict = json.loads((tmp_path / "run" / "verdict.json").read_text())
    assert [gate["status"] for gate in verdict["gates"]] == ["fail", "fail"]
    assert stillroom("report", tmp_path / "run", home=home).returncode == 3


def test_the_resolved_recipe_of_a_run_can_be_run_again(home: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "recipe", stages=[{"kind": "prune", "drop_layers": [0]}], evaluate=None, gates=[])
    first = stillroom("run", recipe, "--out", tmp_path / "run", home=home)
    assert first.returncode == 0, first.stderr
    resolved = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())
    copy = tmp_path / "copy.yaml"
    copy.write_text(yaml.safe_dump(resolved))
    again = stillroom("run", copy, "--out", tmp_path / "run", home=home)
    assert again.returncode == 0, again.stderr
    assert "nothing to do" in again.stderr


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_how_to_go_on_and_exits_with_130(
    sent: signal.Signals, home: Path, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        stillroom_command("run", tiny_recipe(tmp_path / "recipe"), "--out", tmp_path / "run", "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=stillroom_environment(home),
    )
    assert process.stdout is not None
    for line in process.stdout:
        event = json.loads(line)
        if event["event"] == "started" and event["step"] == "prune":
            process.send_signal(sent)
            break
    _, errors = process.communicate()
    assert process.returncode == 130, errors
    assert "interrupted; the same command goes on from there" in errors
    assert "Traceback" not in errors
