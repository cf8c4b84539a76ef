"""What a model family looks like, as data: which tensors there are, which axes they have, how they act together.

Everything that cuts, counts or hooks a model works from these descriptions and from nothing else, so a family is a YAML
file beside this module (families/*.yaml), and adding one means a new file. No other module names a family. The axes:

    vocab      tokens                                  query        num_attention_heads * head_dim
    hidden     the residual stream                     key_value    num_key_value_heads * head_dim
    ffn        intermediate channels                   cross_query  the heads of cross-attention, * head_dim
    experts    experts of a layer                      heads        num_attention_heads, one number each
    expert_ffn intermediate channels of one expert     head_dim     one head
    positions, token_types, buckets (of relative positions): what is looked up, never cut

An axis may also be a plain number, and several joined by `+` where a model fuses matrices: `query+key_value+key_value`.
Axes stand in the order in which the checkpoint stores them, so GPT-2's transposed matrices need nothing more.
"""

from __future__ import annotations

import functools
import re
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict

from stillroom.errors import InputError

FAMILIES_DIR = Path(__file__).parent / "families"

PlainAxis = Literal[
    "vocab", "hidden", "ffn", "query", "key_value", "cross_query", "heads", "head_dim", "experts", "expert_ffn",
    "positions", "token_types", "buckets",
]  # fmt: skip
CHANNELS = frozenset({"hidden", "ffn", "query", "key_value", "cross_query", "expert_ffn"})
"""Axes that carry activations: a matrix between two of these is a linear module."""
LAYER, EXPERT = "{layer}", "{expert}"
Size = Literal[
    "num_layers", "num_decoder_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "num_experts", "num_experts_per_token", "moe_intermediate_size",
    "num_positions", "num_token_types", "num_buckets",
]  # fmt: skip
CONFIG_FIELDS: dict[Size, str] = {
    "num_layers": "num_hidden_layers",
    "num_experts_per_token": "num_experts_per_tok",
    "num_positions": "max_position_embeddings",
    "num_token_types": "type_vocab_size",
    "num_buckets": "relative_attention_num_buckets",
}
"""What config.json calls a size, where it is another name and the family says nothing else."""


def axis_parts(axis: str) -> tuple[str, ...]:
    """The plain axes that a fused one joins."""
    return tuple(axis.split("+"))


def _known_axis(axis: str) -> str:
    for part in axis_parts(axis):
        if part not in get_args(PlainAxis) and not part.isdecimal():
            raise ValueError(f"axis {part!r} is not known; there are {', '.join(get_args(PlainAxis))}, and numbers")
    return axis


Axis = Annotated[str, AfterValidator(_known_axis)]


