"""A disk that is really full: one line, exit code 4, nothing half-made, and the next run goes on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runs import stillroom_environment, tiny_recipe

WITHOUT_ESTIMATE = """
import stillroom.preflight
stillroom.preflight.free_disk_bytes = lambda path: 2**40
from stillroom.cli import main
main()
"""
"""The command line on a machine whose disk fills up after the estimate was made."""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(disk)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def run(recipe: Path, out: Path, home: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WITHOUT_ESTIMATE, "run", str(recipe), "--out", str(out)]
    return subprocess.run(command, capture_output=True, text=True, env=stillroom_environment(home), check=False)


def test_a_disk_that_fills_up_is_one_line_and_the_next_run_goes_on(small_disk: Path, tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "recipe", stages=[{"kind": "prune", "drop_layers": [0]}], evaluate=None)
    out = small_disk / "run"
    full = run(recipe, out, tmp_path / "home")
    assert full.returncode == 4, full.stderr
    assert "bytes free; the pruned model needs" in full.stderr
    assert "Traceback" not in full.stderr
    assert list((out / "artifacts").glob("dense-*"))
    assert not list((out / "artifacts").glob("prune-*"))
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert run(recipe, out, tmp_path / "home").returncode == 0
    assert (out / "verdict.json").is_file()
