from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from results import (
    BASELINE,
    GATES,
    REFUSED,
    VARIANTS,
    artifact,
    finished_run,
    measurement,
    speed_numbers,
    task_numbers,
    text_numbers,
)
from stillroom.artifact import Measurement, environment, open_artifact
from stillroom.errors import InputError
from stillroom.verdict.join import CURVE_POINTS, build_verdict
from stillroom.verdict.report import render_html
from stillroom.verdict.verdict import Verdict, load_verdict


def verdict_of(folder: Path, **changes: Any) -> Verdict:
    config, inputs = finished_run(folder, **changes)
    return build_verdict(config, inputs, environment(), seed=0)


def test_every_variant_is_a_row_with_size_quality_and_speed(tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path)
    assert tuple(row.variant for row in verdict.rows) == VARIANTS
    assert [row.role for row in verdict.rows] == ["dense", "stage", "stage", "stage", "baseline"]
    final = verdict.row("int8").measurements
    assert {"size.parameters", "quality.python-docs.perplexity", "quality.arc_easy.acc", "verify.kl"} <= set(final)
    assert final["speed.output_tok_s"].value == 189.0


def test_the_sentence_says_quality_speed_and_bytes_in_plain_words(tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path)
    assert verdict.sentence.startswith(
        "int8 keeps 91% of dense's arc_easy acc_norm (0.5010 against 0.5520), at 1.44x the throughput and 0.51x the "
        "bytes of dense. All 3 gates pass."
    )
    assert verdict.passed


def test_without_tasks_the_sentence_speaks_of_perplexity(tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path, tasks=False)
    assert verdict.headline == "quality.python-docs.perplexity"
    assert "int8 has 1.35x dense's python-docs perplexity (15.01 against 11.16)" in verdict.sentence


def test_a_failed_gate_fails_the_verdict_and_is_named(tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path, gates=(*GATES, "speed.output_tok_s >= 2 * dense"))
    assert not verdict.passed
    assert "3 of 4 gates pass; failed: speed.output_tok_s >= 2 * dense (189.0 >= 262.0)." in verdict.sentence


def test_a_missing_metric_fails_the_verdict_and_the_sentence_stays_short(tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path, gates=("quality.mmlu.acc >= 0.6",))
    assert not verdict.passed
    assert "failed: quality.mmlu.acc >= 0.6 (quality.mmlu.acc was not measured on int8)." in verdict.sentence


def test_without_gates_the_verdict_says_so_and_passes(tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path, gates=())
    assert verdict.passed
    assert "No gates were given" in verdict.sentence


def test_a_failed_verification_fails_the_verdict_whatever_the_gates_say(tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path, failed_verification=("prune",))
    assert all(gate.status == "pass" for gate in verdict.gates)
    assert not verdict.passed
    assert "prune did not pass its verification." in verdict.sentence
    assert verdict.row("prune").notes == ("verification failed: lm_head.weight has no scale",)


def test_a_verify_artifact_that_does_not_say_passed_has_failed(tmp_path: Path) -> None:
    config, inputs = finished_run(tmp_path)
    inputs["verify:int8"] = artifact(tmp_path / "other", "verify:int8", "verify", details={})
    assert not build_verdict(config, inputs, {}, seed=0).passed


def test_a_variant_that_the_engine_refused_has_no_speed_but_the_reason(tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path, refused=("int8",))
    assert verdict.row("int8").not_measured == {"speed": f"refused: {REFUSED}"}
    assert not verdict.passed  # the gate on its throughput fails closed
    assert f"int8's throughput was not measured (refused: {REFUSED})" in verdict.sentence


def test_a_run_without_bench_says_why_there_is_no_throughput(tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path, bench=False, gates=GATES[:2])
    assert {row.not_measured["speed"] for row in verdict.rows} == {"this recipe has no bench"}
    assert verdict.passed


def test_a_run_without_evaluation_says_why_there_is_no_quality(tmp_path: Path) -> None:
    config, inputs = finished_run(tmp_path, gates=())
    without = {role: found for role, found in inputs.items() if not role.startswith("evaluate:")}
    verdict = build_verdict(config, without, {}, seed=0)
    assert verdict.headline is None
    assert "was not compared with dense in quality (not measured)" in verdict.sentence
    assert verdict.row("dense").not_measured["quality"] == "not evaluated in this recipe"


def baseline_with(acc_norm: float, tok_s: float, loss: float = 2.709) -> dict[str, list[Measurement]]:
    return {BASELINE: [*task_numbers("arc_easy", acc_norm), *text_numbers("python-docs", loss), *speed_numbers(tok_s)]}


