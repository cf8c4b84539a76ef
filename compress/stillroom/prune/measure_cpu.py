"""How fast this machine's CPU reads memory and multiplies, for the roofline: the `cpu` row of the hardware table.

Reading is what decoding does, so the bandwidth is that of a sum over an array far larger than the caches, not of a
copy. Peaks are of square products through the same library that CPU engines use (oneDNN). The best of several rounds
counts: a roofline is a bound, and whatever else runs on the machine only ever slows a round down.

One core is left out, as vLLM's CPU build leaves one to its scheduler. Figures of an idle and of a busy machine differ,
so a search keeps what it measured at its start (`kept_cpu`), and goes on with that after a kill.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import ValidationError

from stillroom.artifact import write_atomically
from stillroom.machine import this_machine
from stillroom.prune.cost import GB, Format, Hardware

log = logging.getLogger(__name__)

STREAM_BYTES = 512 * 2**20
PRODUCT_SIZE = 1536
ROUNDS = 7


def measure_cpu(num_threads: int | None = None) -> Hardware:
    """Bandwidth and peaks of this machine with that many threads; default: one less than the cores, at least one."""
    threads = num_threads or max(1, len(os.sched_getaffinity(0)) - 1)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        bandwidth = _read_gb_s()
        tflops: dict[Format, float] = {"bf16": _bf16_tflops(), "int8": _int8_tflops()}
    finally:
        torch.set_num_threads(before)
    log.info("cpu: %.1f GB/s, %s TFLOPS, %d threads", bandwidth, tflops, threads)
    return Hardware(memory_gb=this_machine().memory_bytes / GB, bandwidth_gb_s=bandwidth, tflops=tflops)


def kept_cpu(path: Path) -> Hardware:
    """What was measured before and written to `path`, or measured now and written there."""
    try:
        return Hardware.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except (FileNotFoundError, json.JSONDecodeError, ValidationError):
        measured = measure_cpu()
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, measured.model_dump_json() + "\n")
        return measured


def _read_gb_s() -> float:
    array = torch.ones(STREAM_BYTES // 4, dtype=torch.float32)
    return STREAM_BYTES / GB / _fastest(lambda: array.sum())


def _bf16_tflops() -> float:
    a = torch.randn(PRODUCT_SIZE, PRODUCT_SIZE).to(torch.bfloat16)
    return 2 * PRODUCT_SIZE**3 / 1e12 / _fastest(lambda: a @ a)


def _int8_tflops() -> float:
    a = torch.randint(-128, 128, (PRODUCT_SIZE, PRODUCT_SIZE), dtype=torch.int8)
    return 2 * PRODUCT_SIZE**3 / 1e12 / _fastest(lambda: torch._int_mm(a, a))


def _fastest(work: Callable[[], torch.Tensor]) -> float:
    """Seconds of the fastest round, after one that does not count."""
    work()
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)
