"""What the quantize stage writes: opened again, compared with slow references and with what the libraries expect."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from torch import Tensor

from jobs import artifact_at, job_of
from stillroom.errors import InputError
from stillroom.export.dequantize import load_fake_quantized
from stillroom.export.int8 import quantize_rows
from stillroom.export.tensorrt_llm import problems
from stillroom.models.load import load_model
from stillroom.quantize.stage import run
from stillroom.recipe import Quantize
from stillroom.stage import StageResult
from tiny import FAMILIES, tiny_checkpoint, tiny_text_file

CALIBRATION = {"samples": 6, "sequence_length": 48, "batch_size": 4}


def quantize(folder: Path, source: Path, *, num_documents: int = 40, **fields: Any) -> tuple[Path, StageResult]:
    """Run the stage on the checkpoint `source`; returns the directory that it wrote."""
    config = Quantize(**{"calibration": CALIBRATION} | fields)
    dense = artifact_at(source)
    folder.mkdir(exist_ok=True)
    text = tiny_text_file(folder / "calibration.txt", num_documents)
    job = job_of(config, {"source": dense, "dense": dense}, text, folder / "job", name="small")
    return job.out_dir, run(job)


def tensors(model_dir: Path) -> dict[str, Tensor]:
    return load_file(model_dir / "model.safetensors")


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("llama"), dtype=torch.bfloat16)


@pytest.mark.parametrize("fields", [{"scheme": "fp8"}, {"scheme": "int8"}, {"scheme": "int8", "smoothquant": True}])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_stays_close_to_the_original(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", family, dtype=torch.bfloat16)
    out, result = quantize(tmp_path, source, **fields)
    ids = torch.arange(2 * 60).view(2, 60) % 384
    with torch.no_grad():
        p = load_model(source)(ids).logits.float().log_softmax(-1)
        q = load_fake_quantized(out)(ids).logits.float().log_softmax(-1)
    assert 0 < (p.exp() * (p - q)).sum(-1).mean() < 0.01
    assert result.details["modules_quantized"] == 28
    assert result.details["weight_bytes_after"] < 0.75 * result.details["weight_bytes_before"]


def test_int8_codes_times_scales_are_the_weights_to_half_a_step(llama: Path, tmp_path: Path) -> None:
    out, result = quantize(tmp_path, llama, scheme="int8")
    before, after = tensors(llama), tensors(out)
    for name in before:
        if not name.endswith("_proj.weight"):
            assert torch.equal(before[name], after[name]), name
            continue
        scale = after[name.replace(".weight", ".weight_scale")]
        assert after[name].dtype == torch.int8
        assert scale.shape == (len(before[name]), 1)
        assert scale.dtype == torch.bfloat16
        error = (before[name].float() - after[name].float() * scale.float()).abs()
        assert bool(
            (error <= 0.5001 * scale.float() + 1e-9 + (before[name].abs().amax(1, True) - 127 * scale).relu()).all()
        )
        assert bool((after[name].abs().amax(dim=1) >= 126).all())
    assert result.details["calibration_tokens"] == 0
    assert result.tokens is None


def test_compressed_tensors_reads_the_int8_config_and_the_weights(llama: Path, tmp_path: Path) -> None:
    out, _ = quantize(tmp_path, llama, scheme="int8", ignore=("lm_head", "model.layers.0"))
    config = json.loads((out / "config.json").read_text())
    described = dict(config["quantization_config"])
    assert described.pop("quant_method") == "compressed-tensors"
    read = QuantizationConfig.model_validate(described)
    (scheme,) = read.config_groups.values()
    assert (scheme.weights.num_bits, scheme.weights.strategy, scheme.weights.symmetric) == (8, "channel", True)
    assert (scheme.input_activations.strategy, scheme.input_activations.dynamic) == ("token", True)
    assert "lm_head" in read.ignore
    assert "model.layers.0.mlp.up_proj" in read.ignore
    assert "model.layers.0.mlp.up_proj.weight_scale" not in tensors(out)
    assert problems(out) == ["quantized as compressed-tensors; of stillroom's schemes TensorRT-LLM takes fp8 only"]


def test_fp8_holds_codes_and_positive_scales_shared_where_engines_fuse(llama: Path, tmp_path: Path) -> None:
    out, result = quantize(tmp_path, llama, scheme="fp8")
    before, after = tensors(llama), tensors(out)
    layer = "model.layers.2"
    for name in (f"{layer}.mlp.down_proj", f"{layer}.self_attn.q_proj"):
        weight, scale = after[f"{name}.weight"], after[f"{name}.weight_scale"]
        assert weight.dtype == torch.float8_e4m3fn
        assert scale.shape == ()
        assert torch.allclose(weight.float() * scale, before[f"{name}.weight"].float(), rtol=0.07, atol=float(scale))
    for names in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj"):
        assert len({after[f"{layer}.{name}.input_scale"].item() for name in names}) == 1
    assert after["model.embed_tokens.weight"].dtype == torch.bfloat16  # without care ModelOpt quantizes it
    assert "lm_head.weight" not in after
    assert problems(out) == []
    assert not any(name.endswith("k_scale") for name in after)
    assert result.tokens == result.details["calibration_tokens"] == 6 * 48


def test_an_fp8_kv_cache_has_calibrated_scales_in_ignored_layers_too(llama: Path, tmp_path: Path) -> None:
    out, _ = quantize(tmp_path, llama, scheme="fp8", kv_cache="fp8", ignore=("lm_head", "model.layers.1"))
    after = tensors(out)
    scales = {name: after[name].item() for name in after if name.endswith(("k_scale", "v_scale"))}
    assert len(scales) == 2 * 4
    assert len(set(scales.values())) > 4  # calibrated, not a constant
    assert all(0 < scale < 1 for scale in scales.values())
    assert after["model.layers.1.mlp.up_proj.weight"].dtype == torch.bfloat16
    assert json.loads((out / "hf_quant_config.json").read_text())["quantization"]["kv_cache_quant_algo"] == "FP8"


def test_ignoring_layer_1_of_12_leaves_layers_10_and_11_quantized(tmp_path: Path) -> None:
    source = tiny_checkpoint(tmp_path / "model", num_hidden_layers=12)
    out, _ = quantize(tmp_path, source, scheme="fp8", ignore=("lm_head", "model.layers.1"))
    after = tensors(out)
    plain = {
        name.split(".")[2] for name in after if name.endswith("up_proj.weight") and after[name].dtype == torch.float32
    }
    assert plain == {"1"}
    load_fake_quantized(out)  # raises where config and tensors disagree on what is quantized


@pytest.mark.parametrize("scheme", ["fp8", "int8", "none"])
def test_companions_engine_fields_and_a_card_come_along(scheme: str, llama: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    for path in llama.iterdir():
        (source / path.name).write_bytes(path.read_bytes())
    (source / "LICENSE").write_text("Apache License\n  Version 2.0, January 2004")
    (source / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true}')
    out, _ = quantize(tmp_path, source, scheme=scheme)
    config = json.loads((out / "config.json").read_text())
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert config["rope_theta"] == 10000.0
    assert json.loads((out / "generation_config.json").read_text())["temperature"] == 0.6
    assert "license: apache-2.0" in (out / "README.md").read_text()
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE"):
        assert (out / name).read_bytes() == (source / name).read_bytes()


def test_scheme_none_copies_the_weights_as_they_are(llama: Path, tmp_path: Path) -> None:
    out, result = quantize(tmp_path, llama, scheme="none")
    assert (out / "model.safetensors").read_bytes() == (llama / "model.safetensors").read_bytes()
    assert result.details["weight_bytes_after"] == result.details["weight_bytes_before"]


def test_the_same_job_writes_the_same_bytes(llama: Path, tmp_path: Path) -> None:
    for scheme in ("fp8", "int8"):
        one, _ = quantize(tmp_path / f"{scheme}-1", llama, scheme=scheme)
        two, _ = quantize(tmp_path / f"{scheme}-2", llama, scheme=scheme)
        assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()


def test_modelopt_s_chatter_stays_off_stdout(llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quantize(tmp_path, llama, scheme="fp8")
    assert capsys.readouterr().out == ""


def test_a_quantized_source_is_refused(llama: Path, tmp_path: Path) -> None:
    out, _ = quantize(tmp_path / "first", llama, scheme="int8")
    with pytest.raises(InputError, match="quantized already"):
        quantize(tmp_path / "second", out, scheme="fp8")


def test_text_shorter_than_a_window_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="a window needs 2048"):
        quantize(tmp_path, llama, num_documents=3, scheme="fp8", calibration={"samples": 1, "sequence_length": 2048})


def test_calibrating_beyond_the_context_is_refused(llama: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="beyond the model's 2048 positions"):
        quantize(tmp_path, llama, scheme="fp8", calibration={"samples": 1, "sequence_length": 4096})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rows_of_zeros_and_tiny_rows_get_positive_scales(dtype: torch.dtype) -> None:
    weight = torch.tensor([[0.0, 0.0], [1e-6, -2e-6], [3.0, -1.0]], dtype=dtype)
    codes, scale = quantize_rows(weight, weight.abs().amax(dim=1, keepdim=True).float())
    assert bool((scale > 0).all())
    assert codes[0].tolist() == [0, 0]
    assert codes[2].tolist() == [127, -42]
    assert scale.dtype == (torch.float32 if dtype == torch.float16 else dtype)
