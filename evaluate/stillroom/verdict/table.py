"""The verdict on a terminal: one main table that fits 80 columns, and one more each for quality and throughput where
there is more than one text, task or concurrency level. A dash is a number that was not measured; why is said below.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from stillroom.artifact import Measurement
from stillroom.verdict import columns
from stillroom.verdict.verdict import Row, Verdict

MISSING = "–"
METRICS_ACROSS = 3
"""Quality metrics side by side that 80 columns hold."""


def render_terminal(verdict: Verdict) -> RenderableType:
    """The sentence, the tables, the gates, and notes on what is missing."""
    parts: list[RenderableType] = [_sentence(verdict), _main(verdict)]
    metrics = columns.quality_metrics(verdict.rows)
    if len(metrics) > 1:
        parts += [_quality(verdict, metrics[i : i + METRICS_ACROSS]) for i in range(0, len(metrics), METRICS_ACROSS)]
    levels = columns.levels(verdict.rows)
    if len(levels) > 1:
        parts.append(_throughput(verdict, levels))
    if verdict.gates:
        parts.append(_gates(verdict))
    if notes := all_notes(verdict.rows):
        parts.append(Padding(Text("\n".join(notes), style="dim"), (0, 0, 1, 2)))
    return Group(*parts)


def all_notes(rows: Sequence[Row]) -> list[str]:
    """What was not measured and why, and what must be known beside the numbers; one line for variants that share it."""
    said: dict[str, list[str]] = {}
    for row in rows:
        for what, why in row.not_measured.items():
            said.setdefault(f"{'throughput' if what == 'speed' else what} not measured: {why}", []).append(row.variant)
        for note in row.notes:
            said.setdefault(note, []).append(row.variant)
    return [f"{', '.join(variants)}: {note}" for note, variants in said.items()]


def _sentence(verdict: Verdict) -> RenderableType:
    badge = Text(" PASSED ", "bold white on green") if verdict.passed else Text(" FAILED ", "bold white on red")
    return Padding(Text.assemble(badge, " ", verdict.sentence), (1, 0, 1, 0))


def _main(verdict: Verdict) -> Table:
    dense = verdict.row("dense")
    table = _table(None)
    table.add_column("params", justify="right")
    table.add_column("weights", justify="right")
    table.add_column("memory", justify="right")
    if verdict.headline:
        table.add_column(columns.title(verdict.headline), justify="right")
    table.add_column("tok/s", justify="right")
    table.add_column("speed", justify="right")
    for row in verdict.rows:
        gained = columns.speed_up(row, dense)
        table.add_row(
            _name(row, verdict.final),
            _cell(row.measurements.get(columns.PARAMETERS), columns.show),
            _cell(row.measurements.get(columns.WEIGHT_BYTES), columns.show),
            _cell(columns.memory(row), columns.show),
            *([_cell(row.measurements.get(verdict.headline), columns.with_error)] if verdict.headline else []),
            _cell(columns.throughput(row), lambda m: columns.number(m.value)),
            MISSING if gained is None else columns.times(gained),
        )
    return table


def _quality(verdict: Verdict, metrics: Sequence[str]) -> Table:
    table = _table("Quality, ± one standard error")
    for metric in metrics:
        table.add_column(columns.title(metric), justify="right")
    for row in verdict.rows:
        cells = [_cell(row.measurements.get(metric), columns.with_error) for metric in metrics]
        table.add_row(_name(row, verdict.final), *cells)
    return table


def _throughput(verdict: Verdict, levels: Sequence[int]) -> Table:
    table = _table("Output tokens per second, by requests in flight")
    for level in levels:
        table.add_column(str(level), justify="right")
    for row in verdict.rows:
        found = [row.measurements.get(f"speed.c{level}.output_tok_s") for level in levels]
        if any(found):
            cells = [_cell(measurement, lambda m: columns.number(m.value)) for measurement in found]
            table.add_row(_name(row, verdict.final), *cells)
    return table


def _gates(verdict: Verdict) -> Table:
    table = Table(box=SIMPLE_HEAD, title=f"Gates on {verdict.final}", title_justify="left", title_style="bold")
    table.add_column("")
    table.add_column("gate", overflow="fold")
    table.add_column("measured", overflow="fold")
    for gate in verdict.gates:
        mark = Text("pass", "green") if gate.status == "pass" else Text("FAIL", "bold red")
        table.add_row(mark, Text(gate.gate), Text(columns.show_gate(gate, verdict.row(verdict.final))))
    return table


def _table(title: str | None) -> Table:
    table = Table(
        box=SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", padding=(0, 1), pad_edge=False
    )
    table.add_column("variant", overflow="fold")
    return table


def _name(row: Row, final: str) -> Text:
    return Text(row.variant, "bold" if row.variant == final else "dim" if row.role == "baseline" else "")


def _cell(measurement: Measurement | None, write: Callable[[Measurement], str]) -> str:
    return MISSING if measurement is None else write(measurement)
