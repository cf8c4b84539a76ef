"""The size of a model from its config alone: parameters, bytes, KV cache. No weight is opened, no torch imported."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from stillroom.errors import InputError
from stillroom.models.family import CHANNELS, EXPERT, LAYER, Axis, Family, Size, axis_parts, family_of

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "fp8": 1, "int8": 1}

FIXED: dict[str, Size] = {"positions": "num_positions", "token_types": "num_token_types", "buckets": "num_buckets"}
"""Axes that nothing cuts, with the sizes that they have."""


class Place(NamedTuple):
    """Which tensor of the description a tensor is: the pattern, and the indices that it is spelled out with."""

    pattern: str
    layer: int | None = None
    """Counted through both stacks."""
    expert: int | None = None


@dataclass(frozen=True)
class ModelShape:
    """The dimensions that pruning changes and costs follow from.

    Layers of an encoder-decoder are counted through: `num_layers` of the encoder, then `num_decoder_layers`.
    """

    family: Family
    num_layers: int
    hidden_size: int
    intermediate_size: int
    """0 where the family has no FFN but experts."""
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    tied: bool
    config: dict[str, Any]
    """The config.json that this was read from."""
    num_decoder_layers: int = 0
    num_experts: int = 0
    """In each layer."""
    num_experts_per_token: int = 0
    moe_intermediate_size: int = 0
    """Intermediate channels of one expert."""

    @property
    def total_layers(self) -> int:
        """Of both stacks."""
        return self.num_layers + self.num_decoder_layers

    @property
    def num_positions(self) -> int | None:
        """The longest sequence that the config allows; None where it says nothing."""
        names = self.family.config_names("num_positions")
        given = next((self.config[name] for name in names if self.config.get(name) is not None), None)
        if given is None or not self.family.positions_follow_padding:
            return given
        padding = self.config.get("pad_token_id", self.family.config_defaults.get("pad_token_id"))
        return int(given) - (0 if padding is None else int(padding) + 1)

    def check_length(self, sequence_length: int, what: str) -> None:
        """Raise InputError for a sequence that is longer than the model has positions; `what` names it."""
        if self.num_positions is not None and sequence_length > self.num_positions:
            raise InputError(
                f"{what} {sequence_length} is beyond the model's {self.num_positions} positions; give at most "
                f"{self.num_positions}"
            )

    def axis_size(self, axis: Axis) -> int:
        """Elements along an axis of a tensor."""
        return sum(self._plain_size(part) for part in axis_parts(axis))

    def _plain_size(self, axis: str) -> int:
        if axis.isdecimal():
            return int(axis)
        if axis in FIXED:
            return _config_size(self.family, FIXED[axis], self.config)
        sizes = {
            "vocab": self.vocab_size,
            "hidden": self.hidden_size,
            "ffn": self.intermediate_size,
            "query": self.num_attention_heads * self.head_dim,
            "cross_query": self.num_attention_heads * self.head_dim,
            "key_value": self.num_key_value_heads * self.head_dim,
            "head_dim": self.head_dim,
            "heads": self.num_attention_heads,
            "experts": self.num_experts,
            "expert_ffn": self.moe_intermediate_size,
        }
        return sizes[axis]

    def stack_of(self, layer: int) -> range:
        """The layers of the stack that this one is in."""
        return range(self.num_layers) if layer < self.num_layers else range(self.num_layers, self.total_layers)

    def layers_of(self, pattern: str) -> range:
        """The layers that a `{layer}` name of the description is about: those of one stack, or the first of them."""
        decoder = self.family.decoder
        layers = self.stack_of(self.num_layers if decoder and pattern.startswith(f"{decoder.layers}.") else 0)
        return layers[:1] if pattern in self.family.first_layer_only else layers

    def spelled(self, pattern: str, layer: int | None = None, expert: int | None = None) -> str:
        """A name of the description for this layer, counted through both stacks, and this expert."""
        local = None if layer is None else layer - self.stack_of(layer)[0]
        return pattern.replace(LAYER, str(local)).replace(EXPERT, str(expert))

    def spelled_out(self, pattern: str) -> dict[int, str]:
        """A `{layer}` name of the description (of a tensor or a module) for every layer that it is about."""
        return {layer: self.spelled(pattern, layer) for layer in self.layers_of(pattern)}

    def layer_names(self) -> tuple[str, ...]:
        """The modules of all layers, of both stacks."""
        decoder = (
            [f"{self.family.decoder.layers}.{i}" for i in range(self.num_decoder_layers)] if self.family.decoder else []
        )
        return (*(f"{self.family.layers}.{i}" for i in range(self.num_layers)), *decoder)

    @functools.cached_property
    def places(self) -> dict[str, Place]:
        """Every tensor that the checkpoint may have, optional ones too, in the description's order."""
        return {self.spelled(*place): place for pattern in self.family.tensors for place in self._places(pattern)}

    def _places(self, pattern: str) -> Iterator[Place]:
        layers, experts = self._indices(pattern)
        for layer in layers:
            for expert in experts:
                yield Place(pattern, layer, expert)

    def _indices(self, pattern: str) -> tuple[Sequence[int | None], Sequence[int | None]]:
        """The layers and experts that a tensor of the description is spelled out with; none where it is not there."""
        family = self.family
        if pattern in family.only_when and not family.holds(family.only_when[pattern], self.config):
            return (), ()
        if self.tied and pattern in family.tied_tensors:
            return (), ()
        layers: Sequence[int | None] = self.layers_of(pattern) if LAYER in pattern else (None,)
        return layers, range(self.num_experts) if EXPERT in pattern else (None,)

    def axes(self, name: str) -> tuple[Axis, ...]:
        """The axes of a tensor, in order."""
        return self.family.tensors[self.places[name].pattern]

    def tensor_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, optional or not."""
        return tuple(self.axis_size(axis) for axis in self.axes(name))

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor of the checkpoint with its shape, without optional ones."""
        optional = self.family.optional
        return {name: self.tensor_shape(name) for name, place in self.places.items() if place.pattern not in optional}

    @functools.cached_property
    def num_params(self) -> int:
        """Exact; tied embeddings count once."""
        return self.params_of(lambda pattern: True)

    def params_of(self, wanted: Callable[[str], bool]) -> int:
        """Parameters of the description's tensors that are wanted, without optional ones.

        No name is spelled out: a search for a shape asks for thousands of shapes.
        """
        counted = 0
        for pattern, axes in self.family.tensors.items():
            if pattern not in self.family.optional and wanted(pattern):
                layers, experts = self._indices(pattern)
                counted += len(layers) * len(experts) * prod(map(self.axis_size, axes))
        return counted

    def is_linear(self, pattern: str) -> bool:
        """Whether a tensor of the description is the weight of a layer's linear module; a router's is not."""
        axes = self.family.tensors[pattern]
        return (
            LAYER in pattern and len(axes) == 2 and all(part in CHANNELS for axis in axes for part in axis_parts(axis))
        )

    def linear_shapes(self) -> dict[str, tuple[int, ...]]:
        """The weights of the layers' linear modules, which is what quantization schemes shrink; routers are not."""
        return {
            name: shape for name, shape in self.tensor_shapes().items() if self.is_linear(self.places[name].pattern)
        }

    @functools.cached_property
    def num_linear_params(self) -> int:
        """Weights of the layers' linear modules."""
        return self.params_of(self.is_linear)

    @functools.cached_property
    def num_expert_params(self) -> int:
        """Weights of all experts' linear modules; a token passes through `num_experts_per_token` of them."""
        return self.params_of(lambda pattern: EXPERT in pattern and self.is_linear(pattern))

    def weight_bytes(self, scheme: str) -> int:
        """Bytes of the checkpoint's tensors; `scheme` is a dtype, or fp8 or int8 for the layers' linear modules."""
        if scheme in ("fp8", "int8"):
            quantized = self.num_linear_params
            return quantized + 2 * (self.num_params - quantized)
        return self.num_params * DTYPE_BYTES[scheme]

    def kv_bytes_per_token(self, bytes_per_element: int = 2) -> int:
        """Key and value of one token over all layers that generate.

        An encoder-decoder keeps as much again for each token of its input, for cross-attention; a masked language
        model keeps nothing.
        """
        if self.family.task == "masked_lm":
            return 0
        layers = self.num_decoder_layers if self.family.decoder else self.num_layers
        return 2 * layers * self.num_key_value_heads * self.head_dim * bytes_per_element


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

    def size(name: Size, default: int | None = None) -> int:
        return _config_size(family, name, config, default)

    try:
        heads, hidden, num_layers = size("num_attention_heads"), size("hidden_size"), size("num_layers")
        default_ffn = family.default_ffn_per_hidden and family.default_ffn_per_hidden * hidden
        moe = family.has_axis("experts")
        return ModelShape(
            family=family,
            num_layers=num_layers,
            hidden_size=hidden,
            intermediate_size=size("intermediate_size", default_ffn) if family.has_axis("ffn") else 0,
            num_attention_heads=heads,
            num_key_value_heads=size("num_key_value_heads", heads),
            head_dim=size("head_dim", family.default_head_dim or hidden // heads),
            vocab_size=size("vocab_size"),
            tied=bool(config.get("tie_word_embeddings", family.tied_by_default)),
            config=config,
            num_decoder_layers=size("num_decoder_layers", num_layers) if family.decoder else 0,
            num_experts=size("num_experts") if moe else 0,
            num_experts_per_token=size("num_experts_per_token") if moe else 0,
            moe_intermediate_size=size("moe_intermediate_size") if moe else 0,
        )
    except KeyError as error:
        raise InputError(f"{where}: config.json lacks {error.args[0]!r}") from None


def require_decoder(shape: ModelShape, doing: str, instead: str) -> None:
    """Raise InputError where `doing` takes a causal language model and this is none; `instead` is what to do."""
    if shape.family.task != "causal_lm":
        raise InputError(f"{doing} takes a causal language model, and {shape.family.model_type} is none: {instead}")


def _config_size(family: Family, size: Size, config: dict[str, Any], default: int | None = None) -> int:
    """What the config, or else the family, or else `default` says. Raises KeyError with the field's name otherwise."""
    names = family.config_names(size)
    for name in names:
        if config.get(name) is not None:
            return int(config[name])
    for name in names:
        if name in family.config_defaults:
            return int(family.config_defaults[name])
    if default is None:
        raise KeyError(names[0] if names else size)
    return default
