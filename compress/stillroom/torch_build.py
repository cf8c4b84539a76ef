"""Install the torch that this machine can use: the CUDA build where an NVIDIA driver is seen, else the CPU build.

Plain `pip install torch` brings several GiB of CUDA libraries to Linux machines that have no GPU, and pip has no way
to say "whichever fits". So torch is installed first, by this script, and the extras that need it find it there. CPU
wheels are not on PyPI; where pip's configured sources have them `torch==X+cpu` is enough, and otherwise uv knows where
they are (`--torch-backend=cpu`), so that no index needs to be named here.

It runs before anything is installed, so it needs the standard library only: `python compress/stillroom/torch_build.py`
from a clone, `python -m stillroom.torch_build` later.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Literal

TORCH = "2.13.0"
"""What vLLM 0.27 to 0.32 pin and ModelOpt 0.47 runs on."""

Build = Literal["cuda", "cpu", "plain"]

_ASK = "import importlib.metadata as m, json; print(json.dumps({d.name.lower(): d.version for d in m.distributions()}))"


class TorchInstallFailed(RuntimeError):
    """No way to get the build worked: says what was tried and what to do."""


def wanted_build() -> Build:
    """`plain` outside Linux, where PyPI's wheel is the only one; on Linux `cuda` with an NVIDIA driver, else `cpu`."""
    if platform.system() != "Linux":
        return "plain"
    return "cuda" if Path("/proc/driver/nvidia/version").exists() or _nvidia_smi_answers() else "cpu"


def install_torch(python: Path, build: Build | None = None) -> str:
    """Install TORCH in `python`'s environment unless it is there already, and return the installed version.

    Raises TorchInstallFailed with the installers' last words.
    """
    build = build or wanted_build()
    if (version := installed_torch(python)) is not None and fits(version, build):
        return version
    wanted = f"torch=={TORCH}"
    failures = _try([str(python), "-m", "pip", "install", f"{wanted}+cpu" if build == "cpu" else wanted])
    if failures and build == "cpu":
        failures += _try([*_uv(python), wanted])
    version = installed_torch(python)
    if version is None or not fits(version, build):
        raise TorchInstallFailed(
            f"torch {TORCH} for {build} could not be installed into {python}: {'; '.join(failures)}. "
            f"Install it by hand ({_by_hand(build)}) and run this again"
        )
    return version


def fits(version: str, build: Build) -> bool:
    """An installed version serves: the right release, and on a machine without a GPU no CUDA build.

    PyPI's CUDA wheel carries no local version (2.13.0), other CUDA wheels do (2.13.0+cu130).
    """
    release, _, local = version.partition("+")
    if release != TORCH:
        return False
    return {"cpu": local == "cpu", "cuda": local != "cpu", "plain": True}[build]


def installed_torch(python: Path) -> str | None:
    """The version of torch that `python` sees, without importing it."""
    answer = subprocess.run([str(python), "-c", _ASK], capture_output=True, text=True, check=True)
    version: str | None = json.loads(answer.stdout).get("torch")
    return version


def _try(command: list[str]) -> list[str]:
    """Run it; what it said where it failed, else nothing."""
    answer = subprocess.run(command, capture_output=True, text=True)
    return [f"`{' '.join(command)}` said: {_last_words(answer)}"] if answer.returncode else []


def _uv(python: Path) -> list[str]:
    """uv's command line up to the requirement, with uv installed where it is not."""
    if shutil.which("uv"):
        uv = ["uv"]
    else:
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", "uv"], capture_output=True)
        uv = [str(python), "-m", "uv"]
    return [*uv, "pip", "install", "--python", str(python), "--torch-backend=cpu"]


def _nvidia_smi_answers() -> bool:
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=30).returncode == 0
    except (OSError, subprocess.TimeoutExpired):
        return False


def _last_words(answer: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (answer.stdout + answer.stderr).splitlines() if line.strip()]
    return lines[-1] if lines else f"exit code {answer.returncode}"


def _by_hand(build: Build) -> str:
    return f"uv pip install --torch-backend=cpu torch=={TORCH}" if build == "cpu" else f"pip install torch=={TORCH}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Install the torch build that this machine needs.")
    parser.add_argument("--python", type=Path, default=Path(sys.executable), help="the interpreter to install for")
    parser.add_argument("--build", choices=["cuda", "cpu", "plain"], help="instead of what this machine needs")
    given = parser.parse_args()
    build: Build = given.build or wanted_build()
    try:
        version = install_torch(given.python, build)
    except TorchInstallFailed as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(4)  # the environment cannot; see errors.py, which a plain script does not find
    print(f"torch {version} ({build}) in {given.python}")


if __name__ == "__main__":
    main()
