"""The report: one HTML page that opens anywhere, now and in ten years. No script, no network, no font of its own.

All that it says is in verdict.json, so it can be made again from that file alone. Whatever comes from outside (names,
paths, reasons) is escaped.
"""

from __future__ import annotations

import math
import shlex
import string
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from stillroom.artifact import Measurement, write_atomically
from stillroom.prune.explain import Explanation, LayerCut
from stillroom.prune.explain_table import AXIS_WORDS, chosen_words, cost_words, method, size_cells
from stillroom.prune.frontier import Frontier, Scored
from stillroom.verdict import columns, plots
from stillroom.verdict.plots import Bar, Look, Panel, Point, Tried
from stillroom.verdict.table import all_notes
from stillroom.verdict.verdict import Row, Verdict

REPORT_FILE = "report.html"
COST_LABELS = {
    "params": "parameters",
    "memory_gb": "GB on each GPU",
    "latency_ms": "milliseconds between tokens",
    "throughput": "output tokens per second (roofline)",
}
SIZE_WORDS = {
    "num_layers": "layers",
    "hidden_size": "hidden",
    "intermediate_size": "FFN",
    "moe_intermediate_size": "expert FFN",
    "num_experts": "experts",
    "num_attention_heads": "heads",
    "num_key_value_heads": "KV groups",
}
TEMPLATE = Path(__file__).with_name("report_template.html")


def write_report(verdict: Verdict, out_dir: Path) -> Path:
    """Write report.html, and each plot as an .svg beside it."""
    for name, svg in draw(verdict).items():
        write_atomically(out_dir / f"{name}.svg", plots.standalone(svg))
    write_atomically(out_dir / REPORT_FILE, render_html(verdict))
    return out_dir / REPORT_FILE


def render_html(verdict: Verdict) -> str:
    """The whole page."""
    drawn = draw(verdict)
    sections = (
        _gates(verdict),
        _section("Every variant", _main_table(verdict) + _notes(verdict)),
        _tradeoff(verdict, drawn),
        _baselines(verdict),
        _throughput(verdict),
        _cuts(verdict, drawn),
        _searches(verdict, drawn),
        _plots(drawn),
        _provenance(verdict),
    )
    template = string.Template(TEMPLATE.read_text(encoding="utf-8"))
    return template.substitute(
        title=escape(f"{verdict.final}, {verdict.recipe}: stillroom verdict"),
        recipe=escape(verdict.recipe),
        final=escape(verdict.final),
        status="pass" if verdict.passed else "fail",
        badge=_badge(verdict),
        sentence=escape(verdict.sentence),
        tiles=_tiles(verdict),
        sections="\n".join(filter(None, sections)),
        plot_css=plots.PLOT_CSS,
        footer=_footer(verdict),
    )


def draw(verdict: Verdict) -> dict[str, str]:
    """Every plot that there are numbers for, by file name."""
    drawn: dict[str, str] = {}
    if (points := _points(verdict)) and verdict.headline:
        drawn["quality-throughput"] = plots.scatter(
            points,
            plot_id="quality-throughput",
            x_label="best output tokens per second",
            y_label=columns.title(verdict.headline),
            higher_is_better=_higher_is_better(verdict, verdict.headline),
            title="Quality against throughput",
        )
    weights = [
        Bar(row.variant, size, _weight_text(row, verdict.row("dense")), _look(row, verdict.final))
        for row in verdict.rows
        if (size := row.value(columns.WEIGHT_BYTES)) is not None
    ]
    if weights:
        drawn["weights"] = plots.bars(weights, plot_id="weights", title="Bytes of weights")
    for stage, logged in verdict.losses.items():
        if not (steps := [(p.tokens, p.loss) for p in logged if math.isfinite(p.loss)]):
            continue
        drawn[f"loss-{stage}"] = plots.curve(
            steps,
            plot_id=f"loss-{stage}",
            x_label="tokens",
            y_label="loss",
            title=f"Loss of {stage}",
        )
    for stage, cut in verdict.prunes.items():
        if panels := _panels(cut):
            decoder = next((layer.index for layer in cut.layers if layer.stack == "decoder"), None)
            drawn[f"cut-{stage}"] = plots.layers(
                panels,
                cut.dropped,
                plot_id=f"cut-{stage}",
                x_label="layer (× was cut)" if decoder is None else f"layer (× was cut; the decoder from {decoder})",
                title=f"What {stage} cut, and what it cost",
            )
    for stage, search in verdict.frontiers.items():
        if tried := _tried(search):
            drawn[f"frontier-{stage}"] = plots.searched(
                tried,
                plot_id=f"frontier-{stage}",
                x_label=COST_LABELS[search.cost_axis],
                cheaper_is_less=search.cost_axis != "throughput",
                title=f"What {stage} tried",
            )
    return drawn


