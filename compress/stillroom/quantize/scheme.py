"""Which modules a scheme quantizes, and whether the model's dimensions allow it. No torch: plans ask too.

    scheme  weights                        activations                   written as
    fp8     E4M3, one scale a tensor       E4M3, one calibrated scale    ModelOpt's unified checkpoint
    int8    int8, one scale a row (1)      int8, scaled per token        compressed-tensors, `int-quantized`
    none    as they are                    as they are                   the checkpoint, made ready to serve

(1) a row of the weight (out, in) makes one output channel. Both schemes are symmetric.

Embeddings and norms always stay as they are, and so does the head: vLLM's compressed-tensors matches no head by the
target `Linear`, and a tied head is the embedding. Per-tensor FP8 is the one scheme that vLLM, TensorRT-LLM and SGLang
all take; vLLM refuses ModelOpt's own INT8 export, which is why INT8 is written as compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from stillroom.errors import InputError
from stillroom.models.shape import ModelShape
from stillroom.recipe import Quantize

HEAD = "lm_head"

FP8_MULTIPLE = 16
"""Both dimensions of an FP8 matrix are multiples of this in the engines' GEMM kernels."""

FUSED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Modules that engines load as one matrix, so that they are quantized together or not at all."""


@dataclass(frozen=True)
class Selection:
    """Linear modules by name, in the checkpoint's order."""

    quantized: tuple[str, ...]
    ignored: tuple[str, ...]


def select_modules(shape: ModelShape, config: Quantize, where: str) -> Selection:
    """What `config` quantizes in a model of this shape; `where` names the model in errors.

    A pattern of `ignore` is the name of a module or of one that holds it, or a wildcard over either.
    Raises InputError when a pattern matches nothing, when the head or a part of a fused matrix would be quantized,
    when nothing is left, or when FP8 meets dimensions that its kernels refuse.
    """
    linears = linear_modules(shape)
    if unmatched := [p for p in config.ignore if not any(matches(name, p) for name in linears)]:
        raise InputError(
            f"{where}: ignore pattern {unmatched[0]!r} matches no linear module; there are, for example, "
            f"{', '.join(_examples(shape))}"
        )
    ignored = tuple(name for name in linears if any(matches(name, p) for p in config.ignore))
    quantized = tuple(name for name in linears if name not in set(ignored))
    if HEAD in quantized:
        raise InputError(
            f"{where}: stillroom leaves the head unquantized; add {HEAD} to `ignore` (given: {list(config.ignore)})"
        )
    if not quantized:
        raise InputError(f"{where}: `ignore` {list(config.ignore)} leaves nothing to quantize; use scheme none")
    _check_fused(set(ignored), quantized, where)
    if config.scheme == "fp8":
        _check_fp8_dimensions(shape, quantized, where)
    return Selection(quantized, ignored)


def linear_modules(shape: ModelShape) -> tuple[str, ...]:
    """The matrices of the layers, and the head, which is there even when it is tied."""
    in_layers = (
        name.removesuffix(".weight")
        for name, dims in shape.tensor_shapes().items()
        if ".layers." in name and len(dims) == 2
    )
    return (*in_layers, HEAD)


def matches(name: str, pattern: str) -> bool:
    """Whether the pattern names the module or one that holds it; `*` and `?` are wildcards."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[: i + 1]), pattern) for i in range(len(parts)))


def fused_groups(names: Iterable[str]) -> Iterator[tuple[str, ...]]:
    """The modules among `names` that engines load as one matrix, group by group."""
    present = dict.fromkeys(names)
    for name in present:
        parent, _, leaf = name.rpartition(".")
        for group in FUSED:
            if leaf == group[0]:
                yield tuple(f"{parent}.{sibling}" for sibling in group if f"{parent}.{sibling}" in present)


def _check_fused(ignored: set[str], quantized: tuple[str, ...], where: str) -> None:
    for group in fused_groups((*quantized, *ignored)):
        apart = [name for name in group if name in ignored]
        if apart and len(apart) < len(group):
            raise InputError(
                f"{where}: `ignore` leaves out {', '.join(apart)}, but engines load {', '.join(group)} as one matrix; "
                "ignore all of them or none"
            )


def _check_fp8_dimensions(shape: ModelShape, quantized: tuple[str, ...], where: str) -> None:
    shapes = shape.tensor_shapes()
    for name in quantized:
        dims = shapes[f"{name}.weight"]
        if any(dim % FP8_MULTIPLE for dim in dims):
            raise InputError(
                f"{where}: {name} is {dims[0]} x {dims[1]}, and FP8 kernels want multiples of {FP8_MULTIPLE}; prune to "
                f"such widths, add the module to `ignore`, or use scheme int8"
            )


def _examples(shape: ModelShape) -> tuple[str, ...]:
    """One module of each kind, from the first layer."""
    return tuple(name for name in linear_modules(shape) if ".layers.0." in name or name == HEAD)
