"""Open quantized checkpoints with plain transformers, right.

transformers opens a ModelOpt FP8 checkpoint without an error and computes wrong: it casts the FP8 codes and drops their
scales. Here the codes are multiplied by their scales while they are read, tensor by tensor, into a plain model:

    ModelOpt FP8              weight E4M3 (out, in) * weight_scale ()         activations: input_scale (), static
    compressed-tensors INT8   weight int8 (out, in) * weight_scale (out, 1)   activations: one scale a token, dynamic

`load_dequantized` stops there: the weights' error only. `load_fake_quantized` also rounds the inputs of the quantized
linears as an engine does, so quality can be measured where no engine runs. What remains different from an engine:

- products of codes are exact there, and here of values rounded to the model's dtype;
- vLLM rounds the FP8 codes of q, k, v and of gate, up once more, to the largest scale of what it fuses;
- the error of an FP8 KV cache is left out, since only engines read its scales.

Each linear agrees with vLLM 0.32's CPU kernels (INT8: the same codes, outputs equal to 4e-8 in float32), but whole
models do not bit for bit: a last bit that differs flips a rounding, and flips multiply over the layers. Distributions
agree as closely as quantization noise allows, texts need not.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.initialization import no_init_weights

from stillroom.errors import InputError
from stillroom.models.load import DTYPES, load_model, pick_device
from stillroom.models.shape import ModelShape, read_config, shape_of
from stillroom.models.weights import TensorEntry, tensor_entries
from stillroom.quantize.scheme import linear_modules, matches

E4M3_MAX = 448.0
INT8_MAX = 127
SMALLEST_TOKEN_SCALE = 1e-10
"""A token of zeros is divided by this instead of zero."""

WEIGHT_SCALE, INPUT_SCALE = ".weight_scale", ".input_scale"


@dataclass(frozen=True)
class Quantization:
    """What config.json says about how a checkpoint is quantized."""

    kind: Literal["none", "fp8", "int8"]
    modules: tuple[str, ...] = ()
    """The linear modules that are quantized."""
    kv_cache_fp8: bool = False


def read_quantization(model_dir: Path) -> Quantization:
    """How a checkpoint is quantized. Raises InputError for schemes that are not read here."""
    config = read_config(model_dir)
    described = config.get("quantization_config")
    if not isinstance(described, dict):
        if (model_dir / "hf_quant_config.json").exists():
            raise InputError(
                f"{model_dir} has hf_quant_config.json but no quantization_config in config.json; export it again"
            )
        return Quantization("none")
    kind = _kind(described)
    if kind is None:
        name = " ".join(str(described[k]) for k in ("quant_method", "quant_algo", "format") if described.get(k))
        raise InputError(
            f"{model_dir} is quantized as {name or 'something unknown'}, which is not read here; read: modelopt FP8 "
            "(per tensor), compressed-tensors int-quantized (INT8 weights per channel, activations per token)"
        )
    excluded = list(described.get("ignore") or [])
    modules = tuple(
        name for name in linear_modules(shape_of(config, str(model_dir))) if not any(matches(name, p) for p in excluded)
    )
    return Quantization(kind, modules, kv_cache_fp8=bool(described.get("kv_cache_scheme")))


def load_dequantized(model_dir: Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model with every weight multiplied out, in eval mode on `pick_device()`; plain checkpoints too.

    `dtype` is the checkpoint's own (that of its unquantized tensors) unless another is asked for. Activations are not
    rounded; see `load_fake_quantized`. Raises InputError for unknown schemes and for missing tensors or scales.
    """
    if read_quantization(model_dir).kind == "none":
        return load_model(model_dir, dtype=dtype)
    return _read_model(model_dir, dtype)[0]


