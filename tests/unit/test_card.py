"""The model card says what was done, under which licence, and how to serve it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from jobs import artifact_at, job_of
from stillroom.export.card import card_of_job, find_license
from stillroom.recipe import Quantize
from tiny import tiny_checkpoint, tiny_text_file

DONE: dict[str, dict[str, Any]] = {
    "fp8": {
        "scheme": "fp8",
        "modelopt": "0.47.0",
        "modules_quantized": 21,
        "calibration_tokens": 4096,
        "kv_cache": "fp8",
    },
    "int8": {"scheme": "int8", "modelopt": "0.47.0", "modules_quantized": 21, "calibration_tokens": 0},
    "none": {"scheme": "none"},
}


def front_matter(card: str) -> dict[str, Any]:
    _, front, _ = card.split("---\n", 2)
    content: dict[str, Any] = yaml.safe_load(front)
    return content


def card(folder: Path, scheme: str) -> str:
    """The card of a model that was pruned from 4 to 3 layers, distilled and quantized."""
    dense = tiny_checkpoint(folder / "dense")
    (dense / "LICENSE").write_text("Apache License\n   Version 2.0, January 2004\n")
    student = tiny_checkpoint(folder / "student", num_hidden_layers=3)
    origin = "SmolLM2-135M-Instruct, dequantized from a Q4_1 GGUF"
    inputs = {
        "source": artifact_at(student, "distill", "distill"),
        "dense": artifact_at(dense, origin=origin, source="smollm2-135m"),
    }
    inputs["source"] = inputs["source"].__class__(
        student, inputs["source"].manifest.model_copy(update={"tokens": 98304})
    )
    config = Quantize.model_validate({"scheme": scheme})
    job = job_of(config, inputs, tiny_text_file(folder / "text.txt", 5), folder / "job", name=f"small-{scheme}")
    (job.out_dir / "config.json").write_text((student / "config.json").read_text())
    sizes = {"weight_bytes_before": 2_000_000, "weight_bytes_after": 1_100_000}
    return card_of_job(job, DONE[scheme] | sizes)


def test_the_front_matter_names_base_model_licence_and_what_was_done(tmp_path: Path) -> None:
    front = front_matter(card(tmp_path, "fp8"))
    assert front["base_model"] == "smollm2-135m"
    assert front["license"] == "apache-2.0"
    assert front["tags"] == ["stillroom", "distilled", "fp8", "modelopt"]


def test_sizes_training_and_scheme_are_told(tmp_path: Path) -> None:
    text = card(tmp_path, "fp8")
    assert "# small-fp8" in text
    assert "| layers | 4 | 3 |" in text
    assert "98,304 tokens" in text
    assert "2.0 MB of weights became 1.1 MB" in text
    assert "The original was already quantized" in text
    assert "dequantized from a Q4_1 GGUF" in text


@pytest.mark.parametrize(("scheme", "tensorrt"), [("fp8", True), ("int8", False), ("none", True)])
def test_only_engines_that_take_the_scheme_are_named(scheme: str, tensorrt: bool, tmp_path: Path) -> None:
    text = card(tmp_path, scheme)
    assert "vllm serve MODEL_DIR" in text
    assert ("trtllm-serve MODEL_DIR" in text) == tensorrt
    assert ("drops the scales" in text) == (scheme == "fp8")


def test_the_licence_comes_from_the_readme_or_the_text_and_is_not_guessed(tmp_path: Path) -> None:
    assert find_license(tmp_path) is None
    (tmp_path / "LICENSE").write_text("All rights reserved.")
    assert find_license(tmp_path) is None
    (tmp_path / "LICENSE.txt").write_text("MIT License\n\nCopyright")
    assert find_license(tmp_path) == "mit"
    (tmp_path / "README.md").write_text("---\nlicense: llama3.2\ntags: [a]\n---\n# A model\n")
    assert find_license(tmp_path) == "llama3.2"
    (tmp_path / "README.md").write_text("---\nlicense: [unclosed\n---\n")
    assert find_license(tmp_path) == "mit"
