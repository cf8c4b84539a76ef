"""Gates: conditions that the final stage must meet, written as one line each.

    metric OP number                  size.weight_bytes <= 5e9
    metric OP [factor *] reference    quality.arc_easy.acc_norm >= 0.95 * dense

`reference` is a variant of the recipe: `dense`, a stage's name, or `baseline:NAME`; the same metric of that variant is
meant. A gate whose metric, or whose reference's metric, was not measured has failed: gates fail closed.
"""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

from stillroom.artifact import Measurement

OPERATORS: dict[str, Callable[[float, float], bool]] = {
    ">=": operator.ge,
    "<=": operator.le,
    ">": operator.gt,
    "<": operator.lt,
}

_GATE = re.compile(
    r"^\s*(?P<metric>[a-z][\w.@-]*)\s*(?P<op>>=|<=|>|<)\s*"
    r"(?:(?P<number>[-+]?[0-9.]+(?:[eE][-+]?\d+)?)|(?:(?P<factor>[0-9.]+(?:[eE][-+]?\d+)?)\s*\*\s*)?(?P<reference>[a-z][\w.:-]*))\s*$"
)


@dataclass(frozen=True)
class Gate:
    """A parsed gate. Without a reference the bound is `factor` itself."""

    text: str
    metric: str
    op: str
    factor: float
    reference: str | None


@dataclass(frozen=True)
class GateResult:
    gate: str
    status: Literal["pass", "fail"]
    value: float | None
    bound: float | None
    reason: str


def parse_gate(text: str) -> Gate:
    """Raises ValueError with the form that is allowed."""
    match = _GATE.match(text)
    try:
        if match is None:
            raise ValueError
        number, factor = match["number"], match["factor"]
        bound = float(number if number is not None else factor if factor is not None else 1.0)
    except ValueError:
        raise ValueError(
            f"gate {text!r} is not of the form `metric >= number` or `metric >= factor * reference`; for example "
            "`quality.heldout.perplexity <= 1.2 * dense`"
        ) from None
    return Gate(text, match["metric"], match["op"], bound, match["reference"])


def judge(text: str, final: str, measured: Mapping[str, Mapping[str, Measurement]]) -> GateResult:
    """Judge one gate on variant `final`; `measured` maps variant and metric name to the measurement."""
    gate = parse_gate(text)
    mine = measured.get(final, {}).get(gate.metric)
    if mine is None:
        known = ", ".join(sorted(measured.get(final, {}))) or "nothing"
        return GateResult(text, "fail", None, None, f"{gate.metric} was not measured on {final}; measured: {known}")
    bound = gate.factor
    if gate.reference is not None:
        theirs = measured.get(gate.reference, {}).get(gate.metric)
        if theirs is None:
            return GateResult(text, "fail", mine.value, None, f"{gate.metric} was not measured on {gate.reference}")
        bound *= theirs.value
    # NaN compares false with everything, so a metric that is not a number fails
    passed = OPERATORS[gate.op](mine.value, bound) and math.isfinite(mine.value) and math.isfinite(bound)
    return GateResult(text, "pass" if passed else "fail", mine.value, bound, f"{mine.value:.6g} {gate.op} {bound:.6g}")