def _badge(verdict: Verdict) -> str:
    passed = sum(gate.status == "pass" for gate in verdict.gates)
    if verdict.gates:
        return f"{'Passed' if verdict.passed else 'Failed'}: {passed} of {len(verdict.gates)} gates"
    return "No gates given" if verdict.passed else "Verification failed"


def _tiles(verdict: Verdict) -> str:
    """The judged variant beside the dense model, in four numbers."""
    final, dense = verdict.row(verdict.final), verdict.row("dense")
    tiles = []
    if verdict.headline:
        mine, theirs = final.measurements.get(verdict.headline), dense.measurements.get(verdict.headline)
        title = f"{columns.title(verdict.headline)}, of dense's"
        better_up = _higher_is_better(verdict, verdict.headline)
        tiles.append(_tile(title, mine, theirs, columns.with_error, "{:.0%}".format if better_up else columns.times))
    tiles.append(
        _tile("throughput, of dense's", columns.throughput(final), columns.throughput(dense), _tok_s, columns.times)
    )
    for title, metric in (
        ("bytes of weights, of dense's", columns.WEIGHT_BYTES),
        ("parameters, of dense's", columns.PARAMETERS),
    ):
        tiles.append(
            _tile(title, final.measurements.get(metric), dense.measurements.get(metric), columns.show, columns.times)
        )
    return f'<dl class="tiles">{"".join(tiles)}</dl>'


def _tile(
    title: str,
    mine: Measurement | None,
    theirs: Measurement | None,
    write: Callable[[Measurement], str],
    compare: Callable[[float], str],
) -> str:
    share = columns.ratio(mine, theirs)
    if mine is None or theirs is None or share is None:
        return f'<div class="tile"><dt>{escape(title)}</dt><dd class="none">not measured</dd></div>'
    both = f"{write(mine)} against {write(theirs)}"
    return f'<div class="tile"><dt>{escape(title)}</dt><dd>{escape(compare(share))}</dd><dd>{escape(both)}</dd></div>'


def _gates(verdict: Verdict) -> str:
    if not verdict.gates:
        return ""
    final = verdict.row(verdict.final)
    rows = [
        (_pill(gate.status, gate.status), f"<code>{escape(gate.gate)}</code>", escape(columns.show_gate(gate, final)))
        for gate in verdict.gates
    ]
    return _section(f"Gates on {verdict.final}", _words(("result", "gate", "measured"), rows))


def _main_table(verdict: Verdict) -> str:
    metrics = columns.quality_metrics(verdict.rows)
    heads = [
        "variant",
        "parameters",
        "weights",
        "peak memory",
        *map(columns.title, metrics),
        "best output tok/s",
        "speed-up",
    ]
    body = []
    dense = verdict.row("dense")
    for row in verdict.rows:
        gained = columns.speed_up(row, dense)
        cells = [
            _cell(row.measurements.get(columns.PARAMETERS), columns.show),
            _cell(row.measurements.get(columns.WEIGHT_BYTES), columns.show),
            _cell(columns.memory(row), columns.show, row.not_measured.get("speed")),
            *(
                _cell(row.measurements.get(metric), _value_and_error, row.not_measured.get("quality"))
                for metric in metrics
            ),
            _cell(columns.throughput(row), _tok_s, row.not_measured.get("speed")),
            '<td class="none">not measured</td>' if gained is None else f"<td>{columns.times(gained)}</td>",
        ]
        body.append(_row(row, verdict, cells))
    return _table(heads, body, "Quality with ± one standard error; speed-up is throughput over dense's.")


def _throughput(verdict: Verdict) -> str:
    """By concurrency: output tokens per second first, then the latencies that were measured with it."""
    levels = columns.levels(verdict.rows)
    if not levels:
        return ""
    names = {n.split(".", 2)[2] for r in verdict.rows for n in r.measurements if columns.level_of(n) is not None}
    ordered = sorted(names, key=lambda name: (name != "output_tok_s", name))
    tables = [_by_level(verdict, name, levels) for name in ordered]
    return _section("Throughput and latency", f'{_bench_words(verdict)}<div class="stack">{"".join(tables)}</div>')


