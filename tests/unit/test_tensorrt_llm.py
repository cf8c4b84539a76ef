"""TensorRT-LLM's commands, and the config fields that it reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stillroom.export.tensorrt_llm import (
    QUANT_CONFIG,
    TensorRTOptions,
    build_engine_command,
    problems,
    serve_command,
    serve_engine_command,
)

GOOD: dict[str, Any] = {
    "rope_theta": 1e5,
    "rope_parameters": {"rope_theta": 1e5, "rope_type": "default"},
    "torch_dtype": "bfloat16",
    "dtype": "bfloat16",
}
FP8 = {"quant_method": "modelopt", "quant_algo": "FP8"}


def checkpoint(folder: Path, beside: str | None = None, **changes: Any) -> Path:
    config = {name: value for name, value in (GOOD | changes).items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    if beside is not None:
        (folder / QUANT_CONFIG).write_text(beside)
    return folder


def test_commands_carry_the_sizes(tmp_path: Path) -> None:
    options = TensorRTOptions(max_batch_size=64, max_seq_len=2048, tensor_parallel=2, port=9000)
    serve = serve_command(tmp_path, options)
    assert serve[:2] == ["trtllm-serve", str(tmp_path)]
    for flag, value in (("--tp_size", "2"), ("--max_batch_size", "64"), ("--max_seq_len", "2048"), ("--port", "9000")):
        assert serve[serve.index(flag) + 1] == value
    build = build_engine_command(tmp_path, "engine", options)
    assert build[3:] == [str(tmp_path), "engine", "64", "8192", "2048", "2"]
    compile(build[2], "build", "exec")
    engine = serve_engine_command(tmp_path, "engine", options)
    assert engine[:4] == ["trtllm-serve", "engine", "--backend", "tensorrt"]
    assert engine[engine.index("--tokenizer") + 1] == str(tmp_path)


def test_planning_modules_import_no_torch() -> None:
    modules = "stillroom.quantize.scheme, stillroom.export.card, stillroom.export.tensorrt_llm"
    code = f"import sys, {modules}; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert (
        subprocess.run([sys.executable, "-c", code], env={"PYTHONPATH": ":".join(sys.path)}, check=False).returncode
        == 0
    )


def test_a_config_with_the_old_fields_is_read_right(tmp_path: Path) -> None:
    assert problems(checkpoint(tmp_path)) == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rope_theta": None}, "silently become 10000"),
        ({"rope_theta": 10000.0}, "contradicts rope_parameters' 100000"),
        ({"torch_dtype": None}, "torch_dtype is None"),
        ({"torch_dtype": "float8_e4m3fn"}, "torch_dtype is 'float8_e4m3fn'"),
        ({"quantization_config": {"quant_method": "compressed-tensors"}}, "fp8 only"),
        ({"quantization_config": FP8}, "hf_quant_config.json is missing"),
    ],
)
def test_what_would_be_misread_is_said(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    (found,) = problems(checkpoint(tmp_path, **changes))
    assert said in found


def test_the_two_quantization_configs_must_agree(tmp_path: Path) -> None:
    agreed = checkpoint(tmp_path, json.dumps({"quantization": {"quant_algo": "FP8"}}), quantization_config=FP8)
    assert problems(agreed) == []
    checkpoint(tmp_path, json.dumps({"quantization": {"quant_algo": "NVFP4"}}), quantization_config=FP8)
    assert problems(tmp_path) == ["hf_quant_config.json says NVFP4, config.json FP8"]


def test_gemma_s_full_attention_theta_is_the_one_compared(tmp_path: Path) -> None:
    rope = {"full_attention": {"rope_theta": 1e6}, "sliding_attention": {"rope_theta": 1e4}}
    assert problems(checkpoint(tmp_path, rope_parameters=rope, rope_theta=1e6)) == []
    assert problems(checkpoint(tmp_path, rope_parameters=rope, rope_theta=1e4)) != []
