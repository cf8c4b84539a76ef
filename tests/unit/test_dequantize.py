"""Quantized checkpoints opened with plain transformers: right, or refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import modelopt.torch.quantization as mtq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from jobs import artifact_at, job_of
from stillroom.errors import InputError
from stillroom.export.dequantize import (
    load_dequantized,
    load_fake_quantized,
    read_quantization,
    round_to_e4m3,
    round_tokens_to_int8,
)
from stillroom.models.load import load_model
from stillroom.quantize.stage import run
from stillroom.recipe import Quantize, Scheme
from tiny import tiny_checkpoint, tiny_text_file

IDS = torch.arange(2 * 64).view(2, 64) * 5 % 384


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("dense"))


def quantized(dense: Path, folder: Path, scheme: Scheme) -> Path:
    text = tiny_text_file(folder / "text.txt", 40)
    config = Quantize.model_validate({"scheme": scheme, "calibration": {"samples": 6, "sequence_length": 64}})
    job = job_of(config, {"source": artifact_at(dense), "dense": artifact_at(dense)}, text, folder / "job")
    run(job)
    return job.out_dir


@pytest.fixture(scope="module")
def fp8(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(dense, tmp_path_factory.mktemp("fp8"), "fp8")


@pytest.fixture(scope="module")
def int8(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(dense, tmp_path_factory.mktemp("int8"), "int8")


def kl(reference: nn.Module, model: nn.Module) -> float:
    with torch.no_grad():
        p = reference(IDS).logits.float().log_softmax(-1)
        q = model(IDS).logits.float().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def copy_with(source: Path, target: Path, **tensors: Tensor | None) -> Path:
    """The checkpoint with tensors replaced, or left out where None is given."""
    shutil.copytree(source, target)
    content = load_file(source / "model.safetensors")
    for name, tensor in tensors.items():
        if tensor is None:
            del content[name]
        else:
            content[name] = tensor
    save_file(content, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_plain_transformers_computes_fp8_wrong_without_an_error_and_ours_right(dense: Path, fp8: Path) -> None:
    reference = load_model(dense)
    trap = AutoModelForCausalLM.from_pretrained(fp8, dtype=torch.float32).eval()  # no error: this is the trap
    assert kl(reference, trap) > 0.05
    assert kl(reference, load_dequantized(fp8)) < 0.002
    with pytest.raises(InputError, match="quantized checkpoint"):
        load_model(fp8)


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_dequantized_weights_are_codes_times_scales(scheme: str, request: pytest.FixtureRequest) -> None:
    model_dir: Path = request.getfixturevalue(scheme)
    raw = load_file(model_dir / "model.safetensors")
    model = load_dequantized(model_dir)
    for name, parameter in model.named_parameters():
        expected = raw[name].float()
        if (scale := raw.get(name.removesuffix(".weight") + ".weight_scale")) is not None:
            expected = expected * scale.float()
        assert torch.equal(parameter, expected), name
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.dtype == torch.float32
    assert load_dequantized(model_dir, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_plain_checkpoint_opens_as_it_is(dense: Path) -> None:
    plain, same = load_model(dense), load_fake_quantized(dense)
    assert torch.equal(plain(IDS).logits, same(IDS).logits)
    assert torch.equal(plain(IDS).logits, load_dequantized(dense)(IDS).logits)


def test_fake_quantized_int8_is_the_product_of_integers(int8: Path) -> None:
    """One linear against the arithmetic of an engine: int32 accumulation of codes, scaled at the end."""
    raw = load_file(int8 / "model.safetensors")
    name = "model.layers.2.mlp.gate_proj"
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = load_fake_quantized(int8).get_submodule(name)(x)
    token_scale = x.abs().amax(dim=1, keepdim=True) / 127
    codes = (x / token_scale).round().clamp(-128, 127).to(torch.int32)
    integers = codes @ raw[f"{name}.weight"].to(torch.int32).T
    expected = integers.float() * token_scale * raw[f"{name}.weight_scale"].float().T
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_fake_quantized_fp8_is_what_modelopt_simulates(dense: Path, fp8: Path) -> None:
    """Against ModelOpt's own fake quantization with the amax that the checkpoint's scales say."""
    raw = load_file(fp8 / "model.safetensors")
    config = {
        "quant_cfg": [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "parent_class": "nn.Linear", "cfg": {"num_bits": (4, 3)}},
            {"quantizer_name": "*input_quantizer", "parent_class": "nn.Linear", "cfg": {"num_bits": (4, 3)}},
            {"quantizer_name": "lm_head.*", "enable": False},
        ],
        "algorithm": "max",
    }
    simulated = mtq.quantize(load_model(dense), config, lambda model: model(IDS))
    for name, module in simulated.named_modules():
        if f"{name}.input_scale" in raw:
            module.input_quantizer.amax = raw[f"{name}.input_scale"] * 448
            module.weight_quantizer.amax = raw[f"{name}.weight_scale"] * 448
    with torch.no_grad():
        expected, ours = simulated(IDS).logits, load_fake_quantized(fp8)(IDS).logits
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_rounding_activations_costs_something_that_dequantizing_does_not_show(dense: Path, fp8: Path) -> None:
    reference = load_model(dense)
    assert kl(reference, load_fake_quantized(fp8)) > kl(reference, load_dequantized(fp8)) > 0


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e6, 1e6, width=32), min_size=1, max_size=16), st.floats(2**-10, 2**10, width=32))
def test_e4m3_rounding_is_to_a_neighbour_and_saturates(values: list[float], scale: float) -> None:
    x = torch.tensor(values)
    rounded = round_to_e4m3(x, torch.tensor(scale))
    inside = x.abs() <= 448 * scale
    assert bool(rounded.isfinite().all())
    # 3 bits of mantissa: half a step is 1/16 of the value, or half of the smallest subnormal 2^-9
    assert bool(((rounded - x).abs() <= x.abs() / 16 * 1.001 + scale * 2**-10 * 1.001)[inside].all())
    assert bool((rounded.abs() <= 448 * scale * 1.001).all())


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=16))
def test_int8_rounding_is_within_half_a_step_of_each_token(values: list[float]) -> None:
    x = torch.stack([torch.tensor(values), torch.zeros(len(values))])
    rounded = round_tokens_to_int8(x)
    step = x.abs().amax(dim=1, keepdim=True) / 127
    assert bool(((rounded - x).abs() <= step * 0.501 + 1e-9).all())


@pytest.mark.parametrize(
    ("described", "named"),
    [
        ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "modelopt NVFP4"),
        ({"quant_method": "awq", "bits": 4}, "awq"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}}, "pack-quantized"),
    ],
)
def test_an_unknown_scheme_is_refused_and_the_readable_ones_are_named(
    described: dict[str, object], named: str, dense: Path, tmp_path: Path
) -> None:
    shutil.copytree(dense, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": described}))
    with pytest.raises(InputError, match=rf"{named}, which is not read here; read: modelopt FP8 .* int-quantized"):
        load_dequantized(tmp_path / "model")


def test_a_static_int8_is_not_taken_for_the_dynamic_one(int8: Path, tmp_path: Path) -> None:
    shutil.copytree(int8, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    config["quantization_config"]["config_groups"]["group_0"]["input_activations"]["dynamic"] = False
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match="not read here"):
        read_quantization(tmp_path / "model")


def test_modelopt_files_without_the_config_entry_are_refused(fp8: Path, tmp_path: Path) -> None:
    shutil.copytree(fp8, tmp_path / "model")
    path = tmp_path / "model" / "config.json"
    config = json.loads(path.read_text())
    del config["quantization_config"]
    path.write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"hf_quant_config\.json but no quantization_config"):
        load_dequantized(tmp_path / "model")


def test_a_missing_scale_is_an_error_not_a_guess(fp8: Path, int8: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj"
    for scheme, source in (("fp8", fp8), ("int8", int8)):
        broken = copy_with(source, tmp_path / scheme, **{f"{name}.weight_scale": None})
        with pytest.raises(InputError, match=r"up_proj.weight is quantized, but .*weight_scale is missing"):
            load_dequantized(broken)
    broken = copy_with(fp8, tmp_path / "input", **{f"{name}.input_scale": None})
    with pytest.raises(InputError, match=r"up_proj.input_scale is missing"):
        load_fake_quantized(broken)


def test_a_missing_or_misshapen_tensor_is_an_error(int8: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lacks model.norm.weight"):
        load_dequantized(copy_with(int8, tmp_path / "a", **{"model.norm.weight": None}))
    with pytest.raises(InputError, match=r"model.norm.weight is \(3,\)"):
        load_dequantized(copy_with(int8, tmp_path / "b", **{"model.norm.weight": torch.ones(3)}))