def _by_level(verdict: Verdict, name: str, levels: Sequence[int]) -> str:
    """One metric: variants down, requests in flight across."""
    body = []
    unit = ""
    for row in verdict.rows:
        found = [row.measurements.get(f"speed.c{level}.{name}") for level in levels]
        if any(found):
            unit = next(m.unit for m in found if m)
            body.append(_row(row, verdict, [_cell(m, _value_and_error) for m in found]))
    caption = f"{columns.words(name, unit)}, by requests in flight".capitalize()
    return _table(["variant", *map(str, levels)], body, caption)


def _bench_words(verdict: Verdict) -> str:
    facts = ", ".join(f"{k.replace('_', ' ')} {_fact(v)}" for k, v in verdict.bench.items() if k != "schema_version")
    return f'<p class="soft">All variants were served and loaded by the same code in the same run: {escape(facts)}.</p>'


def _tradeoff(verdict: Verdict, drawn: Mapping[str, str]) -> str:
    if "quality-throughput" not in drawn:
        return ""
    caption = (
        "Better is up and to the right. Square: dense; circle: a stage; diamond: a baseline; filled: the one judged. "
        "The dashed line joins variants that no other one beats on both axes. Vertical bars: one standard error."
    )
    figure = f'<figure class="card"><div class="wide" style="overflow-x:auto">{drawn["quality-throughput"]}</div>'
    return _section("Quality against throughput", f"{figure}<figcaption>{caption}</figcaption></figure>")


def _baselines(verdict: Verdict) -> str:
    if not verdict.baselines:
        return ""
    colour = {"use the baseline": "fail", "keep": "pass"}
    rows = [
        (s.baseline.removeprefix("baseline:"), _pill(s.outcome, colour.get(s.outcome, "")), escape(s.sentence))
        for s in verdict.baselines
    ]
    return _section("Against the baselines", _words(("baseline", "judgement", "why"), rows))


def _cuts(verdict: Verdict, drawn: Mapping[str, str]) -> str:
    """For each prune stage: what went of every layer and size, and what that cost."""
    parts = []
    for stage, cut in verdict.prunes.items():
        chosen = chosen_words(cut).removeprefix(f"{cut.name}: ")
        words = f"<p>{escape(chosen[0].upper() + chosen[1:])}. {escape(cost_words(cut))}.</p>"
        svg = drawn.get(f"cut-{stage}", "")
        caption = (
            "Costs are KL to the model before the cut, in nats per token of calibration text; importance is each "
            "method's own. × below a column: that layer went."
        )
        plot = f'<div class="wide" style="overflow-x:auto">{svg}</div><figcaption>{caption}</figcaption>'
        figure = f'<figure class="card">{plot}</figure>' if svg else ""
        parts.append(_section(f"What {stage} cut", f'{words}<div class="stack">{figure}{_sizes_table(cut)}</div>'))
    return "\n".join(parts)


def _sizes_table(cut: Explanation) -> str:
    """Every size that was cut, and their sum."""
    heads = ["size", "before", "after", "kept", "parameters saved, alone", "importance lost"]
    rows = [[*size_cells(size)] for size in cut.sizes]
    kept = f"{cut.params_after / cut.params_before:.0%}"
    saved = f"{cut.params_before - cut.params_after:,}"
    rows.append(["parameters", f"{cut.params_before:,}", f"{cut.params_after:,}", kept, saved, ""])
    body = []
    for name, *cells in rows:
        look = ' class="final"' if name == "parameters" else ""
        cells_html = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        body.append(f'<tr{look}><th scope="row">{escape(name)}</th>{cells_html}</tr>')
    return _table(heads, body, "Cuts overlap, so together they save less than the sum of what each saves alone.")


def _panels(cut: Explanation) -> list[Panel]:
    """Everything that was measured of the layers."""

    def column(label: str, value: Callable[[LayerCut], float | None], **how: Any) -> list[Panel]:
        values = tuple(value(layer) for layer in cut.layers)
        return [Panel(label, values, **how)] if any(v is not None for v in values) else []

    panels = column("KL without this layer alone, nats/token", lambda layer: layer.kl_without)
    panels += column(method(cut.score_method), lambda layer: layer.score, height=90.0 if panels else 150.0)
    for axis, words in AXIS_WORDS.items():
        panels += column(
            f"share of importance lost: {words}",
            lambda layer, axis=axis: layer.importance_lost.get(axis),  # type: ignore[misc]
            height=60.0,
            write="{:.0%}".format,
        )
    if any(layer.gain for layer in cut.layers):
        panels += column("KL taken back by repair here, nats/token", lambda layer: layer.gain, look="gain", height=90.0)
    return panels


