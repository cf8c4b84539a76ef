"""Verification finds what is broken, and passes what is whole."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from jobs import artifact_at, job_of
from stillroom.artifact import Manifest, seal
from stillroom.errors import InputError
from stillroom.export import verify
from stillroom.export.checks import check_checkpoint
from stillroom.export.drift import compare_logits, greedy, is_degenerate, until_end
from stillroom.models.load import load_model
from stillroom.quantize import stage as quantize_stage
from stillroom.recipe import Quantize, Verify
from stillroom.stage import StageResult
from tiny import FAMILIES, tiny_checkpoint, tiny_model, tiny_text_file

LIMITS = Verify(tokens=320, sequence_length=64)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_checkpoint(tmp_path_factory.mktemp("dense"), dtype=torch.bfloat16)


def quantized(source: Path, folder: Path, **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    config = Quantize.model_validate({"calibration": {"samples": 4, "sequence_length": 64}} | fields)
    inputs = {"source": artifact_at(source), "dense": artifact_at(source)}
    job = job_of(config, inputs, tiny_text_file(folder / "text.txt", 40), folder / "quantize")
    quantize_stage.run(job)
    return job.out_dir


@pytest.fixture(scope="module")
def fp8(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(dense, tmp_path_factory.mktemp("fp8"), scheme="fp8", kv_cache="fp8")


@pytest.fixture(scope="module")
def int8(dense: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return quantized(dense, tmp_path_factory.mktemp("int8"), scheme="int8")


def verified(
    model_dir: Path, reference: Path, folder: Path, kind: str = "quantize", config: Verify = LIMITS
) -> StageResult:
    folder.mkdir(exist_ok=True)
    inputs = {"source": artifact_at(model_dir, kind), "reference": artifact_at(reference)}
    job = job_of(config, inputs, tiny_text_file(folder / "heldout.txt", 30), folder / "verify")
    result = verify.run(job)
    assert list(job.scratch_dir.iterdir()) == []
    return result


def value(result: StageResult, name: str) -> float:
    return next(m.value for m in result.measurements if m.name == name)


def failed_checks(model_dir: Path) -> dict[str, str]:
    return {fact.check: fact.found for fact in check_checkpoint(model_dir) if not fact.ok}


def changed(source: Path, target: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    """A copy of a checkpoint whose tensors went through `change`."""
    shutil.copytree(source, target)
    content = load_file(source / "model.safetensors")
    change(content)
    save_file(content, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.parametrize("scheme", ["fp8", "int8"])
def test_a_quantized_model_passes_with_its_drift_measured(
    scheme: str, dense: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    result = verified(request.getfixturevalue(scheme), dense, tmp_path)
    assert result.details["passed"]
    assert result.details["failures"] == []
    assert result.details["judged"]
    assert value(result, "verify.passed") == 1
    assert 0 < value(result, "verify.kl") < 0.01
    assert 0.8 < value(result, "verify.top1_agreement") <= 1  # random models have near ties
    assert result.tokens == 320
    assert len(result.details["samples"]) == 4
    kl = next(m for m in result.measurements if m.name == "verify.kl")
    assert kl.n == 320
    assert kl.stderr is not None
    assert 0 < kl.stderr < kl.value


def test_the_same_model_has_no_drift(dense: Path, tmp_path: Path) -> None:
    result = verified(dense, dense, tmp_path)
    assert abs(value(result, "verify.kl")) < 1e-6
    assert value(result, "verify.top1_agreement") == 1
    assert result.details["loops"] == result.details["reference_loops"]


def test_drift_beyond_the_limits_fails_a_quantized_model_and_is_only_reported_for_others(
    dense: Path, int8: Path, tmp_path: Path
) -> None:
    strict = Verify(tokens=128, sequence_length=64, max_kl=1e-9, min_top1_agreement=1.0)
    judged = verified(int8, dense, tmp_path / "a", config=strict)
    assert not judged.details["passed"]
    assert value(judged, "verify.passed") == 0
    assert "verify.max_kl allows 1e-09" in judged.details["failures"][0]
    other = tiny_checkpoint(tmp_path / "other", seed=1, dtype=torch.bfloat16)
    pruned = verified(other, dense, tmp_path / "b", kind="prune", config=strict)
    assert pruned.details["passed"]
    assert not pruned.details["judged"]
    assert value(pruned, "verify.kl") > 0.1


def test_the_drift_is_the_mean_over_positions_of_a_slow_loop(dense: Path, int8: Path, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    reference, logits = torch.randn(2, 7, 11, generator=generator)
    total, same = 0.0, 0
    for a, b in zip(reference, logits, strict=True):
        p, q = a.double().softmax(0), b.double().softmax(0)
        total += sum(float(x * (x / y).log()) for x, y in zip(p, q, strict=True))
        same += int(a.argmax() == b.argmax())
    kl, agreed = compare_logits(reference, logits)
    assert kl == pytest.approx(total, rel=1e-5)
    assert agreed == same


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plain_checkpoint_of_every_family_is_whole(family: str, tmp_path: Path) -> None:
    assert failed_checks(tiny_checkpoint(tmp_path / "model", family)) == {}


def test_a_missing_tensor_is_named(dense: Path, tmp_path: Path) -> None:
    broken = changed(dense, tmp_path / "m", lambda t: t.__delitem__("model.layers.2.mlp.up_proj.weight"))
    assert failed_checks(broken) == {
        "every tensor is there, in its shape": "model.layers.2.mlp.up_proj.weight is missing"
    }
    result = verified(broken, dense, tmp_path / "v", kind="prune")  # structure is judged for every kind
    assert not result.details["passed"]
    assert "up_proj.weight is missing" in result.details["failures"][0]
    assert [m.name for m in result.measurements] == ["verify.passed"]


def test_a_wrong_shape_an_extra_tensor_and_a_wrong_dtype_are_named(dense: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"] = torch.ones(65, dtype=torch.bfloat16)
        tensors["model.layers.9.mlp.up_proj.weight"] = torch.ones(2, 2)
        tensors["model.layers.0.mlp.up_proj.weight"] = tensors["model.layers.0.mlp.up_proj.weight"].float()

    assert failed_checks(changed(dense, tmp_path / "m", change)) == {
        "every tensor is there, in its shape": "model.norm.weight is (65,), not (64,)",
        "no tensor is too many": "model.layers.9.mlp.up_proj.weight",
        "dtypes are as config.json says": "model.layers.0.mlp.up_proj.weight is F32, not BF16",
    }


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_no_number_is_named(bad: float, dense: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.1.self_attn.o_proj.weight"][3, 4] = bad

    found = failed_checks(changed(dense, tmp_path / "m", change))
    assert found == {"no weight is NaN or infinite": "model.layers.1.self_attn.o_proj.weight has 1 such values"}


def test_missing_and_impossible_scales_are_named(fp8: Path, int8: Path, tmp_path: Path) -> None:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight_scale"] = torch.tensor(0.0)
        tensors["model.layers.0.mlp.gate_proj.input_scale"] = torch.tensor(float("nan"))
        del tensors["model.layers.3.self_attn.v_proj.v_scale"]

    found = failed_checks(changed(fp8, tmp_path / "fp8", change))
    assert "v_proj.v_scale is missing" in found["every tensor is there, in its shape"]
    assert "up_proj.weight_scale goes down to 0" in found["scales are positive and finite"]
    assert "gate_proj.input_scale goes down to nan" in found["scales are positive and finite"]

    def negate(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.0.mlp.up_proj.weight_scale"][7] *= -1

    found = failed_checks(changed(int8, tmp_path / "int8", negate))
    assert list(found) == ["scales are positive and finite"]


def test_a_tied_head_may_be_written_twice_but_not_differently(dense: Path, tmp_path: Path) -> None:
    def same(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()

    def different(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] * 2

    assert failed_checks(changed(dense, tmp_path / "same", same)) == {}
    assert list(failed_checks(changed(dense, tmp_path / "different", different))) == [
        "the head is tied as config.json says"
    ]


def test_a_truncated_file_a_lying_index_a_pickle_and_a_lost_tokenizer_are_found(dense: Path, tmp_path: Path) -> None:
    truncated = shutil.copytree(dense, tmp_path / "truncated")
    content = (dense / "model.safetensors").read_bytes()
    (truncated / "model.safetensors").write_bytes(content[:-100])
    assert "truncated" in failed_checks(truncated)["weight files are whole"]

    indexed = shutil.copytree(dense, tmp_path / "indexed")
    names = dict.fromkeys(load_file(dense / "model.safetensors"), "model.safetensors")
    del names["model.norm.weight"]
    (indexed / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert "the index says nothing" in failed_checks(indexed)["the index matches the files"]

    pickled = shutil.copytree(dense, tmp_path / "pickled")
    (pickled / "pytorch_model.bin").write_bytes(b"")
    (pickled / "tokenizer.json").unlink()
    assert failed_checks(pickled)["nothing is pickled"] == "pytorch_model.bin"
    assert "has no tokenizer" in failed_checks(pickled)["the tokenizer opens and fits"]


def test_fp8_that_tensorrt_llm_would_misread_is_found(fp8: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(fp8, tmp_path / "copy")
    config = json.loads((copy / "config.json").read_text())
    del config["rope_theta"]
    (copy / "config.json").write_text(json.dumps(config))
    assert "silently become 10000" in failed_checks(copy)["TensorRT-LLM reads what is meant"]


def test_no_config_is_bad_input(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        check_checkpoint(tmp_path)


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_is_what_generate_writes(family: str) -> None:
    model = tiny_model(family)
    model.generation_config.eos_token_id = None
    prompts = torch.arange(3 * 20).view(3, 20) * 3 % 384
    expected = model.generate(prompts, max_new_tokens=48, do_sample=False)[:, 20:]
    assert torch.equal(greedy(model, prompts), expected)


def test_loops_are_degenerate_and_prose_is_not() -> None:
    assert is_degenerate([5] * 48)
    assert is_degenerate([*range(24), *[1, 2, 3] * 8])
    assert is_degenerate([*range(100, 124), *list(range(8)) * 3])
    assert not is_degenerate(list(range(48)))
    assert not is_degenerate([*[7] * 24, *range(24)])  # a loop that it got out of
    assert not is_degenerate([5] * 10)  # ended by itself before a loop could be told
    assert until_end([4, 5, 1, 6], [1]) == [4, 5]


def test_new_loops_fail_and_the_reference_s_own_do_not() -> None:
    loop, prose = [3] * 48, list(range(48))
    assert verify._loop_failures([prose] * 4, [loop, loop, loop, prose])
    assert not verify._loop_failures([prose] * 4, [loop, loop, prose, prose])
    assert not verify._loop_failures([loop] * 4, [loop] * 4)


def test_text_shorter_than_a_window_is_one_short_window(dense: Path, tmp_path: Path) -> None:
    result = verified(dense, dense, tmp_path, config=Verify(tokens=64, sequence_length=2048))
    assert result.tokens == 64


def test_a_window_longer_than_the_context_is_refused(dense: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="beyond the model's 2048 positions"):
        verified(dense, dense, tmp_path, config=Verify(sequence_length=2049))


def test_a_directory_is_verified_without_a_reference(fp8: Path, dense: Path, tmp_path: Path) -> None:
    report = verify.verify_directory(fp8)
    assert report.passed
    assert len(report.samples) == 4
    assert "passed" in report.render()
    assert report.as_json()["facts"][0]["ok"]
    broken = changed(dense, tmp_path / "m", lambda t: t.__delitem__("model.norm.weight"))
    report = verify.verify_directory(broken)
    assert not report.passed
    assert "FAIL every tensor is there" in report.render()


def test_a_sealed_artifact_s_bytes_are_checked_too(dense: Path, tmp_path: Path) -> None:
    work = shutil.copytree(dense, tmp_path / "work")
    manifest = Manifest(
        kind="import", name="dense", key="0" * 16, stage_version=1, config={}, parents={}, files={}, environment={},
        seed=0, seconds=0.0,
    )  # fmt: skip
    sealed = seal(work, tmp_path / "sealed", manifest)
    assert verify.verify_directory(sealed.path).passed
    (sealed.path / "tokenizer_config.json").write_text("{}")
    report = verify.verify_directory(sealed.path)
    assert "changed or missing: tokenizer_config.json" in report.render()
    assert not report.passed


def test_infinite_logits_fail_whatever_the_stage(dense: Path, tmp_path: Path) -> None:
    def blow_up(tensors: dict[str, Tensor]) -> None:
        tensors["model.norm.weight"].fill_(3e38)
        tensors["model.embed_tokens.weight"].mul_(1e3)

    broken = changed(dense, tmp_path / "m", blow_up)
    assert not bool(load_model(broken)(torch.tensor([[5, 6]])).logits.isfinite().all())
    result = verified(broken, dense, tmp_path / "v", kind="distill")
    assert result.details["failures"] == ["the logits are not finite numbers"]
