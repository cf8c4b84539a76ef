"""Which measurements the tables show and how their numbers are written.

Names are dotted: `quality.LABEL.METRIC` for texts and tasks, `speed.cN.METRIC` at N requests in flight, `size.*`. The
name says what a number is; nothing is listed by hand, so a new metric appears by being measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence

from stillroom.artifact import Measurement
from stillroom.verdict.gates import GateResult, parse_gate
from stillroom.verdict.verdict import Row

PARAMETERS = "size.parameters"
WEIGHT_BYTES = "size.weight_bytes"
THROUGHPUT = "speed.output_tok_s"
"""The best over all concurrency levels."""

PEAK_MEMORY = "memory.peak_gib"

TEXT_METRICS = ("perplexity", "bits_per_byte", "loss")
TASK_METRICS = ("acc_norm", "acc", "exact_match")
"""Of several metrics of a task, the first of these that it has stands for it."""

ABBREVIATIONS = {
    "ttft": "time to first token",
    "itl": "inter-token latency",
    "request": "whole request",
}
UNITS_SPELLED = {"tok/s": "tokens per second", "s": "seconds"}

SAME_TOKENIZER = 1e-3
"""Bytes per token on one text differ by less than this between models that share a tokenizer."""

_LEVEL = re.compile(r"speed\.c(\d+)\.(\w+)")


def split_name(metric: str) -> tuple[str, str]:
    """(`arc_easy`, `acc_norm`) for `quality.arc_easy.acc_norm`."""
    label, _, what = metric.removeprefix("quality.").rpartition(".")
    return label, what


def text_labels(rows: Iterable[Row]) -> list[str]:
    """Held-out texts, in the order they were measured."""
    return list(dict.fromkeys(
        split_name(name)[0] for row in rows for name in row.measurements
        if name.startswith("quality.") and name.endswith(".perplexity")
    ))  # fmt: skip


def quality_metrics(rows: Sequence[Row]) -> list[str]:
    """One metric of each task, then of each text: perplexity, or bits per byte where tokenizers differ."""
    texts = text_labels(rows)
    by_task: dict[str, list[str]] = {}
    for row in rows:
        for name in row.measurements:
            label, _ = split_name(name)
            if name.startswith("quality.") and label not in texts and name not in by_task.get(label, []):
                by_task.setdefault(label, []).append(name)
    tasks = [min(names, key=_task_rank) for names in by_task.values()]
    text_metric = "perplexity" if share_tokenizer(rows) else "bits_per_byte"
    return tasks + [f"quality.{label}.{text_metric}" for label in texts]


def headline(rows: Sequence[Row]) -> str | None:
    """The quality metric that stands for the others: the first task's, else the first text's."""
    return next(iter(quality_metrics(rows)), None)


def share_tokenizer(rows: Iterable[Row]) -> bool:
    """Whether every variant cuts the texts into the same tokens, so that perplexities compare."""
    bytes_per_token: dict[str, list[float]] = {}
    for row in rows:
        for label in text_labels([row]):
            loss, bits = row.value(f"quality.{label}.loss"), row.value(f"quality.{label}.bits_per_byte")
            if loss and bits:
                bytes_per_token.setdefault(label, []).append(loss / bits)
    return all(max(found) <= min(found) * (1 + SAME_TOKENIZER) for found in bytes_per_token.values())


def levels(rows: Iterable[Row]) -> list[int]:
    """Concurrency levels that were measured."""
    found = {level_of(name) for row in rows for name in row.measurements if name.endswith(".output_tok_s")}
    return sorted(level for level in found if level is not None)


def level_of(metric: str) -> int | None:
    """16 for `speed.c16.output_tok_s`, None for what was not measured at a level."""
    match = _LEVEL.fullmatch(metric)
    return int(match[1]) if match else None


def throughput(row: Row) -> Measurement | None:
    """The variant's best output tokens per second."""
    if THROUGHPUT in row.measurements:
        return row.measurements[THROUGHPUT]
    found = [m for name, m in row.measurements.items() if level_of(name) is not None and name.endswith(".output_tok_s")]
    return max(found, key=lambda m: m.value, default=None)


