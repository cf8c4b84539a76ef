"""Load a served model with guidellm, level by level, and read what it measured.

guidellm runs as a process, from this interpreter's environment, with a configuration file. Its prompts are made of the
model's own tokens; every level gets new ones and every variant the same ones, so a prefix cache helps nobody and all
variants with one tokenizer answer the same requests. Each answer has exactly the tokens that were asked for, chosen
greedily, whatever the model would like to say: the engine says how to ask for that.

guidellm can end in peace without one request having succeeded, so its `request_totals` are read first, and an answer of
another length than asked makes the level invalid: tokens per second of different lengths do not compare.
"""

from __future__ import annotations

import importlib.metadata
import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from stillroom.engines.contract import Engine
from stillroom.engines.process import RunningServer, last_lines, spawn, stop
from stillroom.errors import EnvironmentCannot
from stillroom.recipe import Bench

SEED = 20_000
"""Of the prompts."""
MIN_REQUESTS = 8
"""A level sends at least this many."""
WARMUP_TOKENS = 8
POLL_S = 0.25
STALLED_S = 1800.0
"""A request that takes longer is counted as failed."""


@dataclass(frozen=True)
class Estimate:
    """A figure over n requests, with its standard error; None where one request says nothing about spread."""

    value: float
    stderr: float | None
    n: int


@dataclass(frozen=True)
class Level:
    """What one level of concurrency measured."""

    concurrency: int
    num_requests: int
    seconds: float
    """From the first request's start to the last one's end."""
    output_tok_s: Estimate
    """Of all streams together."""
    ttft_ms: Estimate | None
    """Median time to the first text, waiting in the engine's queue included; None where no answer had text."""
    itl_ms: Estimate | None
    """Median over requests of the mean time between tokens; None for answers of one token."""
    request_s: Estimate
    """Median time of a whole request."""


def guidellm_version() -> str:
    """Raises EnvironmentCannot where guidellm is not installed."""
    try:
        return importlib.metadata.version("guidellm")
    except importlib.metadata.PackageNotFoundError:
        raise EnvironmentCannot("guidellm is not installed; pip install 'stillroom[evaluate]'") from None


