"""Encoders and an encoder-decoder through the whole pipeline: cut, verified by opening, packed to serve nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from jobs import artifact_at, job_of
from runs import TINY_CALIBRATION, tiny_recipe
from stillroom.artifact import Artifact
from stillroom.console import make_reporter
from stillroom.engines.contract import ServeConfig
from stillroom.engines.scheme import check_served
from stillroom.errors import InputError
from stillroom.export import verify
from stillroom.models.load import load_model
from stillroom.pipeline import run_plan
from stillroom.plan import make_plan
from stillroom.preflight import require_runnable
from stillroom.quality.stage import evaluate_directory
from stillroom.recipe import Evaluate, TextSource, Verify, load_recipe
from stillroom.stage import StageResult
from stillroom.verdict.verdict import load_verdict
from tiny import tiny_checkpoint, tiny_text_file

CUTS: dict[str, dict[str, Any]] = {
    "bert": {"num_layers": 3, "intermediate_size": 96},
    "roberta": {"num_layers": 2, "num_attention_heads": 2, "hidden_size": 32},
    "t5": {"num_layers": 1, "num_decoder_layers": 2, "num_attention_heads": 2},
}


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STILLROOM_HOME", str(tmp_path / "home"))


def pruned(folder: Path, family: str) -> dict[str, Artifact]:
    """The artifacts of a run that cuts a tiny model and copies it out with scheme none."""
    tiny_checkpoint(folder / "model", family)
    heldout = {"source": str(folder / "heldout.txt"), "name": "held"}
    data = {"train": [str(folder / "train.txt")], "heldout": [heldout], "decontaminate": False}
    stages = [
        {"kind": "prune", "calibration": TINY_CALIBRATION} | CUTS[family],
        {"kind": "quantize", "name": "plain", "scheme": "none"},
    ]
    gates = ["size.parameters <= 0.9 * dense"]
    plan = make_plan(load_recipe(str(tiny_recipe(folder, data=data, stages=stages, evaluate=None, gates=gates))))
    require_runnable(plan, folder / "run")
    return dict(run_plan(plan, folder / "run", make_reporter(False)).artifacts)


@pytest.mark.parametrize("family", CUTS)
def test_a_run_cuts_verifies_and_judges_what_does_not_generate(family: str, tmp_path: Path) -> None:
    artifacts = pruned(tmp_path, family)
    model = load_model(artifacts["plain"].model_dir)
    size = next(m.value for m in artifacts["plain"].manifest.measurements if m.name == "size.parameters")
    assert size == model.num_parameters()
    checked = artifacts["verify:prune"].manifest.details
    assert checked["passed"]
    assert {fact["check"] for fact in checked["facts"]} >= {
        "transformers finds every tensor", "transformers opens its own class", "the model runs, logits finite",
    }  # fmt: skip
    assert [m.name for m in artifacts["verify:prune"].manifest.measurements] == ["verify.passed"]
    verdict = load_verdict(artifacts["verdict"].path)
    assert verdict.passed
    report = verify.verify_directory(artifacts["plain"].path)
    assert report.passed
    assert report.samples == ()


def verified(model_dir: Path, folder: Path) -> StageResult:
    inputs = {"source": artifact_at(model_dir, "prune"), "reference": artifact_at(model_dir)}
    text = tiny_text_file(folder / "text.txt", 20)
    return verify.run(job_of(Verify(tokens=64, sequence_length=32), inputs, text, folder / "verify"))


def test_logits_that_are_no_numbers_fail_verification(tmp_path: Path) -> None:
    """Finite weights that overflow on the way: nothing that a look at the files could find."""
    dense = tiny_checkpoint(tmp_path / "model", "bert")
    tensors = load_file(dense / "model.safetensors")
    tensors["bert.encoder.layer.1.output.LayerNorm.weight"] = torch.full((64,), 3e38)
    save_file(tensors, dense / "model.safetensors", metadata={"format": "pt"})
    result = verified(dense, tmp_path)
    assert not result.details["passed"]
    assert result.details["failures"] == ["the model runs, logits finite: NaN or infinite logits"]


def test_a_class_that_is_not_the_family_s_own_is_found(tmp_path: Path) -> None:
    """A BERT saved without its head opens with a head of random numbers."""
    dense = tiny_checkpoint(tmp_path / "model", "bert")
    tensors = load_file(dense / "model.safetensors")
    headless = {name: tensor for name, tensor in tensors.items() if not name.startswith("cls.predictions.transform")}
    save_file(headless, dense / "model.safetensors", metadata={"format": "pt"})
    assert "is missing" in verified(dense, tmp_path).details["failures"][0]


@pytest.mark.parametrize("family", CUTS)
def test_measuring_and_serving_are_refused_with_the_reason(family: str, tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "model", family)
    with pytest.raises(InputError, match=f"causal language models, and {family} is none"):
        check_served(dense, ServeConfig())
    source = TextSource(source=str(tiny_text_file(tmp_path / "text.txt")))
    with pytest.raises(InputError, match=f"{family} is none: set `evaluate: null`"):
        evaluate_directory(dense, Evaluate(), (source,), make_reporter(False).progress("evaluate"))
