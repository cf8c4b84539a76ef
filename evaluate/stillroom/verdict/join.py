"""The join: variants times measurements, judged by gates and against baselines, in one plain sentence.

A variant's numbers lie in several artifacts: sizes with the model, quality with its `evaluate:`, drift with its
`verify:`, speed in the one `bench` that served them all. What is missing is named with its reason, and never counts in
a variant's favour.

A baseline is compared on quality that is measured alike on both (tasks; bits per byte, which knows no tokenizer) and on
throughput. Two numbers differ when they lie more than two standard errors of their difference apart, the errors taken
as independent: on the same questions they are not quite, so a difference that is said to be there is there. A baseline
that is faster and not worse is the one to use, and the verdict says so: compressing was not worth it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from stillroom.artifact import Artifact, Measurement
from stillroom.prune.explain import explain
from stillroom.prune.frontier import Frontier, read_frontier
from stillroom.verdict import columns
from stillroom.verdict.config import VerdictConfig
from stillroom.verdict.gates import GateResult, judge
from stillroom.verdict.verdict import LossPoint, Role, Row, Standing, Verdict

LOSS_FILE = "loss.json"
BENCH_FILE = "measurements.json"

CURVE_POINTS = 500
"""A distillation of 90B tokens has 28,000 steps."""

SIGNIFICANT = 2.0
"""Standard errors of a difference."""

NO_GATES = "No gates were given, so nothing was required of it."


def build_verdict(
    config: VerdictConfig, inputs: Mapping[str, Artifact], environment: Mapping[str, str], seed: int
) -> Verdict:
    """The verdict from the sealed artifacts by role: variants, `evaluate:NAME`, `verify:NAME`, `bench`."""
    bench = _bench(inputs.get("bench"))
    rows = tuple(_row(variant, inputs, bench) for variant in config.variants)
    rows = _note_tokenizers(rows)
    measured = {row.variant: row.measurements for row in rows}
    gates = tuple(judge(gate, config.final, measured) for gate in config.gates)
    by_variant = {row.variant: row for row in rows}
    final, dense = by_variant[config.final], by_variant["dense"]
    standings = tuple(_stand(final, row) for row in rows if row.role == "baseline")
    headline = columns.headline([dense, final, *rows])
    return Verdict(
        recipe=config.recipe,
        sentence=_sentence(final, dense, headline, gates, rows, standings),
        passed=all(gate.status == "pass" for gate in gates) and all(row.verified is not False for row in rows),
        final=config.final,
        headline=headline,
        rows=rows,
        gates=gates,
        baselines=standings,
        bench={key: value for key, value in bench.items() if key != "variants"},
        environment=dict(environment),
        seed=seed,
        losses={v: points for v in config.variants if (points := _losses(inputs[v]))},
        prunes={v: explain(inputs[v]) for v in config.variants if inputs[v].manifest.kind == "prune"},
        frontiers={v: tried for v in config.variants if (tried := _frontier(inputs[v]))},
    )


def _row(variant: str, inputs: Mapping[str, Artifact], bench: Mapping[str, Any]) -> Row:
    """Everything that is known of a variant, from all the artifacts that speak of it."""
    model = inputs[variant]
    evaluated, verified = inputs.get(f"evaluate:{variant}"), inputs.get(f"verify:{variant}")
    measurements = [*model.manifest.measurements]
    not_measured: dict[str, str] = {}
    for artifact in (evaluated, verified):
        measurements += artifact.manifest.measurements if artifact else ()
    if evaluated is None:
        not_measured["quality"] = "not evaluated in this recipe"
    served, why = _served(variant, bench)
    measurements += served
    if why:
        not_measured["speed"] = why
    passed = None if verified is None else verified.manifest.details.get("passed") is True
    failures = verified.manifest.details.get("failures", []) if verified is not None and not passed else []
    return Row(
        variant=variant,
        role=_role(variant),
        kind=model.manifest.kind,
        artifact_key=model.key,
        path=str(model.model_dir),
        config=model.manifest.config,
        seconds=model.manifest.seconds,
        measurements={m.name: m for m in measurements},
        not_measured=not_measured,
        verified=passed,
        notes=tuple(f"verification failed: {failure}" for failure in failures),
    )


def _role(variant: str) -> Role:
    if variant == "dense":
        return "dense"
    return "baseline" if variant.startswith("baseline:") else "stage"


def _bench(artifact: Artifact | None) -> Mapping[str, Any]:
    if artifact is None:
        return {}
    content: dict[str, Any] = json.loads((artifact.path / BENCH_FILE).read_text(encoding="utf-8"))
    return content


def _served(variant: str, bench: Mapping[str, Any]) -> tuple[list[Measurement], str | None]:
    """The variant's speed, or why there is none."""
    if not bench:
        return [], "this recipe has no bench"
    served = bench["variants"].get(variant)
    if served is None:
        return [], "not in bench.variants"
    if served.get("refused"):
        return [], f"refused: {served['refused']}"
    return [Measurement.model_validate(m) for m in served["measurements"]], None


def _note_tokenizers(rows: tuple[Row, ...]) -> tuple[Row, ...]:
    """Say on each variant whose tokens are not the dense model's that its perplexity does not compare."""
    note = "its tokenizer differs from dense's, so perplexity does not compare; bits per byte does"
    return tuple(
        row if columns.share_tokenizer([rows[0], row]) else row.model_copy(update={"notes": (*row.notes, note)})
        for row in rows
    )


def _losses(artifact: Artifact) -> tuple[LossPoint, ...]:
    """The loss curve of a distill stage, thinned to what a plot can show."""
    path = artifact.path / LOSS_FILE
    if artifact.manifest.kind != "distill" or not path.is_file():
        return ()
    points: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))
    step = math.ceil(len(points) / CURVE_POINTS) or 1
    shown = points[::-1][::step][::-1]  # the last one is always among them
    return tuple(LossPoint(step=p["step"], tokens=p["tokens"], loss=p["loss"]) for p in shown)


