from __future__ import annotations

import io
import math
from pathlib import Path

import pytest
from rich.console import Console

from results import BASELINE, GATES, VARIANTS, finished_run, measurement, text_numbers
from stillroom.artifact import environment
from stillroom.verdict.columns import count, number, size, with_error
from stillroom.verdict.join import build_verdict
from stillroom.verdict.table import render_terminal
from stillroom.verdict.verdict import Verdict


def shown(verdict: Verdict, width: int) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(render_terminal(verdict))
    return out.getvalue().splitlines()


@pytest.fixture
def verdict(tmp_path: Path) -> Verdict:
    config, inputs = finished_run(tmp_path, gates=(*GATES, "quality.mmlu.acc >= 0.6"))
    return build_verdict(config, inputs, environment(), seed=0)


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_table_fits_the_terminal(verdict: Verdict, width: int) -> None:
    lines = shown(verdict, width)
    assert max(map(len, lines)) <= width
    assert not any("…" in line for line in lines)


def test_at_100_columns_every_variant_is_named_with_its_numbers(verdict: Verdict) -> None:
    lines = shown(verdict, 100)
    for variant in VARIANTS:
        assert any(line.split()[:1] == [variant] for line in lines)
    final = next(line.split() for line in lines if line.split()[:1] == ["int8"])
    assert final[1:] == ["110M", "138", "MB", "2.05", "GB", "0.501", "±", "0.025", "189.0", "1.44x"]


def test_what_was_not_measured_is_a_dash_and_says_why(verdict: Verdict) -> None:
    lines = shown(verdict, 100)
    assert next(line.split() for line in lines if line.split()[:1] == ["prune"])[-2:] == ["–", "–"]
    assert any("prune, distill: throughput not measured: not in bench.variants" in line for line in lines)


def test_gates_are_listed_with_what_was_measured(verdict: Verdict) -> None:
    text = "\n".join(shown(verdict, 120))
    assert "FAILED" in text
    assert "138 MB <= 161 MB" in text
    assert "quality.mmlu.acc was not measured on int8" in text


def test_many_texts_and_tasks_still_fit(tmp_path: Path) -> None:
    many = [m for label in ("wikitext2", "novels", "textbooks", "instruct") for m in text_numbers(label, 2.5)]
    tasks = [
        measurement(f"quality.task_{i}.acc", 0.5, "fraction", stderr=0.01, higher_is_better=True) for i in range(5)
    ]
    config, inputs = finished_run(tmp_path, overrides={"dense": many + tasks, BASELINE: many})
    lines = shown(build_verdict(config, inputs, {}, seed=0), 80)
    assert max(map(len, lines)) <= 80
    assert any("textbooks" in line for line in lines)


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.61234, "0.6123"), (14.2099, "14.21"), (1234.5, "1,234"), (131.04, "131.0"), (0.0, "0"), (1.0, "1.000"),
     (9999.6, "10,000"), (math.nan, "nan"), (math.inf, "inf"), (1.5e-7, "1.5e-07")],
)  # fmt: skip
def test_numbers_have_four_digits(value: float, text: str) -> None:
    assert number(value) == text


@pytest.mark.parametrize(
    ("value", "stderr", "text"),
    [(14.2099, 0.3512, "14.21 ± 0.35"), (0.501, 0.025, "0.501 ± 0.025"), (1520.3, 35.1, "1,520 ± 35"),
     (14.2, None, "14.20"), (14.2, math.nan, "14.20"), (2.0, 1.23e-7, "2.000 ± 1.2e-07")],
)  # fmt: skip
def test_a_value_is_as_precise_as_its_error(value: float, stderr: float | None, text: str) -> None:
    assert with_error(measurement("m", value, "ppl", stderr=stderr)) == text


def test_sizes_and_counts_are_short() -> None:
    assert [count(134.5e6), count(6.02e9), count(512)] == ["134M", "6.02B", "512"]
    assert [size(256.6e6), size(16.38e9), size(12)] == ["257 MB", "16.4 GB", "12 B"]
