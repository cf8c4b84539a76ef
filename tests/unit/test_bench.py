"""What counts as measured, and how figures come out of guidellm's report; memory sampling of real processes."""

from __future__ import annotations

import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.errors import EnvironmentCannot
from stillroom.recipe import Bench
from stillroom.speed.load import MIN_REQUESTS, Level, median, num_requests, read_report
from stillroom.speed.sample import PeakMemory, tree_pss_bytes
from stillroom.speed.stage import _kept_record, _measurements


def request(number: int, output_tokens: int = 10) -> dict[str, Any]:
    """One successful request as guidellm writes it: started at `number`, 2 s long."""
    return {
        "request_start_time": float(number),
        "request_end_time": number + 2.0,
        "request_latency": 2.0,
        "time_to_first_token_ms": 100.0 + number,
        "inter_token_latency_ms": 20.0,
        "output_tokens": output_tokens,
    }


def benchmark(successful: list[dict[str, Any]], errored: int = 0, incomplete: int = 0) -> dict[str, Any]:
    totals = {"successful": len(successful), "errored": errored, "incomplete": incomplete}
    failed = [{"info": {"error": "500 Internal Server Error"}}] * errored
    return {
        "metrics": {"request_totals": totals},
        "requests": {"successful": successful, "errored": failed, "incomplete": []},
    }


def config(*concurrency: int) -> Bench:
    return Bench(concurrency=concurrency, output_tokens=10, prompt_tokens=10)


def test_a_level_is_read_with_throughput_over_its_whole_time() -> None:
    (level,) = read_report({"benchmarks": [benchmark([request(n) for n in range(9)])]}, config(4))
    assert (level.concurrency, level.num_requests, level.seconds) == (4, 9, 10.0)
    assert level.output_tok_s.value == 9 * 10 / 10.0
    assert level.ttft_ms is not None
    assert level.itl_ms is not None
    assert (level.ttft_ms.value, level.ttft_ms.n) == (104.0, 9)
    assert (level.itl_ms.value, level.request_s.value, level.request_s.stderr) == (20.0, 2.0, 0.0)


def test_answers_without_text_have_no_time_to_the_first_and_no_measurement_of_it() -> None:
    silent = {**request(0), "time_to_first_token_ms": None}
    (level,) = read_report({"benchmarks": [benchmark([silent, request(0)])]}, config(1))
    assert level.ttft_ms is not None
    assert level.ttft_ms.n == 1
    levels = read_report({"benchmarks": [benchmark([silent, silent])]}, config(1))
    assert levels[0].ttft_ms is None
    assert "speed.c1.ttft_ms" not in {m.name for m in _measurements(levels)}


@pytest.mark.parametrize(
    ("bench", "reason"),
    [
        (benchmark([]), "0 requests succeeded"),
        (benchmark([request(0)], errored=1), "1 failed.*the first error: 500"),
        (benchmark([request(0)], incomplete=2), "2 were not finished"),
        (benchmark([request(0), request(1, output_tokens=7)]), "answers have 7 to 10 tokens instead of 10"),
    ],
)
def test_a_level_with_anything_but_whole_successes_is_a_failure(bench: dict[str, Any], reason: str) -> None:
    with pytest.raises(EnvironmentCannot, match=reason):
        read_report({"benchmarks": [bench]}, config(1))


def test_a_level_that_was_not_measured_is_a_failure() -> None:
    with pytest.raises(EnvironmentCannot, match="1 of 2 levels"):
        read_report({"benchmarks": [benchmark([request(0)])]}, config(1, 4))


def test_a_level_sends_requests_for_every_stream_and_never_too_few() -> None:
    assert num_requests(config(1), 1) == MIN_REQUESTS
    assert num_requests(config(16), 16) == 64


@given(st.lists(st.floats(min_value=0.1, max_value=1e4), min_size=2, max_size=50))
def test_a_median_has_the_standard_error_of_a_normal_samples_median(values: list[float]) -> None:
    estimate = median(values)
    assert estimate.value == statistics.median(values)
    mean = sum(values) / len(values)
    spread = math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))
    assert estimate.stderr == pytest.approx(1.2533141 * spread / math.sqrt(len(values)), rel=1e-5, abs=1e-7)


def test_the_best_level_is_the_headline_figure() -> None:
    levels: list[Level] = []
    for streams, num in ((1, 4), (4, 8)):
        levels += read_report({"benchmarks": [benchmark([request(0)] * num)]}, config(streams))
    measured = {m.name: m for m in _measurements(levels)}
    assert measured["speed.c1.output_tok_s"].value == 20.0
    assert measured["speed.output_tok_s"].value == measured["speed.c4.output_tok_s"].value == 40.0
    assert measured["speed.output_tok_s"].higher_is_better
    assert measured["speed.c4.ttft_ms"].higher_is_better is False
    assert {m.unit for m in measured.values()} == {"tok/s", "ms", "s"}


def test_a_kept_record_counts_only_under_the_facts_it_was_measured_with(tmp_path: Path) -> None:
    kept = tmp_path / "dense.json"
    assert _kept_record(kept, {"engine": "vllm"}) is None
    kept.write_text(json.dumps({"facts": {"engine": "vllm"}, "record": {"refused": None}}))
    assert _kept_record(kept, {"engine": "vllm"}) == {"refused": None}
    assert _kept_record(kept, {"engine": "transformers"}) is None


def test_memory_of_a_process_tree_counts_its_children() -> None:
    grow = "import sys; data = bytearray(64 * 2**20); print('grown', flush=True); sys.stdin.read()"
    parent = f"import subprocess, sys; sys.exit(subprocess.run([sys.executable, '-c', {grow!r}]).returncode)"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        alone = psutil.Process(process.pid).memory_info().rss
        together = tree_pss_bytes(process.pid)
        process.communicate()
    assert together > 64 * 2**20
    assert alone < 64 * 2**20
    assert tree_pss_bytes(process.pid) == 0


def test_the_peak_is_the_highest_reading_and_first_and_last_are_taken() -> None:
    readings = iter([3, 7, 5])
    with PeakMemory(lambda: next(readings), interval_s=3600.0) as memory:
        memory._take()
    assert (memory.peak_bytes, memory.num_samples) == (7, 3)


def test_own_memory_is_seen() -> None:
    assert tree_pss_bytes(os.getpid()) > 2**20
