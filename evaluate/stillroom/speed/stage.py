"""The bench stage: serve each variant with one engine, load it at several levels, and write down speed and memory.

All variants go through the same engine, the same code and the same settings, one after the other in the same run. A
variant that the engine refuses is recorded with the reason and without numbers. Each variant's record is kept in the
scratch directory as soon as it is whole, so a killed bench goes on with the next one.
"""

from __future__ import annotations

import json
import logging
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stillroom.artifact import Measurement, write_atomically
from stillroom.engines.contract import Engine, Installation, ServeConfig
from stillroom.engines.engine import choose_engine
from stillroom.engines.process import serve
from stillroom.engines.scheme import check_served, kv_cache_gib_for
from stillroom.errors import EnvironmentCannot
from stillroom.machine import this_machine
from stillroom.recipe import Bench
from stillroom.speed.load import Estimate, Level, guidellm_version, run_levels, warm_up
from stillroom.speed.sample import GIB, PeakMemory, memory_reader
from stillroom.stage import Job, Progress, StageResult

log = logging.getLogger(__name__)

RESULT_FILE = "measurements.json"

Record = dict[str, Any]
"""A variant's measurements, levels, and reason of refusal."""


def run(job: Job) -> StageResult:
    """Bench every variant among the job's inputs, in their order, and write measurements.json.

    Raises EnvironmentCannot where no engine is there, it dies, or a level has a request that fails.
    """
    config: Bench = job.config
    model_dirs = {role: artifact.model_dir for role, artifact in job.inputs.items() if not role.startswith("text:")}
    engine, installation = choose_engine(config.engine, list(model_dirs.values()))
    settings = _settings(config, list(model_dirs.values()))
    facts = _facts(config, engine, installation)
    records: dict[str, Record] = {}
    for done, (name, model_dir) in enumerate(model_dirs.items()):
        job.progress.update(done, len(model_dirs), "variants")
        kept = job.scratch_dir / f"{name.replace(':', '--')}.json"
        records[name] = _kept_record(kept, facts) or _bench(
            name, model_dir, config, settings, engine, installation, job.scratch_dir, job.progress
        )
        write_atomically(kept, json.dumps({"facts": facts, "record": records[name]}))
    job.progress.update(len(model_dirs), len(model_dirs), "variants")
    result = {"schema_version": 1, **facts, "variants": records}
    write_atomically(job.out_dir / RESULT_FILE, json.dumps(result, indent=2) + "\n")
    return StageResult(details={"engine": engine.name, "engine_version": installation.version, **_summary(records)})


def bench_directory(model_dir: Path, config: Bench, progress: Progress) -> list[Measurement]:
    """Bench one checkpoint directory by itself.

    Raises EnvironmentCannot where no engine takes it, or for what `run` raises.
    """
    engine, installation = choose_engine(config.engine, [model_dir])
    settings = _settings(config, [model_dir])
    with tempfile.TemporaryDirectory(prefix="stillroom-bench-") as folder:
        record = _bench("model", model_dir, config, settings, engine, installation, Path(folder), progress)
    return [Measurement.model_validate(m) for m in record["measurements"]]