@pytest.mark.parametrize(
    ("acc_norm", "tok_s", "outcome"),
    [
        (0.70, 250.0, "use the baseline"),  # better and faster
        (0.51, 250.0, "use the baseline"),  # as good, by its error, and faster
        (0.70, 150.0, "trade-off"),
        (0.30, 250.0, "trade-off"),
        (0.30, 150.0, "keep"),
        (0.49, 150.0, "keep"),
    ],
)
def test_a_baseline_is_judged_on_quality_beyond_its_error_and_on_speed(
    acc_norm: float, tok_s: float, outcome: str, tmp_path: Path
) -> None:
    verdict = verdict_of(tmp_path, overrides=baseline_with(acc_norm, tok_s))
    assert verdict.baselines[0].outcome == outcome


def test_when_a_baseline_is_better_the_verdict_says_use_it(tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path, overrides=baseline_with(0.70, 250.0))
    assert (
        "Use smol-sibling: it is better (arc_easy acc_norm 0.7000 against 0.5010) and 1.32x as fast" in verdict.sentence
    )


def test_a_baseline_that_is_better_here_and_worse_there_is_a_trade_off(tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path, overrides=baseline_with(0.70, 250.0, loss=3.5))
    assert verdict.baselines[0].outcome == "trade-off"
    assert "better on some measures and worse on others" in verdict.baselines[0].sentence


def test_a_baseline_without_throughput_is_not_comparable(tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path, refused=(BASELINE,))
    assert verdict.baselines[0].outcome == "not comparable"
    assert "throughput was not measured" in verdict.baselines[0].sentence


def test_perplexities_of_different_tokenizers_are_not_compared(tmp_path: Path) -> None:
    """A tokenizer with longer tokens has the higher perplexity on the same text, for the same model of it."""
    theirs = text_numbers("python-docs", 3.2, bytes_per_token=4.4)
    verdict = verdict_of(tmp_path, tasks=False, overrides={BASELINE: [*theirs, *speed_numbers(250.0)]})
    assert verdict.headline == "quality.python-docs.bits_per_byte"
    assert verdict.baselines[0].outcome == "use the baseline"
    assert "perplexity does not compare" in verdict.row(BASELINE).notes[0]
    assert verdict.row("int8").notes == ()


def test_losses_and_explanations_come_along_for_the_report(tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path)
    assert [p.step for p in verdict.losses["distill"]] == list(range(1, 65))
    assert len(verdict.prunes["prune"].layers) == 30
    assert len(verdict.prunes["prune"].dropped) == 6


def test_a_long_loss_curve_is_thinned_and_keeps_its_end(tmp_path: Path) -> None:
    config, inputs = finished_run(tmp_path)
    points = [{"step": i, "tokens": i, "loss": 1.0} for i in range(1, 28_001)]
    inputs["distill"] = artifact(tmp_path / "long", "distill", "distill", files={"loss.json": points})
    curve = build_verdict(config, inputs, {}, seed=0).losses["distill"]
    assert len(curve) <= CURVE_POINTS
    assert curve[-1].step == 28_000


def test_a_verdict_survives_its_json(tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path, refused=("int8",))
    assert Verdict.model_validate_json(verdict.model_dump_json()) == verdict


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_a_number_that_is_not_finite_survives_manifest_and_json_and_fails_its_gate(
    value: float, tmp_path: Path
) -> None:
    strange = [measurement("quality.arc_easy.acc_norm", value, "fraction", higher_is_better=True)]
    verdict = verdict_of(tmp_path, overrides={"int8": strange}, gates=("quality.arc_easy.acc_norm >= 0.1",))
    reopened = open_artifact(next(tmp_path.glob("evaluate-int8-*")))
    assert reopened is not None
    assert str(reopened.manifest.measurements[-1].value) == str(value)
    again = Verdict.model_validate_json(verdict.model_dump_json())
    assert str(again.row("int8").value("quality.arc_easy.acc_norm")) == str(value)
    assert not again.passed
    assert "int8" in render_html(again)


def test_a_verdict_is_loaded_from_its_file_or_its_directory(tmp_path: Path) -> None:
    verdict = verdict_of(tmp_path / "run")
    (tmp_path / "verdict.json").write_text(verdict.model_dump_json())
    assert load_verdict(tmp_path) == load_verdict(tmp_path / "verdict.json") == verdict


def test_what_is_no_verdict_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no verdict"):
        load_verdict(tmp_path)
    (tmp_path / "verdict.json").write_text(json.dumps({"schema_version": 9}))
    with pytest.raises(InputError, match="no verdict that this version reads"):
        load_verdict(tmp_path)


def test_the_verdict_needs_no_torch() -> None:
    code = "import sys, stillroom.verdict.stage; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert (
        subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=False).returncode
        == 0
    )