class Described(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class DecoderStack(Described):
    """The second stack of an encoder-decoder; its layers are counted on from the encoder's."""

    layers: str
    """The module list of layers."""
    attention_output: str
    """As in Family, of self-attention."""
    cross_attention_output: str
    """The same of the attention to the encoder's states."""
    ffn_output: str
    """As in Family."""


class OpensAs(Described):
    """Another family that is the same function, for sizes that this family's own transformers class refuses."""

    family: str
    """Its model_type; it has the same tensors."""
    config: dict[str, Any] = {}
    """Fields of config.json that make it the same function."""
    not_when: tuple[str, ...] = ()
    """Conditions on the config under which it is not."""


class Family(Described):
    """A description; `{layer}` stands for the layer's index in its stack and `{expert}` for the expert's, in every
    name.

    A condition on the config is `field` or `not field` (true or false), `field=value` or `field!=value`, the value
    being a wildcard pattern.
    """

    model_type: str
    """As config.json says it."""
    architecture: str
    """The transformers class."""
    task: Literal["causal_lm", "masked_lm", "seq2seq_lm"] = "causal_lm"
    """What the model predicts, hence which of transformers' auto classes opens it."""
    layers: str
    """The module list of layers; of an encoder-decoder, the encoder's."""
    decoder: DecoderStack | None = None
    """The decoder of an encoder-decoder."""
    tensors: dict[str, tuple[Axis, ...]]
    """Every tensor that a checkpoint may have, with its axes in order. `{layer}` tensors start with the name of their
    stack's module list."""
    only_when: dict[str, str] = {}
    """Tensors that exist only under this condition."""
    optional: tuple[str, ...] = ()
    """Tensors that a checkpoint may lack; they are cut with the rest and not counted."""
    tied_tensors: tuple[str, ...] = ("lm_head.weight",)
    """Tensors of the head that are aliases of others when embeddings are tied; the first is the output embedding."""
    first_layer_only: tuple[str, ...] = ()
    """`{layer}` tensors that only the first layer of their stack has, and that serve all its layers: they stay when
    that layer goes. One with the axis `heads` makes head i the same head in all layers of the stack."""
    ignored: tuple[str, ...] = ()
    """Wildcard patterns of buffers and duplicates in old checkpoints that every loader makes anew."""
    base_prefix: str | None = None
    """The first part of names (with its dot) that checkpoints saved without a head leave out."""
    aliases: dict[str, str] = {}
    """Endings of names in old checkpoints, and what they are now."""
    fields: dict[Size, str | tuple[str, ...] | None] = {}
    """What config.json calls a size, where it is not called as usual; of several names the first is current. Null: it
    has none, and key-value heads are as many as heads, head_dim is hidden_size / heads."""
    config_defaults: dict[str, Any] = {}
    """What fields of config.json mean that are not there."""
    supported_values: dict[str, tuple[Any, ...]] = {}
    """Fields of config.json that must have one of these values; another one is a variant that this description does
    not fit."""
    positions_follow_padding: bool = False
    """Positions are looked up from pad_token_id + 1 on, so that so many fewer can be used."""
    norm: Literal["rms", "layer"] = "rms"
    """What `hidden_norms` are. `layer`: they subtract the mean first, and have biases."""
    hidden_norms: tuple[str, ...]
    """Norm modules over the hidden channels, those in the head too."""
    final_norm: str | None
    """The norm between the last layer (the decoder's) and the head; null where layers end in a norm."""
    head_norms: dict[str, Axis] = {}
    """RMS norm modules over all heads of query or key at once. Cutting heads rescales them by measured shares, as
    cutting hidden channels does `hidden_norms`."""
    attention_output: str
    """The linear module whose input is the concatenated heads."""
    ffn_output: str
    """The linear module whose input is the FFN channels. With `{expert}`: the name on disk, while in memory
    transformers holds one module, `experts`."""
    writes_residual_directly: bool = True
    """A layer is its input plus what these two modules give: nothing comes between them and the residual stream.
    False where a norm does, so that a linear map after them cannot be folded into them."""
    experts: str | None = None
    """The module that holds a layer's experts, called with (hidden states, chosen experts, their weights)."""
    router: str | None = None
    """The module that gives (logits, weights of the chosen experts, chosen experts)."""
    per_layer_lists: tuple[str, ...] = ()
    """Config fields with one entry for each layer."""
    layer_clamps: tuple[str, ...] = ()
    """Config fields that count layers and may not exceed their number."""
    tied_by_default: bool = False
    """What a config without `tie_word_embeddings` means."""
    default_head_dim: int | None = None
    """What a config without `head_dim` means; None: hidden_size / num_attention_heads."""
    default_ffn_per_hidden: int | None = None
    """What a config without `intermediate_size` means, as a multiple of hidden_size; None: it has to be there."""
    norm_offset: float = 0.0
    """The norm's scale is norm_offset + weight."""
    embedding_scaled_by_sqrt_hidden: bool = False
    """Embeddings are multiplied by sqrt(hidden_size) in the forward pass."""
    output_scaled_when: tuple[str, ...] = ()
    """The head's input is divided by sqrt(hidden_size) where the first of these config fields that is there is true,
    or where none is there. Empty: never."""
    head_dim_free: bool = True
    """Engines read head_dim from the config; False: they compute hidden_size / num_attention_heads."""
    head_dim_fixed_when: tuple[str, ...] = ()
    """Conditions under which transformers refuses a config whose hidden_size is not num_attention_heads times
    head_dim, free otherwise."""
    heads_divide_hidden: bool = False
    """transformers refuses a config whose hidden_size is no multiple of num_attention_heads, explicit head_dim or
    not."""
    opens_as: OpensAs | None = None
    """What such a model is written as instead."""

    def config_names(self, size: Size) -> tuple[str, ...]:
        """What config.json may call a size, the current name first; none where it has no such field."""
        given = self.fields.get(size, CONFIG_FIELDS.get(size, size))
        return () if given is None else (given,) if isinstance(given, str) else given

    def has_axis(self, axis: PlainAxis) -> bool:
        """Whether any tensor has this axis, by itself or in a fused one."""
        return any(axis in axis_parts(a) for axes in self.tensors.values() for a in axes)

    @property
    def embedding(self) -> str:
        """The table of input embeddings."""
        (name,) = (n for n, axes in self.tensors.items() if axes == ("vocab", "hidden") and n not in self.tied_tensors)
        return name

    @property
    def one_key_value_head_a_head(self) -> bool:
        """Whether key-value heads cannot differ in number from query heads."""
        return not self.config_names("num_key_value_heads")

    @property
    def heads_alike_in_stack(self) -> bool:
        """Whether the same heads must stay in all layers of a stack, a tensor of its first layer being all layers'."""
        return any("heads" in self.tensors[pattern] for pattern in self.first_layer_only)

    def computes_head_dim(self, config: dict[str, Any]) -> bool:
        """Whether head_dim has to stay hidden_size / num_attention_heads."""
        return not self.head_dim_free or any(self.holds(condition, config) for condition in self.head_dim_fixed_when)

    def holds(self, condition: str, config: dict[str, Any]) -> bool:
        """Whether a config.json's content fulfils a condition."""
        config = {**self.config_defaults, **config}
        if "=" not in condition:
            return bool(config.get(condition.removeprefix("not "))) != condition.startswith("not ")
        field, unequal, value = re.fullmatch(r"(\w+)(!?)=(.*)", condition).groups()  # type: ignore[union-attr]
        return fnmatchcase(str(config.get(field)), value) != bool(unequal)

    def current_name(self, name: str) -> str:
        """What a tensor of a checkpoint is called here, which differs in old ones and in those without a head."""
        for old, new in self.aliases.items():
            if name.endswith(old):
                name = name.removesuffix(old) + new
        if (
            self.base_prefix
            and not _matcher(self).fullmatch(name)
            and _matcher(self).fullmatch(self.base_prefix + name)
        ):
            return self.base_prefix + name
        return name

    def is_ignored(self, name: str) -> bool:
        """Whether a tensor is one that loaders make anew."""
        return any(fnmatchcase(name, pattern) for pattern in (*self.ignored, *IGNORED))


IGNORED = ("*rotary_emb.inv_freq",)
"""Buffers that checkpoints of many families carried once."""


@functools.cache
def _pattern_regex(patterns: tuple[str, ...]) -> re.Pattern[str]:
    either = (re.escape(p).replace(r"\{layer\}", r"\d+").replace(r"\{expert\}", r"\d+") for p in patterns)
    return re.compile("|".join(either))


def _matcher(family: Family) -> re.Pattern[str]:
    """Whether a name is one of the family's tensors."""
    return _pattern_regex(tuple(family.tensors))


@functools.cache
def families() -> dict[str, Family]:
    """All descriptions, by model_type."""
    found = [
        Family.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
        for path in sorted(FAMILIES_DIR.glob("*.yaml"))
    ]
    return {family.model_type: family for family in found}


def family_of(config: dict[str, Any], where: str) -> Family:
    """The family of a config.json's content; `where` names the model in the error.

    Raises InputError for a family without a description, and for a variant that its description does not fit.
    """
    model_type = config.get("model_type")
    if model_type not in families():
        raise InputError(
            f"{where}: model family {model_type!r} is not supported; supported: {', '.join(sorted(families()))}"
        )
    family = families()[model_type]
    for field, allowed in family.supported_values.items():
        if field in config and config[field] not in allowed:
            raise InputError(
                f"{where}: config.json says {field}: {config[field]!r}; of {model_type} models only those with "
                f"{' or '.join(map(repr, allowed))} are supported"
            )
    return family
