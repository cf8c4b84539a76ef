"""What this machine has: cores, memory, GPUs. Asked without torch, so that planning stays instant."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import psutil

GIB = 2**30
WEIGHTS_SHARE = 0.7
"""The share of free memory that a model's weights may take; the rest is for activations and everything else."""


@dataclass(frozen=True)
class Gpu:
    """As nvidia-smi names it."""

    name: str
    memory_bytes: int
    driver: str


@dataclass(frozen=True)
class Machine:
    """Cores that this process may use, memory that it may fill, and the GPUs."""

    num_cores: int
    memory_bytes: int
    gpus: tuple[Gpu, ...]

    @property
    def model_memory_bytes(self) -> int:
        """Where models live: the first GPU's memory, else the machine's."""
        return self.gpus[0].memory_bytes if self.gpus else self.memory_bytes

    @property
    def description(self) -> str:
        """One line for tables and reports."""
        cores = f"{self.num_cores} CPU cores, {self.memory_bytes / GIB:.0f} GiB"
        return ", ".join([*(gpu.name for gpu in self.gpus), cores])


def this_machine() -> Machine:
    """The machine as a process in its container sees it."""
    return Machine(len(os.sched_getaffinity(0)), min(psutil.virtual_memory().total, _cgroup_limit()), nvidia_gpus())


def nvidia_gpus() -> tuple[Gpu, ...]:
    """The GPUs that nvidia-smi lists; none where it is absent or fails."""
    if shutil.which("nvidia-smi") is None:
        return ()
    query = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    rows = csv.reader(answer.splitlines(), skipinitialspace=True)
    return tuple(Gpu(row[0], int(row[1]) * 2**20, row[2]) for row in rows if len(row) == 3 and row[1].isdigit())


def free_disk_bytes(path: Path) -> int:
    """Free bytes where `path` is or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _cgroup_limit() -> int:
    """The container's memory limit, or a number above any machine's."""
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            return int(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
    return 2**63