def load_fake_quantized(model_dir: Path, *, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """The model as an engine computes it: weights multiplied out, inputs of quantized linears rounded on the way.

    For plain checkpoints the same as `load_model`. An FP8 KV cache is not imitated. Raises as `load_dequantized`.
    """
    quantization = read_quantization(model_dir)
    if quantization.kind == "none":
        return load_model(model_dir, dtype=dtype)
    model, input_scales = _read_model(model_dir, dtype)
    for name in quantization.modules:
        if quantization.kind == "fp8" and name not in input_scales:
            raise InputError(f"{model_dir}: {name}.input_scale is missing; export the model again")
    experts = _expert_names(shape_of(read_config(model_dir), str(model_dir)))
    for name in quantization.modules:
        if name in experts:
            continue
        rounding = _static_rounding(input_scales[name]) if quantization.kind == "fp8" else round_tokens_to_int8
        model.get_submodule(name).register_forward_pre_hook(_on_input(rounding))
    for module in dict.fromkeys(experts[name] for name in quantization.modules if name in experts):
        parent, _, leaf = module.rpartition(".")
        first = f"{module}.0"  # all experts of a layer share their input scales
        rounded = RoundedExperts(
            model.get_submodule(module),
            _static_rounding(input_scales[f"{first}.gate_proj"]),
            _static_rounding(input_scales[f"{first}.down_proj"]),
        )
        setattr(model.get_submodule(parent), leaf, rounded)
    return model


class RoundedExperts(nn.Module):
    """A layer's experts, as transformers holds them, with the inputs of both their matrices rounded."""

    def __init__(self, experts: Any, before_up: Callable[[Tensor], Tensor], before_down: Callable[[Tensor], Tensor]):
        super().__init__()
        self.experts = experts
        self.before_up, self.before_down = before_up, before_down

    def forward(self, hidden_ND: Tensor, chosen_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """N tokens, D hidden channels, K experts of each token. Returns (N, D)."""
        result_ND = torch.zeros_like(hidden_ND)
        rounded_ND = self.before_up(hidden_ND)
        for expert in sorted(set(chosen_NK.flatten().tolist())):
            tokens, places = torch.where(chosen_NK == expert)
            gate, up = nn.functional.linear(rounded_ND[tokens], self.experts.gate_up_proj[expert]).chunk(2, dim=-1)
            inner = self.before_down(self.experts.act_fn(gate) * up)
            outer = nn.functional.linear(inner, self.experts.down_proj[expert]) * weights_NK[tokens, places, None]
            result_ND.index_add_(0, tokens, outer.to(result_ND.dtype))
        return result_ND


def _expert_names(shape: ModelShape) -> dict[str, str]:
    """The module that holds it, for each expert's linear module."""
    if shape.family.experts is None:
        return {}
    modules = shape.spelled_out(shape.family.experts)
    return {
        name.removesuffix(".weight"): modules[place.layer]
        for name, place in shape.places.items()
        if place.expert is not None and place.layer is not None
    }


def round_to_e4m3(x: Tensor, scale: Tensor) -> Tensor:
    """x rounded to what FP8 E4M3 with this scale () holds; saturates instead of becoming NaN. Shape and dtype of x."""
    codes = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return (codes.float() * scale).to(x.dtype)


def round_tokens_to_int8(x: Tensor) -> Tensor:
    """x (..., tokens, channels) rounded to int8 with one symmetric scale for each token. Shape and dtype of x."""
    values = x.float()
    scale = (values.abs().amax(dim=-1, keepdim=True) / INT8_MAX).clamp(min=SMALLEST_TOKEN_SCALE)
    return ((values / scale).round().clamp(-INT8_MAX - 1, INT8_MAX) * scale).to(x.dtype)


def _static_rounding(scale: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda x: round_to_e4m3(x, scale.to(x.device))


def _on_input(rounding: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Any, ...]], tuple[Any, ...]]:
    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (rounding(arguments[0]), *arguments[1:])

    return hook


def _kind(described: dict[str, Any]) -> Literal["fp8", "int8"] | None:
    """The scheme of a quantization_config, or None when it is none of ours to the last detail."""
    method = described.get("quant_method")
    if method == "modelopt" and described.get("quant_algo") == "FP8":
        return "fp8"
    if method != "compressed-tensors" or described.get("format") != "int-quantized":
        return None
    groups = list((described.get("config_groups") or {}).values())
    if len(groups) != 1 or groups[0].get("targets") != ["Linear"]:
        return None
    weights, inputs = groups[0].get("weights") or {}, groups[0].get("input_activations") or {}
    as_expected = (
        weights.get("num_bits") == inputs.get("num_bits") == 8
        and weights.get("type") == inputs.get("type") == "int"
        and weights.get("symmetric") is inputs.get("symmetric") is True
        and weights.get("strategy") == "channel"
        and inputs.get("strategy") == "token"
        and inputs.get("dynamic") is True
    )
    return "int8" if as_expected else None


@torch.no_grad()
def _read_model(model_dir: Path, dtype: torch.dtype | None) -> tuple[PreTrainedModel, dict[str, Tensor]]:
    """The model with its weights multiplied out, and the input scales by module."""
    raw = read_config(model_dir)
    config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    del config.quantization_config
    own_dtype = DTYPES.get(str(raw.get("dtype") or raw.get("torch_dtype")), torch.bfloat16)
    with no_init_weights():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype or own_dtype)
    model.tie_weights()
    entries = tensor_entries(model_dir)
    _put_in(model, entries, model_dir)
    input_scales = {
        name.removesuffix(INPUT_SCALE): read_tensor(entries, name).float()
        for name in entries
        if name.endswith(INPUT_SCALE)
    }
    return model.to(pick_device()).eval(), input_scales


