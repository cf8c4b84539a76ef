"""What a reader of the report sees of a search for a target."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from results import finished_run
from stillroom.models.shape import ModelShape, shape_of
from stillroom.prune.cost import Hardware
from stillroom.prune.frontier import Frontier, search, write_frontier
from stillroom.prune.shapes import candidates, price_target
from stillroom.recipe import Target
from stillroom.verdict.join import build_verdict
from stillroom.verdict.report import draw, render_html, write_report
from stillroom.verdict.verdict import Verdict, load_verdict

DENSE = shape_of(
    {"model_type": "llama", "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
     "hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True}, "SmolLM2-135M"
)  # fmt: skip
CPU = Hardware(memory_gb=24, bandwidth_gb_s=35, tflops={"bf16": 0.45})


def searched_run(folder: Path, target: Target) -> tuple[Frontier, Verdict]:
    """A finished run whose prune stage searched; one of the shapes is unusable."""
    pricing = price_target(target, DENSE, CPU if target.hardware else None)
    found = candidates(DENSE, pricing)

    def score(shape: ModelShape) -> float:
        if shape is found[-1].shape:
            return math.inf
        return 3 * (1 - shape.num_layers / 30) + 2 * (1 - shape.intermediate_size / 1536)

    frontier = search(
        found, DENSE, pricing.costs(DENSE), score, score, cache_dir=folder / "scores", key="k", target=target.given()
    )
    config, inputs = finished_run(folder / "run")
    write_frontier(frontier, inputs["prune"].path)
    return frontier, build_verdict(config, inputs, {}, seed=0)


@pytest.mark.parametrize(
    ("target", "unit"),
    [
        (Target(params=100_000_000), "parameters"),
        (Target(latency_ms=6.5, hardware="cpu", context=512), "milliseconds between tokens"),
        (Target(throughput=1500, hardware="cpu", batch=16, context=512), "output tokens per second (roofline)"),
    ],
)
def test_the_whole_search_is_shown_and_not_only_the_winner(tmp_path: Path, target: Target, unit: str) -> None:
    frontier, verdict = searched_run(tmp_path, target)
    assert verdict.frontiers["prune"] == frontier
    page = render_html(verdict)
    assert "What prune tried" in page
    assert all(f"{scored.params:,}" in page for scored in frontier.candidates)
    assert "not finite" in page
    assert unit in draw(verdict)["frontier-prune"]
    write_report(verdict, tmp_path)
    assert (tmp_path / "frontier-prune.svg").is_file()


def test_a_verdict_keeps_the_search(tmp_path: Path) -> None:
    _, verdict = searched_run(tmp_path, Target(params=100_000_000))
    (tmp_path / "verdict.json").write_text(verdict.model_dump_json(), encoding="utf-8")
    assert render_html(load_verdict(tmp_path)) == render_html(verdict)


def test_a_run_without_a_search_shows_none(tmp_path: Path) -> None:
    config, inputs = finished_run(tmp_path / "run")
    verdict = build_verdict(config, inputs, {}, seed=0)
    assert verdict.frontiers == {}
    assert "tried" not in render_html(verdict)
