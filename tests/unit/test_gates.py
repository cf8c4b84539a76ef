from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.artifact import Measurement
from stillroom.verdict.gates import OPERATORS, judge, parse_gate

PPL = "quality.heldout.perplexity"


def measured(**values: float) -> dict[str, dict[str, Measurement]]:
    """Variant -> its perplexity; `baseline__x` stands for `baseline:x`."""
    return {
        variant.replace("__", ":"): {PPL: Measurement(name=PPL, value=value, unit="ppl")}
        for variant, value in values.items()
    }


@pytest.mark.parametrize(
    ("text", "metric", "op", "factor", "reference"),
    [
        ("size.weight_bytes <= 5e9", "size.weight_bytes", "<=", 5e9, None),
        ("a.b>=-1.5", "a.b", ">=", -1.5, None),
        ("quality.arc_easy.acc_norm >= 0.95 * dense", "quality.arc_easy.acc_norm", ">=", 0.95, "dense"),
        ("speed.output_tok_s > dense", "speed.output_tok_s", ">", 1.0, "dense"),
        ("speed.output_tok_s > 1.1*baseline:qwen3-4b", "speed.output_tok_s", ">", 1.1, "baseline:qwen3-4b"),
        ("quality.gsm8k.exact_match@strict-match >= 0.4", "quality.gsm8k.exact_match@strict-match", ">=", 0.4, None),
        ("quality.python-docs.perplexity < 1.2 * prune-2", "quality.python-docs.perplexity", "<", 1.2, "prune-2"),
    ],
)
def test_a_gate_is_read_as_written(text: str, metric: str, op: str, factor: float, reference: str | None) -> None:
    gate = parse_gate(text)
    assert (gate.metric, gate.op, gate.factor, gate.reference) == (metric, op, factor, reference)


@pytest.mark.parametrize(
    "text", ["", "ppl", "ppl = 3", "ppl <= ", "<= 3", "ppl <= 1.2 dense", "ppl <= 1..2", "ppl <= dense * 2"]
)
def test_what_is_no_gate_is_refused_with_the_form_that_is_allowed(text: str) -> None:
    with pytest.raises(ValueError, match=r"metric >= factor \* reference"):
        parse_gate(text)


@given(st.sampled_from(sorted(OPERATORS)), st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_a_gate_on_a_number_compares_as_python_does(op: str, value: float, bound: float) -> None:
    result = judge(f"{PPL} {op} {bound:f}", "final", measured(final=value))
    written = float(f"{bound:f}")
    expected = {">=": value >= written, "<=": value <= written, ">": value > written, "<": value < written}[op]
    assert result.status == ("pass" if expected else "fail")


@pytest.mark.parametrize(("value", "status"), [(11.9, "pass"), (12.0, "pass"), (12.1, "fail")])
def test_a_reference_is_multiplied_by_its_factor(value: float, status: str) -> None:
    result = judge(f"{PPL} <= 1.2 * dense", "final", measured(final=value, dense=10.0))
    assert (result.status, result.value, result.bound) == (status, value, 12.0)


def test_a_baseline_is_a_reference_like_any_other() -> None:
    result = judge(f"{PPL} < baseline:x", "final", measured(final=9.0, baseline__x=10.0))
    assert result.status == "pass"


def test_a_metric_that_was_not_measured_fails_and_names_what_was() -> None:
    result = judge("quality.arc_easy.acc >= 0", "final", measured(final=9.0))
    assert result.status == "fail"
    assert result.value is None
    assert "quality.arc_easy.acc was not measured on final" in result.reason
    assert PPL in result.reason


def test_a_variant_without_any_measurement_fails() -> None:
    assert judge(f"{PPL} >= 0", "final", {}).status == "fail"


def test_a_reference_that_was_not_measured_fails() -> None:
    result = judge(f"{PPL} <= 2 * dense", "final", measured(final=9.0))
    assert result.status == "fail"
    assert "was not measured on dense" in result.reason


@pytest.mark.parametrize("op", sorted(OPERATORS))
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_no_finite_number_fails_every_gate(op: str, value: float) -> None:
    assert judge(f"{PPL} {op} 3", "final", measured(final=value)).status == "fail"
    assert judge(f"{PPL} {op} dense", "final", measured(final=1.0, dense=value)).status == "fail"
