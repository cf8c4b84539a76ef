"""How a checkpoint is quantized, and the sizes that engines are particular about, from its JSON files alone."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.engines.contract import ServeConfig
from stillroom.errors import EnvironmentCannot, InputError
from stillroom.machine import nvidia_gpus
from stillroom.models.family import families
from stillroom.models.shape import read_config
from stillroom.models.source import require_tokenizer

GIB = 2**30


@dataclass(frozen=True)
class Quantized:
    """The format, and its own name for the numbers: modelopt FP8, compressed-tensors int-quantized, gptq."""

    method: str
    algo: str | None

    def __str__(self) -> str:
        return f"{self.method} {self.algo}" if self.algo else self.method


def read_quantization(model_dir: Path) -> Quantized | None:
    """From config.json, or from ModelOpt's hf_quant_config.json beside it; None for plain weights."""
    described: dict[str, Any] | None = read_config(model_dir).get("quantization_config")
    if described is not None:
        return Quantized(str(described.get("quant_method")), described.get("quant_algo") or described.get("format"))
    try:
        beside = json.loads((model_dir / "hf_quant_config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Quantized("modelopt", beside.get("quantization", {}).get("quant_algo"))


def head_dim(config: dict[str, Any]) -> int | None:
    """Of a config.json's content; None where it does not say, as for a family without attention heads."""
    if given := config.get("head_dim"):
        return int(given)
    if "hidden_size" in config and "num_attention_heads" in config:
        return int(config["hidden_size"]) // int(config["num_attention_heads"])
    return None


def kv_bytes_per_token(model_dir: Path) -> int:
    """Keys and values of one token over all layers in 16 bits; 0 where config.json does not say."""
    config = read_config(model_dir)
    heads = config.get("num_key_value_heads") or config.get("num_attention_heads") or 0
    size: int = 2 * 2 * config.get("num_hidden_layers", 0) * heads * (head_dim(config) or 0)
    return size


def kv_cache_gib_for(model_dir: Path, tokens: int) -> int:
    """Whole GiB that hold keys and values of so many tokens, at least 1."""
    return max(1, -(-kv_bytes_per_token(model_dir) * tokens // GIB))


def check_served(model_dir: Path, config: ServeConfig) -> None:
    """Raise what an engine would only say a minute after its start.

    InputError: no weights or tokenizer, a context beyond the model's positions, GPUs that do not divide its heads.
    EnvironmentCannot: more GPUs than there are.
    """
    content = read_config(model_dir)
    if not any(model_dir.glob("*.safetensors")):
        raise InputError(f"{model_dir} has no *.safetensors; give a finished checkpoint directory")
    require_tokenizer(model_dir)
    family = families().get(str(content.get("model_type")))  # engines take more families than can be pruned
    if family is not None and family.task != "causal_lm":
        raise InputError(
            f"{model_dir} cannot be served: engines take causal language models, and {family.model_type} is none"
        )
    positions = content.get("max_position_embeddings")
    if positions and config.max_model_len > positions and not _rope_is_scaled(content):
        raise InputError(
            f"max_model_len {config.max_model_len} exceeds the {positions} positions of {model_dir}; "
            f"give at most {positions}"
        )
    heads = content.get("num_attention_heads")
    if heads and heads % config.tensor_parallel:
        raise InputError(
            f"tensor_parallel {config.tensor_parallel} does not divide the model's {heads} attention heads"
        )
    if config.tensor_parallel > 1 and (num_gpus := len(nvidia_gpus())) < config.tensor_parallel:
        raise EnvironmentCannot(
            f"tensor_parallel {config.tensor_parallel} needs as many GPUs; this machine has {num_gpus}"
        )


def _rope_is_scaled(content: dict[str, Any]) -> bool:
    """Scaled rope reaches beyond max_position_embeddings; how far, the engine computes."""
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    kinds = [rope, *(kind for kind in rope.values() if isinstance(kind, dict))]
    return any((kind.get("rope_type") or kind.get("type") or "default") != "default" for kind in kinds)