def _bench(
    name: str,
    model_dir: Path,
    config: Bench,
    settings: ServeConfig,
    engine: Engine,
    installation: Installation,
    scratch_dir: Path,
    progress: Progress,
) -> Record:
    """Serve one variant and measure it."""
    if (reason := engine.refuses(model_dir, installation)) is not None:
        progress.log(f"{name} is not served: {reason}")
        return {"measurements": [], "refused": reason, "levels": []}
    work_dir = scratch_dir / f"work-{name.replace(':', '--')}"
    read_memory_of = memory_reader(installation.device)
    started = time.monotonic()
    with serve(
        engine,
        installation,
        model_dir,
        settings,
        log_path=work_dir / "engine.log",
        startup_timeout_s=config.startup_timeout_s,
    ) as server:
        progress.log(f"{name} served by {engine.name} {installation.version} after {server.started_s:.0f} s")
        with PeakMemory(read_memory_of(server.pid)) as memory:
            warm_up(server, engine, config)
            levels = run_levels(server, engine, config, model_dir, work_dir)
    measurements = [
        *_measurements(levels),
        _measurement("memory.peak_gib", Estimate(memory.peak_bytes / GIB, None, memory.num_samples), "GiB", False),
        _measurement("speed.startup_s", Estimate(server.started_s, None, 1), "s", False),
    ]
    best = max(level.output_tok_s.value for level in levels)
    log.info("bench: %s on %s, best %.1f tok/s, %.0f s", name, engine.name, best, time.monotonic() - started)
    progress.log(f"{name}: " + ", ".join(f"{lv.output_tok_s.value:.1f} tok/s at {lv.concurrency}" for lv in levels))
    return {
        "measurements": [measurement.model_dump(mode="json") for measurement in measurements],
        "refused": None,
        "levels": [asdict(level) for level in levels],
    }


def _measurements(levels: Sequence[Level]) -> list[Measurement]:
    """`speed.c4.output_tok_s` and so on for each level, and `speed.output_tok_s`, the best of them."""
    measurements = []
    for level in levels:
        where = f"speed.c{level.concurrency}"
        measurements.append(_measurement(f"{where}.output_tok_s", level.output_tok_s, "tok/s", True))
        for name, estimate in (("ttft_ms", level.ttft_ms), ("itl_ms", level.itl_ms), ("request_s", level.request_s)):
            if estimate is not None:
                measurements.append(_measurement(f"{where}.{name}", estimate, name.rpartition("_")[2], False))
    best = max((level.output_tok_s for level in levels), key=lambda estimate: estimate.value)
    return [*measurements, _measurement("speed.output_tok_s", best, "tok/s", True)]


def _measurement(name: str, estimate: Estimate, unit: str, higher_is_better: bool) -> Measurement:
    return Measurement(
        name=name,
        value=estimate.value,
        unit=unit,
        n=estimate.n,
        stderr=estimate.stderr,
        higher_is_better=higher_is_better,
    )


def _settings(config: Bench, model_dirs: Sequence[Path]) -> ServeConfig:
    """One set for all variants: on CPU a KV cache that holds the highest level of the largest variant.

    Raises InputError or EnvironmentCannot for what an engine would refuse only after a minute.
    """
    tokens = max(config.concurrency) * (config.prompt_tokens + config.output_tokens)
    gib = max(kv_cache_gib_for(model_dir, max(tokens, config.max_model_len)) for model_dir in model_dirs)
    settings = ServeConfig(max_model_len=config.max_model_len, served_model_name="model", kv_cache_gib=gib)
    for model_dir in model_dirs:
        check_served(model_dir, settings)
    return settings


def _facts(config: Bench, engine: Engine, installation: Installation) -> dict[str, str | int]:
    """What the numbers of a run have in common; a kept record with other facts is measured again."""
    return {
        "engine": engine.name,
        "engine_version": installation.version,
        "device": installation.device,
        "hardware": this_machine().description,
        "client": f"guidellm {guidellm_version()}",
        "prompt_tokens": config.prompt_tokens,
        "output_tokens": config.output_tokens,
        "max_model_len": config.max_model_len,
    }


def _kept_record(path: Path, facts: Mapping[str, Any]) -> Record | None:
    """What an earlier, killed run measured of this variant under the same facts."""
    if not path.is_file():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    record: Record | None = kept["record"] if kept["facts"] == facts else None
    return record


def _summary(records: Mapping[str, Record]) -> dict[str, Any]:
    """For the manifest: best throughput by variant, and what was refused why."""
    best = {
        name: measurement["value"]
        for name, record in records.items()
        for measurement in record["measurements"]
        if measurement["name"] == "speed.output_tok_s"
    }
    refused = {name: record["refused"] for name, record in records.items() if record["refused"]}
    if not best:
        raise EnvironmentCannot(f"no variant was served: {refused}")
    return {"output_tok_s": best, "refused": refused}