def _frontier(artifact: Artifact) -> Frontier | None:
    """Every shape that a prune stage tried for its target."""
    return read_frontier(artifact.path) if artifact.manifest.kind == "prune" else None


def _stand(final: Row, baseline: Row) -> Standing:
    """Compare on every quality metric that both have, and on throughput."""
    name = baseline.variant.removeprefix("baseline:")
    compared = [m for m in _comparable([final, baseline]) if all(_is_known(row, m) for row in (final, baseline))]
    speed = columns.speed_up(baseline, final)
    if not compared or speed is None:
        missing = "quality" if not compared else "throughput"
        return Standing(
            baseline=baseline.variant,
            outcome="not comparable",
            sentence=f"Whether {name} would do better is not known: {missing} was not measured on both.",
        )
    signs = {m: _compare(baseline.measurements[m], final.measurements[m]) for m in compared}
    better = [m for m in compared if signs[m] > 0]
    worse = [m for m in compared if signs[m] < 0]
    shown = "; ".join(_side_by_side(m, baseline, final) for m in (*better[:1], *worse[:1]) or compared[:1])
    if better and worse:
        quality = f"better on some measures and worse on others ({shown})"
    elif better or worse:
        quality = f"{'better' if better else 'worse'} ({shown})"
    else:
        quality = f"as good within two standard errors ({shown})"
    faster = f"{columns.times(speed)} as fast"
    if speed > 1 and not worse:
        return Standing(
            baseline=baseline.variant,
            outcome="use the baseline",
            sentence=f"Use {name}: it is {quality} and {faster}, so {final.variant} is not worth serving.",
        )
    if speed <= 1 and not better:
        return Standing(
            baseline=baseline.variant,
            outcome="keep",
            sentence=f"{final.variant} is the better choice than {name}, which is {quality} and {faster}.",
        )
    return Standing(
        baseline=baseline.variant,
        outcome="trade-off",
        sentence=f"Against {final.variant}, {name} is a trade-off: {quality} and {faster}.",
    )


def _comparable(rows: Sequence[Row]) -> list[str]:
    """A metric for each task and text that does not depend on the tokenizer."""
    return [m.removesuffix(".perplexity") + ".bits_per_byte" if m.endswith(".perplexity") else m
            for m in columns.quality_metrics(rows)]  # fmt: skip


def _is_known(row: Row, metric: str) -> bool:
    value = row.value(metric)
    return value is not None and math.isfinite(value)


def _compare(a: Measurement, b: Measurement) -> int:
    """1 where `a` is better than `b`, -1 where it is worse, 0 where the difference is within its error."""
    difference = (a.value - b.value) * (-1 if a.higher_is_better is False else 1)
    error = math.hypot(a.stderr or 0.0, b.stderr or 0.0)
    if abs(difference) <= SIGNIFICANT * error:
        return 0
    return 1 if difference > 0 else -1


def _side_by_side(metric: str, a: Row, b: Row) -> str:
    values = (columns.number(row.measurements[metric].value) for row in (a, b))
    return f"{columns.title(metric)} {' against '.join(values)}"


def _sentence(
    final: Row,
    dense: Row,
    headline: str | None,
    gates: Sequence[GateResult],
    rows: Sequence[Row],
    standings: Sequence[Standing],
) -> str:
    parts = [f"{final.variant} {_quality_words(final, dense, headline)}, {_cost_words(final, dense)}."]
    parts += [s.sentence for s in standings if s.outcome == "use the baseline"]
    parts.append(_gate_words(gates, final))
    parts += [f"{row.variant} did not pass its verification." for row in rows if row.verified is False]
    parts += [s.sentence for s in standings if s.outcome != "use the baseline"]
    return " ".join(parts)


def _quality_words(final: Row, dense: Row, headline: str | None) -> str:
    mine, theirs = (row.measurements.get(headline or "") for row in (final, dense))
    share = columns.ratio(mine, theirs)
    if headline is None or mine is None or theirs is None or share is None:
        return "was not compared with dense in quality (not measured)"
    values = f"{columns.number(mine.value)} against {columns.number(theirs.value)}"
    if theirs.higher_is_better is False:
        return f"has {columns.times(share)} dense's {columns.title(headline)} ({values})"
    return f"keeps {share:.0%} of dense's {columns.title(headline)} ({values})"


def _cost_words(final: Row, dense: Row) -> str:
    speed = columns.speed_up(final, dense)
    share = columns.ratio(*(row.measurements.get(columns.WEIGHT_BYTES) for row in (final, dense)))
    weight = "a size that was not measured" if share is None else f"{columns.times(share)} the bytes of dense"
    if speed is not None:
        return f"at {columns.times(speed)} the throughput and {weight}"
    unserved = final if columns.throughput(final) is None else dense
    reason = unserved.not_measured.get("speed", "not measured")
    return f"at {weight}; {unserved.variant}'s throughput was not measured ({reason})"


def _gate_words(gates: Sequence[GateResult], final: Row) -> str:
    if not gates:
        return NO_GATES
    failed = [gate for gate in gates if gate.status == "fail"]
    if not failed:
        return "The gate passes." if len(gates) == 1 else f"All {len(gates)} gates pass."
    reasons = (
        columns.show_gate(gate, final).partition("; ")[0] for gate in failed
    )  # the table lists what was measured
    listed = "; ".join(f"{gate.gate} ({reason})" for gate, reason in zip(failed, reasons, strict=True))
    return f"{len(gates) - len(failed)} of {len(gates)} gates pass; failed: {listed}."
