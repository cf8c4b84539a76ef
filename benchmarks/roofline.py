"""The roofline's predicted ratio dense / pruned against the measured one, on vLLM.

    python benchmarks/roofline.py MODEL_DIR --out FOLDER [--shapes depth-24 ffn-1024 ...] [--batches 1 16] [--rounds 5]

Cuts six shapes from a checkpoint (which channels stay does not matter for speed, so the first ones do), serves each
beside the dense model, and times decode steps of both in turns, the order changed every round. A step's time is the
difference between a long and a short answer to the same prompts over the difference of their lengths, so neither the
prompt nor the client nor the connection is in it. On CPU the roofline's bandwidth and peak are measured first.

Each shape's result is kept in FOLDER as soon as it is there, so a killed run goes on; the last lines compare. `fit` is
the roofline corrected by the other five shapes and the dense model alone (prune/correction.py), never by the shape that
is judged. FOLDER/measured.json is the table that a recipe's `target.measured` takes. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import torch

from stillroom.artifact import write_atomically
from stillroom.engines.contract import Engine, Installation, ServeConfig
from stillroom.engines.engine import choose_engine
from stillroom.engines.process import RunningServer, serve
from stillroom.machine import this_machine
from stillroom.models.shape import ModelShape, read_config, shape_of
from stillroom.prune.correction import MeasuredPoint, MeasuredTable, fit_points
from stillroom.prune.cost import Hardware, Load, decode_ms, known_hardware
from stillroom.prune.cut import Cut
from stillroom.prune.measure_cpu import kept_cpu
from stillroom.prune.surgery import cut_checkpoint, source_shape

SHAPES: dict[str, dict[str, float]] = {
    "depth-24": {"num_layers": 0.8},
    "depth-18": {"num_layers": 0.6},
    "ffn-1024": {"intermediate_size": 2 / 3},
    "ffn-768": {"intermediate_size": 0.5},
    "hidden-512": {"hidden_size": 8 / 9},
    "both-24x1152": {"num_layers": 0.8, "intermediate_size": 0.75},
}
"""Shares of the dense sizes; the names are those of SmolLM2-135M."""
PROMPT_TOKENS = 32
SHORT, LONG = 8, 136
TIMEOUT_S = 600.0
STARTUP_S = 600.0


def main() -> None:
    arguments = _arguments()
    folder = Path(arguments.out)
    folder.mkdir(parents=True, exist_ok=True)
    engine, installation = choose_engine(arguments.engine, [arguments.model])
    name = arguments.hardware or "cpu"
    hardware = kept_cpu(folder / "cpu.json") if name == "cpu" else known_hardware()[name]
    print(f"{engine.name} {installation.version} on {this_machine().description}; {hardware}")
    for shape_name in arguments.shapes:
        kept = folder / f"{shape_name}.json"
        if not kept.exists():
            record = _measure_pair(arguments, shape_name, engine, installation)
            write_atomically(kept, json.dumps(record, indent=1) + "\n")
    records = {n: json.loads((folder / f"{n}.json").read_text(encoding="utf-8")) for n in arguments.shapes}
    table = _table(records, arguments.model, name, f"{engine.name} {installation.version}", hardware)
    write_atomically(folder / "measured.json", table.model_dump_json(indent=1) + "\n")
    _report(records, table, hardware)


def cut(model_dir: Path, out_dir: Path, shares: dict[str, float]) -> None:
    """Keep the first channels and evenly spread layers of a checkpoint."""
    shape = source_shape(model_dir)
    sizes = {field: round(share * getattr(shape, field)) for field, share in shares.items()}
    num_layers = sizes.get("num_layers", shape.num_layers)
    layers = tuple(i * shape.num_layers // num_layers for i in range(num_layers))
    ffn, hidden = sizes.get("intermediate_size"), sizes.get("hidden_size")
    even = torch.full((shape.hidden_size,), 1 / shape.hidden_size)
    norms = [n for pattern in shape.family.hidden_norms for n in _spelled(shape, pattern)]
    cut_checkpoint(
        model_dir,
        shape,
        Cut(
            layers,
            hidden=None if hidden is None else tuple(range(hidden)),
            ffn=None if ffn is None else {i: tuple(range(ffn)) for i in layers},
        ),
        out_dir,
        norm_shares=None if hidden is None else dict.fromkeys(norms, even),
    )


def _spelled(shape: ModelShape, pattern: str) -> list[str]:
    return list(shape.spelled_out(pattern).values()) if "{layer}" in pattern else [pattern]


def _measure_pair(
    arguments: argparse.Namespace, shape_name: str, engine: Engine, installation: Installation
) -> dict[str, Any]:
    """Step times of the dense model and of one shape of it, by batch, measured in turns."""
    settings = ServeConfig(max_model_len=512, served_model_name="model")
    with tempfile.TemporaryDirectory(prefix="roofline-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        cut(arguments.model, folder / "pruned", SHAPES[shape_name])
        config = read_config(folder / "pruned")
        servers = {
            role: stack.enter_context(
                serve(engine, installation, model_dir, settings, log_path=folder / f"{role}.log",
                      startup_timeout_s=STARTUP_S)
            )
            for role, model_dir in (("dense", arguments.model), ("pruned", folder / "pruned"))
        }  # fmt: skip
        steps: dict[str, dict[str, list[float]]] = {str(b): {"dense": [], "pruned": []} for b in arguments.batches}
        for round_number in range(-1, arguments.rounds):  # the first round warms up and does not count
            order = ("dense", "pruned") if round_number % 2 else ("pruned", "dense")
            for batch in arguments.batches:
                for role in order:
                    step_ms = _step_ms(servers[role], engine, batch)
                    if round_number >= 0:
                        steps[str(batch)][role].append(step_ms)
        print(
            shape_name, {b: {r: round(statistics.median(v), 3) for r, v in each.items()} for b, each in steps.items()}
        )
        return {"config": config, "step_ms": steps}


def _step_ms(server: RunningServer, engine: Engine, batch: int) -> float:
    """Milliseconds between two output tokens at this batch."""
    seconds = {tokens: _answer_s(server, engine, batch, tokens) for tokens in (SHORT, LONG)}
    return 1e3 * (seconds[LONG] - seconds[SHORT]) / (LONG - SHORT)


def _answer_s(server: RunningServer, engine: Engine, batch: int, tokens: int) -> float:
    """Seconds until `batch` requests, sent together, have all been answered."""

    def ask(stream: int) -> None:
        prompt = [100 + (7 * stream + 13 * i) % 1000 for i in range(PROMPT_TOKENS)]
        body = {"model": server.model_name, "prompt": prompt, "max_tokens": tokens, **engine.exactly(tokens)}
        answer = client.post("/v1/completions", json=body).raise_for_status().json()
        assert answer["usage"]["completion_tokens"] == tokens, answer["usage"]

    with (
        httpx.Client(base_url=server.base_url, timeout=TIMEOUT_S, trust_env=False) as client,
        ThreadPoolExecutor(batch) as pool,
    ):
        started = time.perf_counter()
        list(pool.map(ask, range(batch)))
        return time.perf_counter() - started


def _table(
    records: dict[str, Any], model_dir: Path, hardware_name: str, engine: str, hardware: Hardware
) -> MeasuredTable:
    """All points. The dense model's is its median over all pairs; a shape's is that times its own pairs' ratio, so that
    the machine's drift from pair to pair is not taken for a difference of shapes."""
    points = []
    for batch in next(iter(records.values()))["step_ms"]:
        every = [ms for record in records.values() for ms in record["step_ms"][batch]["dense"]]
        dense_ms = statistics.median(every)
        points.append(_point("dense", read_config(model_dir), batch, dense_ms, 0.0, len(every)))
        for name, record in records.items():
            ratio, stderr = _ratio(record["step_ms"][batch])
            step_ms = dense_ms / ratio
            rounds = len(record["step_ms"][batch]["pruned"])
            points.append(_point(name, record["config"], batch, step_ms, step_ms * stderr / ratio, rounds))
    return MeasuredTable(
        hardware=hardware_name,
        engine=engine,
        machine=this_machine().description,
        figures=hardware,
        points=tuple(points),
    )


