"""The size of a model from its config alone: parameters, bytes, KV cache. No weight is opened, no torch imported."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from stillroom.errors import InputError
from stillroom.models.family import Axis, Family, family_of

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1}


@dataclass(frozen=True)
class ModelShape:
    """The dimensions that pruning changes and costs follow from."""

    family: Family
    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    config: dict[str, Any]
    """The config.json that this was read from."""

    def axis_size(self, axis: Axis) -> int:
        """Elements along an axis of a tensor."""
        sizes = {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "ffn": self.intermediate_size,
            "query": self.num_attention_heads * self.head_dim,
            "key_value": self.num_key_value_heads * self.head_dim,
            "head_dim": self.head_dim,
        }
        return sizes[axis]

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint with its shape."""
        config = {**self.config, "num_hidden_layers": self.num_layers, "tie_word_embeddings": self.tied}
        return {
            name: tuple(self.axis_size(axis) for axis in axes)
            for name, axes in self.family.tensor_names(config).items()
        }

    @functools.cached_property
    def num_params(self) -> int:
        """Exact; tied embeddings count once."""
        return sum(prod(shape) for shape in self.tensor_shapes().values())

    @functools.cached_property
    def num_linear_params(self) -> int:
        """Weights of the layers' linear modules, which is what quantization schemes shrink."""
        return sum(
            prod(shape) for name, shape in self.tensor_shapes().items() if ".layers." in name and len(shape) == 2
        )

    def weight_bytes(self, scheme: str) -> int:
        """Bytes of the checkpoint's tensors; `scheme` is a dtype, or fp8 or int8 for the layers' linear modules."""
        if scheme in ("fp8", "int8"):
            quantized = self.num_linear_params
            return quantized + 2 * (self.num_params - quantized)
        return self.num_params * DTYPE_BYTES[scheme]

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Key and value of one token over all layers."""
        return 2 * self.num_layers * self.num_key_value_heads * self.head_dim * bytes_per_element


def read_config(model_dir: Path) -> dict[str, Any]:
    """The content of config.json. Raises InputError where there is none."""
    path = model_dir / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(
            f"{model_dir} has no config.json; a plain Hugging Face checkpoint directory is needed"
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise InputError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InputError(f"{path} holds no JSON object")
    return config


def stored_dtype(config: dict[str, Any]) -> str:
    """The type that a config.json says its weights have, under transformers 5's name or the one before."""
    return str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")


def shape_of(config: dict[str, Any], where: str) -> ModelShape:
    """The shape that a config.json describes. Raises InputError for an unknown family or a missing field."""
    family = family_of(config, where)
    try:
        heads = int(config["num_attention_heads"])
        hidden = int(config["hidden_size"])
        return ModelShape(
            family=family,
            num_layers=int(config["num_hidden_layers"]),
            hidden_size=hidden,
            intermediate_size=int(config["intermediate_size"]),
            num_attention_heads=heads,
            num_key_value_heads=int(config.get("num_key_value_heads") or heads),
            head_dim=int(config.get("head_dim") or family.default_head_dim or hidden // heads),
            vocab_size=int(config["vocab_size"]),
            tied=bool(config.get("tie_word_embeddings", family.tied_by_default)),
            config=config,
        )
    except KeyError as error:
        raise InputError(f"{where}: config.json lacks {error.args[0]!r}") from None
