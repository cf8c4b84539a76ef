"""Which torch a machine gets, and how it is installed: pip and uv are programs that write down how they were called."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from stillroom import torch_build
from stillroom.torch_build import TORCH, Build, TorchInstallFailed, fits, install_torch


@pytest.mark.parametrize(
    ("version", "build", "fit"),
    [
        (f"{TORCH}+cpu", "cpu", True),
        (TORCH, "cpu", False),
        (f"{TORCH}+cu130", "cpu", False),
        (TORCH, "cuda", True),
        (f"{TORCH}+cu130", "cuda", True),
        (f"{TORCH}+cpu", "cuda", False),
        (TORCH, "plain", True),
        ("2.8.0+cpu", "cpu", False),
    ],
)
def test_a_cpu_machine_takes_no_cuda_build_and_a_gpu_no_cpu_build(version: str, build: Build, fit: bool) -> None:
    assert fits(version, build) is fit


def python_with(tmp_path: Path, installed: dict[str, str], *, pip_brings: str | None, uv_brings: str | None) -> Path:
    """An interpreter whose `-m pip` and `-m uv` note their arguments in `calls` and bring these versions or fail."""
    (tmp_path / "installed.json").write_text(json.dumps(installed))
    script = f"""#!{sys.executable}
import json, pathlib, sys
here = pathlib.Path({str(tmp_path)!r})
if sys.argv[1] == "-c":
    print((here / "installed.json").read_text())
    sys.exit()
with (here / "calls").open("a") as calls:
    calls.write(" ".join(sys.argv[2:]) + "\\n")
if sys.argv[-1] == "uv":
    sys.exit()
version = {{"pip": {pip_brings!r}, "uv": {uv_brings!r}}}[sys.argv[2]]
if version is None:
    sys.exit("no matching distribution")
(here / "installed.json").write_text(json.dumps({{"torch": version}}))
"""
    path = tmp_path / "python"
    path.write_text(script)
    path.chmod(0o755)
    return path


@pytest.fixture(autouse=True)
def _no_uv_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)


def test_nothing_is_installed_where_the_right_one_is(tmp_path: Path) -> None:
    python = python_with(tmp_path, {"torch": f"{TORCH}+cpu"}, pip_brings=None, uv_brings=None)
    assert install_torch(python, "cpu") == f"{TORCH}+cpu"
    assert not (tmp_path / "calls").exists()


def test_the_cpu_build_comes_from_pips_own_sources_where_they_have_it(tmp_path: Path) -> None:
    python = python_with(tmp_path, {}, pip_brings=f"{TORCH}+cpu", uv_brings=None)
    assert install_torch(python, "cpu") == f"{TORCH}+cpu"
    assert (tmp_path / "calls").read_text() == f"pip install torch=={TORCH}+cpu\n"


def test_where_pip_has_no_cpu_build_uv_gets_it(tmp_path: Path) -> None:
    python = python_with(tmp_path, {"torch": TORCH}, pip_brings=None, uv_brings=f"{TORCH}+cpu")
    assert install_torch(python, "cpu") == f"{TORCH}+cpu"
    assert (tmp_path / "calls").read_text().splitlines()[1:] == [
        "pip install --quiet uv",
        f"uv pip install --python {python} --torch-backend=cpu torch=={TORCH}",
    ]


def test_a_gpu_machine_gets_pips_own(tmp_path: Path) -> None:
    python = python_with(tmp_path, {"torch": f"{TORCH}+cpu"}, pip_brings=TORCH, uv_brings=None)
    assert install_torch(python, "cuda") == TORCH
    assert (tmp_path / "calls").read_text() == f"pip install torch=={TORCH}\n"


def test_a_failure_says_what_was_tried_and_what_to_do(tmp_path: Path) -> None:
    python = python_with(tmp_path, {}, pip_brings=None, uv_brings=None)
    with pytest.raises(TorchInstallFailed, match=r"no matching distribution.*uv pip install --torch-backend=cpu"):
        install_torch(python, "cpu")


def test_it_runs_as_a_plain_script_before_anything_is_installed() -> None:
    command = [sys.executable, "-I", "-S", str(torch_build.__file__), "--help"]
    assert "torch build" in subprocess.run(command, capture_output=True, text=True, check=True).stdout
