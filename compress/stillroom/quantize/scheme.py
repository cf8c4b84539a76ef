"""Which modules a scheme quantizes, and whether the model's dimensions allow it. No torch: plans ask too.

    scheme  weights                        activations                   written as
    fp8     E4M3, one scale a tensor       E4M3, one calibrated scale    ModelOpt's unified checkpoint
    int8    int8, one scale a row (1)      int8, scaled per token        compressed-tensors, `int-quantized`
    none    as they are                    as they are                   the checkpoint, made ready to serve

(1) a row of the weight (out, in) makes one output channel. Both schemes are symmetric.

Embeddings, norms and the routers of experts always stay as they are, and so does the head: vLLM's compressed-tensors
matches no head by the target `Linear`, and a tied head is the embedding. Per-tensor FP8 is the one scheme that vLLM,
TensorRT-LLM and SGLang all take; vLLM refuses ModelOpt's own INT8 export, which is why INT8 is written as
compressed-tensors.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from stillroom.errors import InputError
from stillroom.models.shape import ModelShape
from stillroom.quantize.folds import folds
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
    experts: tuple[str, ...] = ()
    """Modules that hold the experts among the quantized, all of a layer in one."""


def select_modules(shape: ModelShape, config: Quantize, where: str) -> Selection:
    """What `config` quantizes in a model of this shape; `where` names the model in errors.

    A pattern of `ignore` is the name of a module or of one that holds it, or a wildcard over either.
    Raises InputError for families that no engine takes quantized, when a pattern matches nothing, when the head or a
    part of a fused matrix would be quantized, when nothing is left, or when FP8 meets dimensions that its kernels
    refuse.
    """
    _check_family(shape, config, where)
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
    _check_experts(shape, set(ignored), where)
    if config.smoothquant and not folds(shape, quantized):
        raise InputError(
            f"{where}: nothing in a {shape.family.model_type} model can be smoothed exactly with this `ignore`; leave "
            "smoothquant out"
        )
    if config.scheme == "fp8":
        _check_fp8_dimensions(shape, quantized, where)
    experts = tuple(
        module for module in _expert_modules(shape) if any(name.startswith(f"{module}.") for name in quantized)
    )
    return Selection(quantized, ignored, experts)


def linear_modules(shape: ModelShape) -> tuple[str, ...]:
    """The linear modules of the layers, and the head, which is there even when it is tied."""
    return (*(name.removesuffix(".weight") for name in shape.linear_shapes()), HEAD)


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


def _check_family(shape: ModelShape, config: Quantize, where: str) -> None:
    family = shape.family
    if family.task != "causal_lm":
        raise InputError(
            f"{where}: scheme {config.scheme} is for decoders, which engines serve; {family.model_type} is none: use "
            "scheme none"
        )
    if family.tensors[f"{family.attention_output}.weight"][-1] == "hidden":
        raise InputError(
            f"{where}: {family.model_type} stores its matrices as (in, out), and ModelOpt writes them the other way "
            "round without saying so, which no engine reads: use scheme none"
        )
    if config.scheme == "int8" and family.experts is not None:
        raise InputError(
            f"{where}: scheme int8 does not take experts, which transformers holds as one module of three-dimensional "
            "weights; use fp8 or none"
        )


def _expert_modules(shape: ModelShape) -> tuple[str, ...]:
    return tuple(shape.spelled_out(shape.family.experts).values()) if shape.family.experts else ()


def _check_experts(shape: ModelShape, ignored: set[str], where: str) -> None:
    """ModelOpt holds the experts of a layer as one module."""
    for module in _expert_modules(shape):
        inside = [name for name in linear_modules(shape) if name.startswith(f"{module}.")]
        if 0 < len(apart := ignored.intersection(inside)) < len(inside):
            raise InputError(
                f"{where}: `ignore` leaves out {len(apart)} of the {len(inside)} matrices of {module}; ignore all of a "
                "layer's experts or none"
            )


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
    first = {name for name, place in shape.places.items() if place.layer == 0 and place.expert in (None, 0)}
    return tuple(name for name in linear_modules(shape) if f"{name}.weight" in first or name == HEAD)
