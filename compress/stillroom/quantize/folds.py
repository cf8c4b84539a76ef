"""Where SmoothQuant's scales can go in a model of this shape, exactly and without a new operation. No torch.

A linear's input may be divided by a scale where what makes that input can be divided instead: the norm right before it,
or a linear before it with nothing but linear operations between. The names are those of Llama and its many relatives;
a family that fuses these matrices (Phi-3) or puts norms elsewhere (OLMo 2, Gemma) has fewer such places or none, and
what has none is left unsmoothed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from stillroom.models.shape import ModelShape


@dataclass(frozen=True)
class Fold:
    """Linears that read one input, and the module that makes it."""

    kind: Literal["norm", "values", "rows"]
    """`norm`: a norm's scale and bias are divided; `values`: rows of v, by KV group; `rows`: rows of a linear."""
    maker: str
    readers: tuple[str, ...]


def folds(shape: ModelShape, quantized: Sequence[str]) -> list[Fold]:
    """All of them whose readers are all quantized: one that is not would see the divided input too."""
    wanted = set(quantized)
    modules = {name.removesuffix(".weight") for name in shape.tensor_shapes()}
    found = (fold for layer in range(shape.num_layers) for fold in _of_layer(shape, f"{shape.family.layers}.{layer}"))
    return [fold for fold in found if fold.maker in modules and wanted.issuperset(fold.readers)]


def _of_layer(shape: ModelShape, layer: str) -> Iterator[Fold]:
    attention, mlp = f"{layer}.self_attn", f"{layer}.mlp"
    # Gemma's norms store their scale less one, which does not divide; where layers end in norms, those of these names
    # stand behind attention and not before what reads them here
    if shape.family.norm_offset == 0 and shape.family.writes_residual_directly:
        yield Fold("norm", f"{layer}.input_layernorm", tuple(f"{attention}.{x}_proj" for x in "qkv"))
        yield Fold("norm", f"{layer}.post_attention_layernorm", (f"{mlp}.gate_proj", f"{mlp}.up_proj"))
    yield Fold("values", f"{attention}.v_proj", (f"{attention}.o_proj",))
    yield Fold("rows", f"{mlp}.up_proj", (f"{mlp}.down_proj",))
