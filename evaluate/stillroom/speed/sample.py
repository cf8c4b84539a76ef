"""Peak memory of a serving engine, sampled beside the load.

On CPU it is the proportional set size (PSS) of the engine's whole process tree: pages that its processes share, such
as the libraries', count once. On CUDA it is what the GPUs hold more than before the engine started, asked of
nvidia-smi, because a container does not see which process holds what; so nothing else may use the GPUs meanwhile. vLLM
takes a fixed share of a GPU for its KV cache, whatever the model weighs: there the figure says what was set, and the
weights' bytes say what the compression saved.
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Callable
from types import TracebackType

import psutil

from stillroom.engines.contract import Device
from stillroom.errors import EnvironmentCannot

GIB = 2**30
INTERVAL_S = 3.0
"""A sample of vLLM's processes takes a tenth of a second of a core that is being measured."""


class PeakMemory:
    """Samples a reading in a thread for the time of a `with` block; `peak_bytes` and `num_samples` afterwards."""

    def __init__(self, read_bytes: Callable[[], int], interval_s: float = INTERVAL_S) -> None:
        self.read_bytes, self.interval_s = read_bytes, interval_s
        self.peak_bytes, self.num_samples = 0, 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._sample_until_ended, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._take()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()
        if kind is None:
            self._take()

    def _sample_until_ended(self) -> None:
        while not self._ended.wait(self.interval_s):
            self._take()

    def _take(self) -> None:
        self.peak_bytes = max(self.peak_bytes, self.read_bytes())
        self.num_samples += 1


def tree_pss_bytes(pid: int) -> int:
    """Of a process and its descendants; 0 when it is gone. Where the system has no PSS, resident bytes."""
    try:
        root = psutil.Process(pid)
        members = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    return sum(_pss_bytes(member) for member in members)


def gpu_bytes_in_use() -> int:
    """Over all GPUs. Raises EnvironmentCannot where nvidia-smi does not say."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True).stdout
        return sum(int(line) for line in answer.split()) * 2**20
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise EnvironmentCannot(f"nvidia-smi does not say how much GPU memory is in use: {error}") from error


def memory_reader(device: Device) -> Callable[[int], Callable[[], int]]:
    """Called before the engine starts; gives, for the engine's process id, the reading to sample."""
    if device == "cpu":
        return lambda pid: lambda: tree_pss_bytes(pid)
    before = gpu_bytes_in_use()
    return lambda pid: lambda: gpu_bytes_in_use() - before


def _pss_bytes(process: psutil.Process) -> int:
    try:
        memory = process.memory_full_info()
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return 0
    return int(getattr(memory, "pss", memory.rss))