def _point(name: str, config: dict[str, Any], batch: str, step_ms: float, stderr: float, n: int) -> MeasuredPoint:
    context = PROMPT_TOKENS + (SHORT + LONG) // 2
    return MeasuredPoint(
        label=name, config=config, batch=int(batch), context=context, step_ms=step_ms, stderr_ms=stderr, n=n
    )


def _ratio(steps: dict[str, list[float]]) -> tuple[float, float]:
    """Dense over pruned: the median of the rounds' ratios, and its standard error."""
    ratios = [dense / pruned for dense, pruned in zip(steps["dense"], steps["pruned"], strict=True)]
    spread = math.sqrt(math.pi / 2) * statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else 0.0
    return statistics.median(ratios), spread


def _report(records: dict[str, Any], table: MeasuredTable, hardware: Hardware) -> None:
    print("shape          batch  params  dense ms  measured ratio    roofline  error    fit     error")
    for batch in sorted({p.batch for p in table.points}):
        points = {p.label: p for p in table.points if p.batch == batch}
        dense = points["dense"]
        worst: dict[str, float] = {}
        for name, record in records.items():
            point = points[name]
            measured, stderr = _ratio(record["step_ms"][str(batch)])
            others = [p for p in points.values() if p is not point]
            predicted = {"roofline": _predicted(dense, point, [], hardware)}
            if len(others) > 1:
                predicted["fit"] = _predicted(dense, point, others, hardware)
            error = {way: ratio / measured - 1 for way, ratio in predicted.items()}
            worst = {way: max(worst.get(way, 0.0), abs(error[way])) for way in error}
            share = point.shape.num_params / dense.shape.num_params
            print(
                f"{name:14s} {batch:5d} {share:7.3f} {dense.step_ms:9.2f}   {measured:.3f} ± {stderr:.3f} "
                + " ".join(f"{ratio:10.3f} {error[way]:+7.1%}" for way, ratio in predicted.items())
            )
        (fit,) = fit_points(list(points.values()), hardware).fits
        roofline_ms = decode_ms(dense.shape, dense.load, hardware)
        print(
            f"batch {batch}: largest error {', '.join(f'of the {way} {most:.1%}' for way, most in worst.items())}; "
            f"dense step {dense.step_ms:.2f} ms = {fit.scale:.3f} x {roofline_ms:.2f} (roofline) + "
            f"{fit.layer_ms:.4f} x {dense.shape.num_layers} layers + {fit.fixed_ms:.2f} ms"
        )


def _predicted(
    dense: MeasuredPoint, point: MeasuredPoint, fitted: Sequence[MeasuredPoint], hardware: Hardware
) -> float:
    """Dense over pruned by the roofline, corrected by `fitted` where there are any."""
    correction = fit_points(fitted, hardware)
    load = Load(dense.batch, dense.context)
    return correction.decode_ms(dense.shape, load, hardware) / correction.decode_ms(point.shape, load, hardware)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", required=True)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--engine", default="vllm")
    parser.add_argument("--hardware", choices=[*known_hardware(), "cpu"])
    arguments = parser.parse_args()
    shape_of(read_config(arguments.model), str(arguments.model))
    return arguments


if __name__ == "__main__":
    main()
