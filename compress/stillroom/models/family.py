"""What a model family looks like, as data: which tensors there are and which axes they have.

Everything that cuts, counts or hooks a model works from these descriptions and from nothing else, so a family is a YAML
file beside this module (families/*.yaml), and adding one means a new file. The axes:

    vocab      tokens                                  query      num_attention_heads * head_dim
    hidden     the residual stream                     key_value  num_key_value_heads * head_dim
    ffn        intermediate channels                   head_dim   one head
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict

from stillroom.errors import InputError

FAMILIES_DIR = Path(__file__).parent / "families"

Axis = Literal["vocab", "hidden", "ffn", "query", "key_value", "head_dim"]


class Family(BaseModel):
    """A description; `{layer}` stands for the layer's index in every name."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    model_type: str
    """As config.json says it."""
    architecture: str
    """The transformers class."""
    layers: str
    """The module list of layers."""
    tensors: dict[str, tuple[Axis, ...]]
    """Every tensor that a checkpoint may have, with its axes in order."""
    only_when: dict[str, str] = {}
    """Tensors that exist only when this boolean field of the config is true."""
    hidden_norms: tuple[str, ...]
    """RMS norm modules over the hidden channels."""
    attention_output: str
    """The linear module whose input is the concatenated heads."""
    ffn_output: str
    """The linear module whose input is the FFN channels."""
    per_layer_lists: tuple[str, ...] = ()
    """Config fields with one entry for each layer."""
    layer_clamps: tuple[str, ...] = ()
    """Config fields that count layers and may not exceed their number."""
    tied_by_default: bool = False
    """What a config without `tie_word_embeddings` means."""
    default_head_dim: int | None = None
    """What a config without `head_dim` means; None: hidden_size / num_attention_heads."""
    norm_offset: float = 0.0
    """The norm's scale is norm_offset + weight."""
    embedding_scaled_by_sqrt_hidden: bool = False
    """Embeddings are multiplied by sqrt(hidden_size) in the forward pass."""
    head_dim_free: bool = True
    """Engines read head_dim from the config; False: they compute hidden_size / num_attention_heads."""
    heads_divide_hidden: bool = False
    """transformers refuses a config whose hidden_size is no multiple of num_attention_heads, explicit head_dim or
    not."""

    def tensor_names(self, config: dict[str, Any]) -> dict[str, tuple[Axis, ...]]:
        """Every tensor of a model with this config, layers spelled out; a tied lm_head is left out."""
        names: dict[str, tuple[Axis, ...]] = {}
        for pattern, axes in self.tensors.items():
            if pattern in self.only_when and not config.get(self.only_when[pattern], False):
                continue
            if pattern == "lm_head.weight" and config.get("tie_word_embeddings", self.tied_by_default):
                continue
            if "{layer}" in pattern:
                names.update({pattern.format(layer=i): axes for i in range(config["num_hidden_layers"])})
            else:
                names[pattern] = axes
        return names


@functools.cache
def families() -> dict[str, Family]:
    """All descriptions, by model_type."""
    found = [
        Family.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        for path in sorted(FAMILIES_DIR.glob("*.yaml"))
    ]
    return {family.model_type: family for family in found}


def family_of(config: dict[str, Any], where: str) -> Family:
    """The family of a config.json's content; `where` names the model in the error."""
    model_type = config.get("model_type")
    if model_type not in families():
        raise InputError(
            f"{where}: model family {model_type!r} is not supported; supported: {', '.join(sorted(families()))}"
        )
    return families()[model_type]