def _searches(verdict: Verdict, drawn: Mapping[str, str]) -> str:
    """For each stage that searched for a target: the plot, and every shape that was tried."""
    parts = []
    for stage, search in verdict.frontiers.items():
        wanted = ", ".join(
            f"{name} {columns.number(value)} (the dense model's: {columns.number(search.dense[name])})"
            for name, value in search.target.items()
        )
        caption = (
            f"Target: {wanted}. Better is up. Square: depth alone was cut; diamond: width alone; circle: both. With a "
            "dot: ranked again after a short distillation; filled: the winner. The dashed line joins shapes that no "
            "other one beats."
        )
        svg = drawn.get(f"frontier-{stage}")
        plot = f'<div class="wide" style="overflow-x:auto">{svg}</div>' if svg else ""
        figure = f'<figure class="card">{plot}<figcaption>{escape(caption)}</figcaption></figure>'
        parts.append(_section(f"What {stage} tried", figure + _folded("all shapes", _tried_table(search))))
    return "\n".join(parts)


def _tried_table(search: Frontier) -> str:
    """Every candidate, the best first, with what it costs and loses."""
    axis = search.cost_axis
    again = any(c.reranked is not None for c in search.candidates)
    heads = [*(SIZE_WORDS[name] for name in search.candidates[0].sizes), "parameters"]
    heads += [] if axis == "params" else [COST_LABELS[axis]]
    heads += ["KL, nats/token", *(["after distillation"] if again else [])]
    body = []
    for c in sorted(search.candidates, key=lambda c: (not c.winner, math.isnan(c.kl), c.kl)):
        cells = [f"{size:,}" for size in c.sizes.values()] + [f"{c.params:,}"]
        cells += [] if axis == "params" else [columns.number(getattr(c, axis))]
        cells.append(columns.number(c.kl) if math.isfinite(c.kl) else "not finite")
        if again:
            cells.append("" if c.reranked is None else columns.number(c.reranked))
        look = ' class="final"' if c.winner else ""
        body.append(f"<tr{look}>{''.join(f'<td>{escape(cell)}</td>' for cell in cells)}</tr>")
    return _table(heads, body, "The winner first, then by KL to the dense model after cut and repair.")


def _tried(search: Frontier) -> list[Tried]:
    """The shapes with a finite score; the winner and the best of depth and of width alone are named."""
    finite = [c for c in search.candidates if math.isfinite(c.kl)]
    named = {id(c) for c in finite if c.winner}
    for cut in ("depth", "width"):
        named |= {id(min(alone, key=lambda c: c.kl)) for alone in [[c for c in finite if c.cut == cut]] if alone}
    return [
        Tried(
            label=_shape_words(c, search),
            cost=getattr(c, search.cost_axis),
            kl=c.kl,
            cut=c.cut,
            named=id(c) in named,
            reranked=c.reranked is not None,
            winner=c.winner,
        )
        for c in finite
    ]


def _shape_words(scored: Scored, search: Frontier) -> str:
    """The sizes that were cut."""
    words = {
        name: f"{size:,} {SIZE_WORDS[name]}" if name == "num_layers" else f"{SIZE_WORDS[name]} {size:,}"
        for name, size in scored.sizes.items()
        if size < search.dense_sizes[name]
    }
    return ", ".join(words.values())


def _plots(drawn: Mapping[str, str]) -> str:
    figures = []
    for name, svg in drawn.items():
        if name == "quality-throughput" or name.startswith(("cut-", "frontier-")):
            continue
        title = "Bytes of weights" if name == "weights" else f"Loss of {name.removeprefix('loss-')}"
        figures.append(f'<figure class="card"><h3>{escape(title)}</h3>{svg}</figure>')
    return _section("How it came about", f'<div class="plots">{"".join(figures)}</div>') if figures else ""


def _provenance(verdict: Verdict) -> str:
    """Keys, configs and numbers of each variant, versions, and how to get the same again."""
    folded = [_folded(row.variant, _facts(_made_by(row)) + _all_numbers(row)) for row in verdict.rows]
    folded.append(_folded("versions and hardware", _facts({**verdict.environment, **verdict.bench})))
    path = Path(verdict.row(verdict.final).path)
    final, run_dir = shlex.quote(str(path)), path.parent.parent  # RUN/artifacts/NAME-KEY
    commands = (
        f"stillroom run {shlex.quote(str(run_dir / 'recipe.yaml'))} --out {shlex.quote(f'{run_dir}-again')}\n"
        f"stillroom serve {final}\n"
        f"stillroom verify {final}"
    )
    again = f'<h3 class="apart">The same again</h3><pre>{escape(commands)}</pre>'
    return _section("Provenance", f'<div class="scroll">{"".join(folded)}</div>{again}')


