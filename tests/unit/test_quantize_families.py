"""Quantizing every described family: what engines take comes out close to the original, the rest is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from jobs import artifact_at, job_of
from stillroom.errors import InputError
from stillroom.export import verify
from stillroom.export.dequantize import RoundedExperts
from stillroom.models.shape import ModelShape, shape_of
from stillroom.quantize import stage
from stillroom.quantize.folds import folds
from stillroom.quantize.scheme import linear_modules, select_modules
from stillroom.recipe import Quantize, Verify
from stillroom.stage import StageResult
from tiny import tiny_checkpoint, tiny_config, tiny_model, tiny_text_file

CALIBRATION = {"samples": 6, "sequence_length": 48, "batch_size": 4}


def shape(family: str) -> ModelShape:
    return shape_of(tiny_config(family).to_dict(), "the model")


def quantized(folder: Path, family: str, **fields: Any) -> tuple[Path, StageResult, StageResult]:
    """The written directory, what the quantize stage says, and what verification against the original says."""
    dense = artifact_at(tiny_checkpoint(folder / "model", family, dtype=torch.bfloat16))
    text = tiny_text_file(folder / "text.txt", 40)
    config = Quantize.model_validate({"calibration": CALIBRATION} | fields)
    job = job_of(config, {"source": dense, "dense": dense}, text, folder / "quantize")
    result = stage.run(job)
    inputs = {"source": artifact_at(job.out_dir, "quantize"), "reference": dense}
    limits = Verify(tokens=192, sequence_length=64, min_top1_agreement=0.5)  # random models have near ties
    return job.out_dir, result, verify.run(job_of(limits, inputs, text, folder / "verify"))


MODULES = {"phi3": 4, "olmo2": 7, "starcoder2": 6, "smollm3": 7, "gemma2": 7}
"""Linear modules in a layer."""


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
@pytest.mark.parametrize("family", MODULES)
def test_a_decoder_is_quantized_and_passes_verification(family: str, scheme: str, tmp_path: Path) -> None:
    _, result, verified = quantized(tmp_path, family, scheme=scheme)
    assert result.details["modules_quantized"] == 4 * MODULES[family]
    assert verified.details["failures"] == []
    assert 0 < next(m.value for m in verified.measurements if m.name == "verify.kl") < 0.01


@pytest.mark.parametrize(("family", "smoothed"), [("starcoder2", 16), ("smollm3", 28), ("olmo2", 8)])
def test_smoothing_reaches_what_a_family_allows_and_changes_nothing(family: str, smoothed: int, tmp_path: Path) -> None:
    """StarCoder2's layer norms have biases, OLMo 2's norms stand behind what they are named after."""
    _, result, verified = quantized(tmp_path, family, scheme="int8", smoothquant=True)
    assert result.details["modules_smoothed"] == smoothed
    assert verified.details["failures"] == []
    assert next(m.value for m in verified.measurements if m.name == "verify.kl") < 0.001


def test_experts_are_quantized_to_fp8_one_by_one_and_their_router_is_not(tmp_path: Path) -> None:
    out, result, verified = quantized(tmp_path, "qwen3_moe", scheme="fp8", ignore=("lm_head", "model.layers.1.mlp"))
    assert result.details["modules_quantized"] == 4 * 4 + 3 * 4 * 3
    assert verified.details["failures"] == []
    tensors = load_file(out / "model.safetensors")
    assert tensors["model.layers.0.mlp.gate.weight"].dtype == torch.bfloat16
    assert tensors["model.layers.1.mlp.experts.0.up_proj.weight"].dtype == torch.bfloat16
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        experts = [f"model.layers.0.mlp.experts.{i}.{leaf}" for i in range(4)]
        assert all(tensors[f"{name}.weight"].dtype == torch.float8_e4m3fn for name in experts)
        assert len({tensors[f"{name}.weight_scale"].item() for name in experts}) == 4
        assert len({tensors[f"{name}.input_scale"].item() for name in experts}) == 1


def test_experts_that_round_nothing_compute_what_transformers_does() -> None:
    model: Any = tiny_model("qwen3_moe")
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        expected = model(ids).logits
        for layer in model.model.layers:
            layer.mlp.experts = RoundedExperts(layer.mlp.experts, lambda x: x, lambda x: x)
        torch.testing.assert_close(model(ids).logits, expected)


def test_routers_embeddings_and_norms_are_no_linear_modules() -> None:
    names = linear_modules(shape("qwen3_moe"))
    assert len(names) == 4 * (4 + 4 * 3) + 1
    assert not any(name.endswith(("mlp.gate", "embed_tokens", "norm")) for name in names)


@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [
        ("gpt2", {"scheme": "fp8"}, r"stores its matrices as \(in, out\)"),
        ("bert", {"scheme": "fp8"}, "bert is none: use scheme none"),
        ("t5", {"scheme": "int8"}, "t5 is none: use scheme none"),
        ("qwen3_moe", {"scheme": "int8"}, "use fp8 or none"),
        (
            "qwen3_moe",
            {"scheme": "fp8", "ignore": ("lm_head", "model.layers.0.mlp.experts.2")},
            "leaves out 3 of the 12 matrices of model.layers.0.mlp.experts;",
        ),
        ("phi3", {"scheme": "int8", "smoothquant": True}, "nothing in a phi3 model can be smoothed"),
    ],
)
def test_what_no_engine_would_read_is_refused_with_the_reason(family: str, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        select_modules(shape(family), Quantize.model_validate(fields), "m")


def test_norms_behind_attention_are_never_taken_for_norms_before_the_ffn() -> None:
    for family in ("olmo2", "gemma2", "gemma3_text"):
        names = linear_modules(shape(family))
        assert {fold.kind for fold in folds(shape(family), names)} == {"values", "rows"}