def memory(row: Row) -> Measurement | None:
    """The most memory that the engine held while it served the variant."""
    return row.measurements.get(PEAK_MEMORY)


def title(metric: str) -> str:
    """`python-docs perplexity` for `quality.python-docs.perplexity`."""
    label, what = split_name(metric)
    return f"{label} {what.replace('_', ' ') if what in TEXT_METRICS else what}"


def words(metric: str, unit: str) -> str:
    """`output tokens per second` for `output_tok_s`, `time to first token, ms` for `ttft_ms`."""
    plain = metric.removesuffix(f"_{unit}").removesuffix("_tok_s")
    spelled = " ".join(ABBREVIATIONS.get(part, part) for part in plain.split("_"))
    return f"{spelled}, {UNITS_SPELLED.get(unit, unit)}"


def number(value: float, digits: int = 4) -> str:
    """Significant digits without an exponent where it can be helped: 0.6123, 14.21, 1,234."""
    if value != value or value in (float("inf"), float("-inf")):
        return str(value)
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    text = f"{value:.{digits}g}"
    if "e" in text:
        return text
    whole = len(text.lstrip("-").split(".")[0]) if abs(value) >= 1 else 0
    return f"{value:.{digits - whole}f}" if abs(value) >= 0.1 else text


def with_error(measurement: Measurement) -> str:
    """`14.21 ± 0.35`: the error with two digits, the value as precise as the error."""
    if measurement.stderr is None or not 0 < measurement.stderr < float("inf"):
        return number(measurement.value)
    error = f"{measurement.stderr:.2g}"
    if "e" in error:
        return f"{number(measurement.value)} ± {error}"
    decimals = len(error.partition(".")[2])
    return f"{measurement.value:,.{decimals}f} ± {measurement.stderr:,.{decimals}f}"


def count(value: float) -> str:
    """134.5M, 6.02B."""
    return _scaled(value, (("B", 1e9), ("M", 1e6), ("K", 1e3)))


def size(value: float) -> str:
    """257 MB, 16.4 GB; decimal, as model sizes are given."""
    return _scaled(value, ((" GB", 1e9), (" MB", 1e6), (" kB", 1e3)), plain=" B")


def times(value: float) -> str:
    """1.40x"""
    return f"{value:.2f}x" if value < 100 else f"{value:,.0f}x"


def ratio(value: Measurement | None, of: Measurement | None) -> float | None:
    """None where one of them was not measured."""
    return None if value is None or of is None or not of.value else value.value / of.value


def speed_up(row: Row, dense: Row) -> float | None:
    """Throughput over dense's."""
    return ratio(throughput(row), throughput(dense))


def show(measurement: Measurement) -> str:
    """The number as its unit wants it, with its error."""
    if measurement.unit in _WRITERS:
        return _WRITERS[measurement.unit](measurement.value)
    return with_error(measurement)


def show_gate(gate: GateResult, final: Row) -> str:
    """`138 MB <= 161 MB`, in the metric's own unit; the reason where something was not measured."""
    if gate.value is None or gate.bound is None:
        return gate.reason
    parsed = parse_gate(gate.gate)
    write = _WRITERS.get(final.measurements[parsed.metric].unit, number)
    return f"{write(gate.value)} {parsed.op} {write(gate.bound)}"


def _gib(value: float) -> str:
    """In the decimal units that the sizes beside it have."""
    return size(value * 2**30)


_WRITERS: dict[str, Callable[[float], str]] = {"bytes": size, "parameters": count, "GiB": _gib}
"""How a unit is written that is not written as a plain number."""


def _scaled(value: float, units: tuple[tuple[str, float], ...], plain: str = "") -> str:
    for unit, factor in units:
        if value >= factor:
            return f"{number(value / factor, 3)}{unit}"
    return f"{value:.0f}{plain}"


def _task_rank(metric: str) -> tuple[int, str]:
    what = split_name(metric)[1].partition("@")[0]
    return (TASK_METRICS.index(what) if what in TASK_METRICS else len(TASK_METRICS), metric)
