"""Commands for TensorRT-LLM, and whether a checkpoint says what it reads. No torch: the real run needs its own image.

Releases after 1.2.1 have no engine step: `trtllm-serve` takes the Hugging Face directory. Up to 1.2.1 an engine can be
built ahead, through the LLM API of the `tensorrt` backend, and served from its own directory with the tokenizer named.

It reads config.json with field names from before transformers 5. A missing top-level `rope_theta` is no error there:
theta becomes 10000 and every answer is wrong, so this is checked here."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.models.shape import read_config

QUANT_CONFIG = "hf_quant_config.json"

BUILD_ENGINE = """\
import sys
from tensorrt_llm import BuildConfig
from tensorrt_llm._tensorrt_engine import LLM
model, engine, batch, tokens, length, tp = sys.argv[1:]
config = BuildConfig(max_batch_size=int(batch), max_num_tokens=int(tokens), max_seq_len=int(length))
LLM(model=model, build_config=config, tensor_parallel_size=int(tp)).save(engine)
"""
"""Run in TensorRT-LLM's image, up to 1.2.1."""


@dataclass(frozen=True)
class TensorRTOptions:
    """What a server or an engine is sized for."""

    max_batch_size: int = 256
    """Sequences in flight."""
    max_num_tokens: int = 8192
    """Tokens in one forward pass."""
    max_seq_len: int = 4096
    """Prompt and answer of one sequence."""
    tensor_parallel: int = 1
    """GPUs that share the model."""
    host: str = "127.0.0.1"
    port: int = 8000


def serve_command(model_dir: Path | str, options: TensorRTOptions) -> list[str]:
    """Serve the Hugging Face directory with the PyTorch backend: every release, the only way after 1.2.1."""
    return [
        "trtllm-serve", str(model_dir), "--backend", "pytorch", "--host", options.host, "--port", str(options.port),
        "--max_batch_size", str(options.max_batch_size), "--max_num_tokens", str(options.max_num_tokens),
        "--max_seq_len", str(options.max_seq_len), "--tp_size", str(options.tensor_parallel),
    ]  # fmt: skip


def build_engine_command(model_dir: Path | str, engine_dir: Path | str, options: TensorRTOptions) -> list[str]:
    """Build an engine ahead, TensorRT-LLM up to 1.2.1."""
    sizes = (options.max_batch_size, options.max_num_tokens, options.max_seq_len, options.tensor_parallel)
    return ["python3", "-c", BUILD_ENGINE, str(model_dir), str(engine_dir), *map(str, sizes)]


def serve_engine_command(model_dir: Path | str, engine_dir: Path | str, options: TensorRTOptions) -> list[str]:
    """Serve a built engine, TensorRT-LLM up to 1.2.1; the tokenizer stays in the Hugging Face directory."""
    return [
        "trtllm-serve", str(engine_dir), "--backend", "tensorrt", "--tokenizer", str(model_dir),
        "--host", options.host, "--port", str(options.port),
    ]  # fmt: skip


def problems(model_dir: Path) -> list[str]:
    """Why TensorRT-LLM 1.2 would refuse this checkpoint or, worse, misread it; empty when it reads what is meant.

    Raises InputError where there is no config.json.
    """
    config = read_config(model_dir)
    return [*_rope_problems(config), *_dtype_problems(config), *_quantization_problems(model_dir, config)]


def _rope_problems(config: dict[str, Any]) -> list[str]:
    rope = config.get("rope_parameters") or {}
    per_kind = rope.get("full_attention")
    meant = per_kind.get("rope_theta") if isinstance(per_kind, dict) else rope.get("rope_theta")
    read = config.get("rope_theta")
    if read is None:
        return ["config.json has no top-level rope_theta, so theta would silently become 10000"]
    if meant is not None and read != meant:
        return [f"top-level rope_theta {read} contradicts rope_parameters' {meant}"]
    return []


def _dtype_problems(config: dict[str, Any]) -> list[str]:
    dtype = config.get("torch_dtype")
    if dtype not in ("float16", "bfloat16", "float32"):
        return [f"config.json's top-level torch_dtype is {dtype!r}; float16, bfloat16 or float32 is read"]
    return []


def _quantization_problems(model_dir: Path, config: dict[str, Any]) -> list[str]:
    described = config.get("quantization_config")
    if described is None:
        return []
    if described.get("quant_method") != "modelopt":
        return [f"quantized as {described.get('quant_method')}; of stillroom's schemes TensorRT-LLM takes fp8 only"]
    try:
        beside = json.loads((model_dir / QUANT_CONFIG).read_text(encoding="utf-8"))["quantization"]
    except (OSError, json.JSONDecodeError, KeyError):
        return [f"{QUANT_CONFIG} is missing or unreadable, and it is where TensorRT-LLM finds the scales' meaning"]
    if beside.get("quant_algo") != described.get("quant_algo"):
        return [f"{QUANT_CONFIG} says {beside.get('quant_algo')}, config.json {described.get('quant_algo')}"]
    return []
