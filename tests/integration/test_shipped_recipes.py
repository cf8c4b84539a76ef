"""The shipped Qwen3 recipes run for real at toy sizes: the same family, stages and options, small dimensions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from runs import stillroom
from tiny import tiny_checkpoint, tiny_text_file

SIXTH: dict[str, Any] = {"num_hidden_layers": 6, "hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
"""Of Qwen3-8B's 36 layers, a sixth; widths that keep the recipes' ratios at multiples of 16."""

SMALL_CALIBRATION = "{samples: 4, sequence_length: 64, batch_size: 2}"

SMALL_CUT = {
    "qwen3-8b-depth-6b-fp8": ["stages.0.num_layers=4"],
    "qwen3-8b-width-6b-fp8": ["stages.0.intermediate_size=192", "stages.0.hidden_size=112"],
}
"""24 of 36 layers; 9216 of 12288 FFN channels and 3584 of 4096 hidden channels."""


@pytest.mark.parametrize("recipe", sorted(SMALL_CUT))
def test_a_qwen3_recipe_runs_at_toy_size(recipe: str, tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "qwen3-8b", "qwen3", tie_word_embeddings=False, **SIXTH)
    sibling = tiny_checkpoint(
        tmp_path / "qwen3-4b", "qwen3", tie_word_embeddings=True, **SIXTH | {"num_hidden_layers": 3}
    )
    train, heldout = tiny_text_file(tmp_path / "train.txt"), tiny_text_file(tmp_path / "heldout.txt", 60)
    overrides = [
        f"model={dense}",
        f"baselines.qwen3-4b={sibling}",
        f"data={{train: [{train}, {{source: teacher, tokens: 256}}], heldout: [{heldout}], decontaminate: false}}",
        *SMALL_CUT[recipe],
        f"stages.0.calibration={SMALL_CALIBRATION}",
        "stages.0.search={generations: 1, offspring: 2, finalists: 2}",
        "stages.1.tokens=2048",
        "stages.1.sequence_length=64",
        "stages.1.batch_size=8",
        f"stages.2.calibration={SMALL_CALIBRATION}",
        "verify.tokens=256",
        "verify.sequence_length=64",
        "evaluate={perplexity_tokens: 256, sequence_length: 64}",
        "bench=null",
        "gates=[size.weight_bytes <= 0.9 * dense, size.parameters >= 1.0 * baseline:qwen3-4b]",
    ]
    options = [word for override in overrides for word in ("--set", override)]
    answer = stillroom("run", recipe, "--out", tmp_path / "run", *options, home=tmp_path / "home")
    assert answer.returncode == 0, answer.stderr
    verdict = json.loads((tmp_path / "run" / "verdict.json").read_text())
    rows = {row["variant"]: row["measurements"] for row in verdict["rows"]}
    assert list(rows) == ["dense", "prune", "distill", "fp8", "baseline:qwen3-4b"]
    assert all("quality.heldout.perplexity" in row for row in rows.values())
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())
    assert config["head_dim"] == 32
    assert config["quantization_config"]["quant_method"] == "modelopt"
    assert len(config["layer_types"]) == config["num_hidden_layers"]