def _made_by(row: Row) -> dict[str, object]:
    made = {
        "artifact key": row.artifact_key,
        "made by": row.kind,
        "seconds": f"{row.seconds:,.1f}",
        "checkpoint": row.path,
    }
    return {**made, **row.config}


def _all_numbers(row: Row) -> str:
    """Every measurement, with error and sample count."""
    lines = []
    for m in row.measurements.values():
        error = "" if m.stderr is None else f"± {columns.number(m.stderr, 2)}"
        samples = "" if m.n is None else f"n = {m.n:,}"
        value = f"{columns.number(m.value, 6)} {escape(m.unit)}"
        lines.append(
            f"<tr><td><code>{escape(m.name)}</code></td><td>{value}</td><td>{error}</td><td>{samples}</td></tr>"
        )
    return f'<table class="words"><tbody>{"".join(lines)}</tbody></table>'


def _facts(facts: Mapping[str, object]) -> str:
    lines = (f'<tr><td>{escape(name)}</td><td class="mono">{escape(_fact(v))}</td></tr>' for name, v in facts.items())
    return f'<table class="words"><tbody>{"".join(lines)}</tbody></table>'


def _folded(summary: str, content: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{content}</details>"


def _notes(verdict: Verdict) -> str:
    items = "".join(f"<li>{escape(note)}</li>" for note in all_notes(verdict.rows))
    return f'<ul class="notes">{items}</ul>' if items else ""


def _footer(verdict: Verdict) -> str:
    version = verdict.environment.get("stillroom")
    return f"Written by stillroom{' ' + escape(version) if version else ''} from verdict.json, seed {verdict.seed}."


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}\n</section>"


def _words(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of words; the cells are HTML."""
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    body = "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
    return f'<div class="scroll"><table class="words"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _pill(words: str, css: str) -> str:
    return f'<span class="badge {css}">{escape(words)}</span>'


def _table(heads: Sequence[str], body: Sequence[str], caption: str) -> str:
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in heads)
    return (
        f'<div class="scroll"><table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def _row(row: Row, verdict: Verdict, cells: Sequence[str]) -> str:
    return f'<tr class="{_look(row, verdict.final)}"><th scope="row">{escape(row.variant)}</th>{"".join(cells)}</tr>'


def _cell(measurement: Measurement | None, write: Callable[[Measurement], str], reason: str | None = None) -> str:
    if measurement is None:
        why = f' title="{escape(reason, quote=True)}"' if reason else ""
        return f'<td class="none"{why}>not measured</td>'
    return f"<td>{write(measurement)}</td>"


def _value_and_error(measurement: Measurement) -> str:
    value, _, error = columns.show(measurement).partition(" ± ")
    return escape(value) + (f"<small>± {escape(error)}</small>" if error else "")


def _tok_s(measurement: Measurement) -> str:
    return columns.number(measurement.value)


def _fact(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{k} {_fact(v)}" for k, v in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_fact, value))
    return "none" if value is None else str(value)


def _points(verdict: Verdict) -> list[Point]:
    """Variants with both quality and throughput."""
    points = []
    for row in verdict.rows:
        quality, speed = row.measurements.get(verdict.headline or ""), columns.throughput(row)
        if quality is not None and speed is not None and math.isfinite(quality.value) and math.isfinite(speed.value):
            points.append(Point(row.variant, speed.value, quality.value, _look(row, verdict.final), quality.stderr))
    return points


def _look(row: Row, final: str) -> Look:
    return "final" if row.variant == final else row.role


def _weight_text(row: Row, dense: Row) -> str:
    share = columns.ratio(*(each.measurements.get(columns.WEIGHT_BYTES) for each in (row, dense)))
    text = columns.show(row.measurements[columns.WEIGHT_BYTES])
    return text if share is None or row.variant == "dense" else f"{text} ({columns.times(share)})"


def _higher_is_better(verdict: Verdict, metric: str) -> bool:
    return any(row.measurements[metric].higher_is_better for row in verdict.rows if metric in row.measurements)
