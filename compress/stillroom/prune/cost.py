"""What a shape costs to serve: parameters, memory, and the speed that a roofline of the hardware allows.

Parameters are exact. Memory is weights in the served format plus keys and values at the model's true head_dim, which
stays what it was when hidden channels or heads are cut. Speed is a roofline (Williams et al., Communications of the ACM
52(4), 2009): a decode step runs its parts one after the other, and each part takes the longer of moving its bytes and
computing its operations,

    step = sum over parts of max(bytes / bandwidth, operations / peak) + all-reduces

    linear layers   every weight once a step, whatever the batch;        2 operations a weight that a sequence uses
                    of experts those that some sequence of it chose
    attention       keys and values of each sequence                     4 x query channels x tokens seen
    output head     once a step, in 16 bits; tied or not                 2 operations a weight and sequence
    norms, biases   read once

The embedding is a lookup of one row a sequence and costs nothing. A step's bytes over the bandwidth alone is the
ceiling: a measurement above it is an error of measurement. What an engine adds (launches, scheduling, sampling) is not
in the roofline; correction.py fits it to measured points. Nothing here imports torch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field

from stillroom.errors import InputError
from stillroom.models.family import EXPERT, LAYER
from stillroom.models.shape import ModelShape
from stillroom.recipe import Target

HARDWARE_FILE = Path(__file__).with_name("hardware.yaml")
GB = 1e9

Format = Literal["bf16", "fp8", "int8", "nvfp4"]
"""What the linear layers compute in."""

NVFP4_BYTES = 0.5 + 1 / 16
"""Four bits and one FP8 scale for each 16 weights."""
SCHEME_BYTES = {"none": 2.0, "fp8": 1.0, "int8": 1.0, "nvfp4": NVFP4_BYTES}
"""Of a linear layer's weight."""
FULL_BYTES = 2
"""Of every other weight: engines serve in 16 bits, checkpoints that store 32 too."""
KV_BYTES = {"none": 2, "fp8": 1}
ACTIVATION_BYTES = 2


class Hardware(BaseModel):
    """One GPU, or the CPU of this machine."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    memory_gb: float = Field(gt=0)
    bandwidth_gb_s: float = Field(gt=0)
    tflops: dict[Format, float]
    """Dense peak by format; an absent one cannot be computed."""
    interconnect_gb_s: float | None = None
    """To its neighbours, both directions together; None: it has none."""


@dataclass(frozen=True)
class Load:
    """What is served and how: all that costs depend on beside the shape and the hardware."""

    batch: int = 1
    """Sequences decoded together."""
    context: int = 4096
    """Tokens in each sequence's KV cache."""
    scheme: str = "none"
    kv_cache: str = "none"
    tensor_parallel: int = 1


@dataclass(frozen=True)
class Costs:
    """Of one shape; speeds are None where no hardware was named."""

    params: int
    memory_gb: float
    """On each GPU: weights and KV cache."""
    latency_ms: float | None = None
    """Between two output tokens of a sequence."""
    throughput: float | None = None
    """Output tokens per second of all sequences together."""


@dataclass(frozen=True)
class Part:
    """One part of a step on one GPU."""

    name: str
    read_bytes: float
    operations: float
    format: Format


def load_of(target: Target) -> Load:
    """The load that a recipe's target names."""
    return Load(target.batch, target.context, target.scheme, target.kv_cache, target.tensor_parallel)


@functools.cache
def known_hardware() -> dict[str, Hardware]:
    """The GPUs of hardware.yaml, by name."""
    rows: dict[str, Any] = yaml.safe_load(HARDWARE_FILE.read_text(encoding="utf-8"))
    return {name: Hardware.model_validate(row) for name, row in rows.items()}


def check_load(load: Load, name: str, hardware: Hardware, shape: ModelShape) -> None:
    """Raise InputError where a speed cannot be priced: the hardware has no unit for the scheme or no neighbours for
    tensor parallelism, or the model does not decode as a stack of its own."""
    if shape.family.task != "causal_lm":
        raise InputError(
            f"latency_ms and throughput price the decode steps of decoder-only models, and {shape.family.model_type} "
            "is none; give params or memory_gb, without hardware"
        )
    wanted = _format(load)
    if wanted not in hardware.tflops:
        able = [n for n, each in known_hardware().items() if wanted in each.tflops]
        raise InputError(
            f"{name} does not compute {wanted}; it has {', '.join(hardware.tflops)}"
            + (f". Use another scheme, or hardware with it: {', '.join(able)}" if able else "; use another scheme")
        )
    if load.tensor_parallel > 1 and hardware.interconnect_gb_s is None:
        raise InputError(f"tensor_parallel {load.tensor_parallel} on {name}, which has no neighbours; give 1")


def weight_gb(shape: ModelShape, scheme: str) -> float:
    """GB of all weights: linear layers in the scheme; embeddings, head and norms in 16 bits."""
    linear = shape.num_linear_params
    return (linear * SCHEME_BYTES[scheme] + (shape.num_params - linear) * FULL_BYTES) / GB


def cached_tokens(shape: ModelShape, context: int) -> float:
    """Tokens that a layer keeps keys and values of, averaged over the layers: sliding layers keep their window.

    Layers that a depth cut has not chosen yet count in the dense model's proportion.
    """
    window: int | None = shape.config.get("sliding_window")
    if not window:
        return context
    if "layer_types" not in shape.family.per_layer_lists:
        return min(context, window)
    kinds: list[str] = shape.config.get("layer_types") or ["full_attention"]
    sliding = kinds.count("sliding_attention") / len(kinds)
    return sliding * min(context, window) + (1 - sliding) * context