def warm_up(server: RunningServer, engine: Engine, config: Bench) -> None:
    """A few requests alone and as many together as the highest level has, so that no level pays for first times.

    A byte-level tokenizer makes at most five tokens of the word, so the prompt is shorter than the measured ones.
    """

    def ask(number: int) -> None:
        prompt = f"{number} " + "warm " * max(1, config.prompt_tokens // 8)
        tokens = min(WARMUP_TOKENS, config.output_tokens)
        body = {"model": server.model_name, "prompt": prompt, "max_tokens": tokens, **engine.exactly(tokens)}
        answer = httpx.post(f"{server.base_url}/v1/completions", json=body, timeout=STALLED_S, trust_env=False)
        if answer.status_code != 200:
            raise EnvironmentCannot(
                f"{engine.name} answered {answer.status_code} to the first requests: {answer.text[:300]}; "
                f"its last lines:\n{last_lines(server.log_path)}"
            )

    try:
        for number in range(2):
            ask(number)
        together = max(config.concurrency)
        with ThreadPoolExecutor(together) as pool:
            list(pool.map(ask, range(2, 2 + together)))
    except httpx.TransportError as error:
        raise EnvironmentCannot(
            f"{engine.name} did not answer the first requests ({error}); its last lines:\n{last_lines(server.log_path)}"
        ) from error


def run_levels(
    server: RunningServer, engine: Engine, config: Bench, tokenizer_dir: Path, work_dir: Path
) -> list[Level]:
    """Every level of `config.concurrency`, by guidellm in `work_dir`.

    Raises EnvironmentCannot, with the last log lines, where guidellm fails, the engine dies, a request fails or none
    succeeds, or an answer has another length than asked.
    """
    work_dir.mkdir(parents=True, exist_ok=True)
    report = work_dir / "guidellm.json"
    report.unlink(missing_ok=True)
    scenario = work_dir / "scenario.json"
    scenario.write_text(
        json.dumps(_scenario(server, engine, config, tokenizer_dir, report), indent=2), encoding="utf-8"
    )
    log_path = work_dir / "guidellm.log"
    _run_guidellm(server, engine, scenario, log_path)
    if not report.is_file():
        raise EnvironmentCannot(f"guidellm wrote no report; its last lines:\n{last_lines(log_path)}")
    try:
        return read_report(json.loads(report.read_text(encoding="utf-8")), config)
    except EnvironmentCannot as error:
        raise EnvironmentCannot(f"{error}; the engine's last lines:\n{last_lines(server.log_path)}") from error


def num_requests(config: Bench, streams: int) -> int:
    """How many requests a level sends."""
    return max(MIN_REQUESTS, config.requests_per_stream * streams)


def read_report(report: dict[str, Any], config: Bench) -> list[Level]:
    """The levels of guidellm's report. Raises EnvironmentCannot where one does not count as measured."""
    benchmarks = report["benchmarks"]
    if len(benchmarks) != len(config.concurrency):
        raise EnvironmentCannot(f"guidellm measured {len(benchmarks)} of {len(config.concurrency)} levels")
    return [_level(bench, streams, config) for bench, streams in zip(benchmarks, config.concurrency, strict=True)]


def _level(benchmark: dict[str, Any], streams: int, config: Bench) -> Level:
    totals = benchmark["metrics"]["request_totals"]
    lost = totals["errored"] + totals["incomplete"]
    if lost or not totals["successful"]:
        raise EnvironmentCannot(
            f"at concurrency {streams}, {totals['successful']} requests succeeded, {totals['errored']} failed and "
            f"{totals['incomplete']} were not finished{_first_error(benchmark)}"
        )
    requests = benchmark["requests"]["successful"]
    lengths = sorted({request["output_tokens"] for request in requests})
    if lengths != [config.output_tokens]:
        raise EnvironmentCannot(
            f"at concurrency {streams}, answers have {lengths[0]} to {lengths[-1]} tokens instead of "
            f"{config.output_tokens}"
        )
    seconds = max(r["request_end_time"] for r in requests) - min(r["request_start_time"] for r in requests)
    latencies = [request["request_latency"] for request in requests]
    return Level(
        concurrency=streams,
        num_requests=len(requests),
        seconds=seconds,
        output_tok_s=_throughput(len(requests) * config.output_tokens / seconds, latencies),
        ttft_ms=_median_of(requests, "time_to_first_token_ms"),
        itl_ms=_median_of(requests, "inter_token_latency_ms"),
        request_s=median(latencies),
    )


def _median_of(requests: Sequence[dict[str, Any]], field: str) -> Estimate | None:
    """guidellm leaves a time out where an answer streamed no text, which happens with special tokens only."""
    values = [request[field] for request in requests if request[field] is not None]
    return median(values) if values else None


def median(values: Sequence[float]) -> Estimate:
    """With the standard error of a median of normal samples, 1.2533 s / sqrt(n)."""
    n = len(values)
    spread = math.sqrt(math.pi / 2) * statistics.stdev(values) / math.sqrt(n) if n > 1 else None
    return Estimate(statistics.median(values), spread, n)


def _throughput(tok_s: float, latencies: Sequence[float]) -> Estimate:
    """Throughput is proportional to 1 / mean latency at fixed concurrency, so both have one relative standard error.

    It covers the spread between requests of one level, not the drift of a machine between runs.
    """
    n = len(latencies)
    relative = statistics.stdev(latencies) / math.sqrt(n) / statistics.mean(latencies) if n > 1 else None
    return Estimate(tok_s, None if relative is None else tok_s * relative, n)


def _first_error(benchmark: dict[str, Any]) -> str:
    errors = [request["info"].get("error") for request in benchmark["requests"]["errored"]]
    return f"; the first error: {errors[0]}" if errors and errors[0] else ""


def _scenario(
    server: RunningServer, engine: Engine, config: Bench, tokenizer_dir: Path, report: Path
) -> dict[str, Any]:
    """guidellm 0.8's configuration. The answer's length is `max_tokens`, and `output_tokens` is left out of `data`:
    with it guidellm sends `ignore_eos`, which not every engine knows."""
    return {
        "spec": {
            "backend": {
                "kind": "openai_http",
                "target": server.base_url,
                "model": server.model_name,
                "request_format": "/v1/completions",
                "max_tokens": config.output_tokens,
                "extras": {"body": engine.exactly(config.output_tokens)},
                "timeout": STALLED_S,
            },
            "profile": {"kind": "concurrent", "streams": [config.concurrency[0]]},
            "constraints": [{"kind": "max_requests", "count": num_requests(config, config.concurrency[0])}],
            "tokenizer": {"kind": "huggingface_auto", "model": str(tokenizer_dir.resolve())},
            "data": [{"kind": "synthetic_text", "prompt_tokens": config.prompt_tokens}],
            "seed": {"kind": "static", "value": SEED},
            "outputs": [{"kind": "json", "path": str(report.resolve())}],
        },
        "benchmarks": [
            {"profile.streams": streams, "constraints[0].count": num_requests(config, streams)}
            for streams in config.concurrency
        ],
    }


def _run_guidellm(server: RunningServer, engine: Engine, scenario: Path, log_path: Path) -> None:
    """Until it ends, or the engine dies. It runs in a directory of its own, because it reads `.env` where it runs."""
    # a worker process for each two cores: more of them take the cores that the engine is measured on
    workers = max(1, min(8, len(os.sched_getaffinity(0)) // 2))
    environment = {
        "GUIDELLM__MAX_WORKER_PROCESSES": str(workers),
        "HF_HUB_OFFLINE": "1",
        "NO_PROXY": "127.0.0.1,localhost,::1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "guidellm", "run", "-c", str(scenario.resolve()), "--disable-console"]
    process = spawn(command, environment, log_path=log_path, cwd=scenario.parent)
    try:
        _wait(process, server, engine)
    finally:
        stop(process, grace_s=5.0)
    if process.returncode != 0:
        raise EnvironmentCannot(
            f"guidellm failed with exit code {process.returncode}; its last lines:\n{last_lines(log_path)}"
        )


def _wait(process: subprocess.Popen[bytes], server: RunningServer, engine: Engine) -> None:
    while process.poll() is None:
        if not server.is_alive():
            raise EnvironmentCannot(f"{engine.name} died under load; its last lines:\n{last_lines(server.log_path)}")
        time.sleep(POLL_S)