def _put_in(model: PreTrainedModel, entries: Mapping[str, TensorEntry], model_dir: Path) -> None:
    """Copy every tensor in, multiplied out. Experts lie one by one on disk and are joined in memory."""
    parts = _parts_of_experts(shape_of(read_config(model_dir), str(model_dir)))
    for name, parameter in model.named_parameters():
        for stored, place in parts.get(name, {name: ()}).items():
            if stored not in entries:
                raise InputError(f"{model_dir} lacks {stored}, which its config promises")
            slot = parameter[place]
            if entries[stored].shape != tuple(slot.shape):
                raise InputError(
                    f"{model_dir}: {stored} is {entries[stored].shape}; its config says {tuple(slot.shape)}"
                )
            slot.copy_(_value(entries, stored))


def _parts_of_experts(shape: ModelShape) -> dict[str, dict[str, tuple[int | slice, ...]]]:
    """For each parameter that joins experts: the tensors it is made of, and where each goes."""
    width = shape.moe_intermediate_size
    rows: dict[str, tuple[str, tuple[slice, ...]]] = {
        "gate_proj": ("gate_up_proj", (slice(0, width),)),
        "up_proj": ("gate_up_proj", (slice(width, 2 * width),)),
        "down_proj": ("down_proj", ()),
    }
    parts: dict[str, dict[str, tuple[int | slice, ...]]] = {}
    for name, module in _expert_names(shape).items():
        expert, leaf = name.removeprefix(f"{module}.").split(".")
        joined, part = rows[leaf]
        parts.setdefault(f"{module}.{joined}", {})[f"{name}.weight"] = (int(expert), *part)
    return parts


def _value(entries: Mapping[str, TensorEntry], name: str) -> Tensor:
    """A tensor, multiplied by its scale where it holds codes."""
    tensor = read_tensor(entries, name)
    if tensor.dtype not in (torch.float8_e4m3fn, torch.int8):
        return tensor
    scale_name = name.removesuffix(".weight") + WEIGHT_SCALE
    if scale_name not in entries:
        raise InputError(
            f"{entries[name].file}: {name} is quantized, but {scale_name} is missing; export the model again"
        )
    return tensor.float() * read_tensor(entries, scale_name).float()


def read_tensor(entries: Mapping[str, TensorEntry], name: str) -> Tensor:
    """One tensor of a checkpoint; a weight and its scale may lie in different files."""
    with safe_open(entries[name].file, framework="pt") as tensors:
        tensor: Tensor = tensors.get_tensor(name)
    return tensor
