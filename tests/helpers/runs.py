"""Recipes for whole runs on a tiny model, and a way to run the command line as a user does."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from tiny import tiny_checkpoint, tiny_text_file

TINY_SEARCH = {"tokens": 128, "generations": 1, "offspring": 2, "finalists": 2}
TINY_CALIBRATION = {"samples": 8, "sequence_length": 64, "batch_size": 4}


def tiny_recipe(folder: Path, **changes: Any) -> Path:
    """A recipe of every stage on a tiny Llama in `folder`, without a bench; returns the YAML's path.

    The head size of 32 and the 64-token context are what a stock vLLM on CPU takes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = folder / "model"
    if not model.exists():
        tiny_checkpoint(model, "llama", hidden_size=128, head_dim=32, intermediate_size=256)
    recipe: dict[str, Any] = {
        "name": "tiny",
        "model": str(model),
        "data": {
            "train": [str(tiny_text_file(folder / "train.txt")), {"source": "teacher", "tokens": 256}],
            "heldout": [{"source": str(tiny_text_file(folder / "heldout.txt", 60)), "name": "heldout"}],
            "decontaminate": False,  # a handful of sentences is all that a tiny model learns
        },
        "stages": [
            {"kind": "prune", "num_layers": 3, "intermediate_size": 128, "calibration": TINY_CALIBRATION,
             "search": TINY_SEARCH},
            {
                "kind": "distill", "tokens": 2048, "sequence_length": 64, "batch_size": 4, "micro_batch_size": 2,
                "save_every_steps": 2, "learning_rate": 1e-3,
            },
            {"kind": "quantize", "name": "fp8", "scheme": "fp8", "calibration": TINY_CALIBRATION},
            {
                "kind": "quantize", "name": "int8", "source": "distill", "scheme": "int8",
                "calibration": TINY_CALIBRATION,
            },
        ],
        "verify": {"tokens": 512, "sequence_length": 64},
        "evaluate": {"perplexity_tokens": 512, "sequence_length": 64},
        "bench": None,
        "gates": ["size.weight_bytes <= 0.9 * dense"],
    }  # fmt: skip
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump(recipe | changes, sort_keys=False), encoding="utf-8")
    return path


def stillroom_command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "stillroom.cli", *map(str, arguments)]


def stillroom_environment(home: Path) -> dict[str, str]:
    """The test's environment, with a home of its own, no hub, and one thread so that results repeat."""
    return os.environ | {"STILLROOM_HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


def stillroom(*arguments: object, home: Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the command line to its end."""
    return subprocess.run(
        stillroom_command(*arguments),
        capture_output=True,
        text=True,
        env=stillroom_environment(home),
        cwd=cwd,
        check=False,
    )


def kill_when(is_time: Callable[[str], bool], recipe: Path, run_dir: Path, home: Path) -> None:
    """Start a run and SIGKILL it at the first event, a line of JSON, of which `is_time` holds."""
    process = subprocess.Popen(
        stillroom_command("run", recipe, "--out", run_dir, "--json"),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=stillroom_environment(home),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if is_time(line):
            process.kill()
            break
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL, "the run ended before it was time to kill it"