def kv_gb(shape: ModelShape, load: Load) -> float:
    """GB of keys and values of the whole batch; an encoder-decoder keeps as much again of its input."""
    per_token = shape.kv_bytes_per_token(KV_BYTES[load.kv_cache]) * (2 if shape.family.decoder else 1)
    return per_token * cached_tokens(shape, load.context) * load.batch / GB


def memory_gb(shape: ModelShape, load: Load) -> float:
    """GB on each GPU. Where there are fewer KV heads than GPUs, each keeps a copy of one."""
    shards = min(load.tensor_parallel, shape.num_key_value_heads)
    return weight_gb(shape, load.scheme) / load.tensor_parallel + kv_gb(shape, load) / shards


def decode_parts(shape: ModelShape, load: Load) -> list[Part]:
    """The parts of one decode step on each GPU."""
    experts, head = shape.num_expert_params, shape.vocab_size * shape.hidden_size
    always = shape.num_linear_params - experts
    read = always + experts * _chosen_share(shape, load.batch)
    used = always + experts * (shape.num_experts_per_token / shape.num_experts if experts else 0)
    rest = shape.params_of(lambda pattern: LAYER in pattern and EXPERT not in pattern and not shape.is_linear(pattern))
    gpus = load.tensor_parallel
    kv_shards = min(gpus, shape.num_key_value_heads)
    return [
        Part("linear", read * SCHEME_BYTES[load.scheme] / gpus, 2 * used * load.batch / gpus, _format(load)),
        Part("attention", kv_gb(shape, load) * GB / kv_shards, _attention_operations(shape, load) / gpus, "bf16"),
        Part("head", head * FULL_BYTES / gpus, 2 * head * load.batch / gpus, "bf16"),
        Part("norms", rest * FULL_BYTES, 0, "bf16"),
    ]


def decode_ms(shape: ModelShape, load: Load, hardware: Hardware) -> float:
    """Milliseconds of one decode step by the roofline."""
    reduced = _all_reduce_s(shape, load.batch, load, hardware)
    return 1e3 * (sum(_seconds(part, hardware) for part in decode_parts(shape, load)) + reduced)


def decode_ceiling_tok_s(shape: ModelShape, load: Load, hardware: Hardware) -> float:
    """Output tokens per second that the bandwidth alone allows: batch x bandwidth / bytes of a step."""
    step_bytes = sum(part.read_bytes for part in decode_parts(shape, load))
    return load.batch * hardware.bandwidth_gb_s * GB / step_bytes


def prefill_ms(shape: ModelShape, load: Load, hardware: Hardware) -> float:
    """Milliseconds to read one prompt of `load.context` tokens; only its last token goes through the head."""
    one = Load(1, load.context, load.scheme, load.kv_cache, load.tensor_parallel)
    linear, attention, head, norms = decode_parts(shape, one)
    # a token sees half of the prompt on average, or a window that is soon full
    seen = min(load.context / 2, cached_tokens(shape, load.context)) / cached_tokens(shape, load.context)
    read = linear.read_bytes * _read_share(shape, load.context)
    many = [
        Part("linear", read, linear.operations * load.context, linear.format),
        Part("attention", attention.read_bytes, attention.operations * load.context * seen, attention.format),
        head,
        norms,
    ]
    return 1e3 * (sum(_seconds(part, hardware) for part in many) + _all_reduce_s(shape, load.context, load, hardware))


def costs_of(shape: ModelShape, load: Load, hardware: Hardware | None = None) -> Costs:
    """Everything that the roofline says of a shape; without hardware, its size alone."""
    if hardware is None:
        return Costs(shape.num_params, memory_gb(shape, load))
    step_ms = decode_ms(shape, load, hardware)
    return Costs(
        params=shape.num_params,
        memory_gb=memory_gb(shape, load),
        latency_ms=step_ms,
        throughput=1e3 * load.batch / step_ms,
    )


def _seconds(part: Part, hardware: Hardware) -> float:
    peak = hardware.tflops[part.format] * 1e12
    return max(part.read_bytes / (hardware.bandwidth_gb_s * GB), part.operations / peak)


def _read_share(shape: ModelShape, tokens: int) -> float:
    """Linear weights that so many tokens read, over what one reads."""
    experts = shape.num_expert_params
    always = shape.num_linear_params - experts
    return (always + experts * _chosen_share(shape, tokens)) / (always + experts * _chosen_share(shape, 1))


def _chosen_share(shape: ModelShape, tokens: int) -> float:
    """Of a layer's experts, the share that at least one of so many tokens is expected to choose, at even routing."""
    if not shape.num_experts:
        return 0.0
    return 1.0 - (1.0 - shape.num_experts_per_token / shape.num_experts) ** tokens


def _attention_operations(shape: ModelShape, load: Load) -> float:
    """Scores and weighted sums: two operations each for every query channel and token seen."""
    query = shape.num_attention_heads * shape.head_dim
    return 4 * shape.num_layers * query * cached_tokens(shape, load.context) * load.batch


def _all_reduce_s(shape: ModelShape, tokens: int, load: Load, hardware: Hardware) -> float:
    """Two all-reduces a layer by a ring: each GPU sends 2 (n - 1) / n of the bytes one way."""
    gpus = load.tensor_parallel
    if gpus == 1:
        return 0.0
    assert hardware.interconnect_gb_s is not None
    sent = 2 * (gpus - 1) / gpus * tokens * shape.hidden_size * ACTIVATION_BYTES
    return 2 * shape.num_layers * sent / (hardware.interconnect_gb_s / 2 * GB)


def _format(load: Load) -> Format:
    formats: dict[str, Format] = {"none": "bf16", "fp8": "fp8", "int8": "int8", "nvfp4": "nvfp4"}
    return formats[load.scheme]
