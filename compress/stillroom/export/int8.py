"""Write INT8 W8A8 as compressed-tensors, `int-quantized`: the form in which stock vLLM takes it.

vLLM 0.32 refuses ModelOpt's own INT8 exports, yet has kernels for these numbers on CPU (oneDNN) and GPU (CUTLASS):
weights int8 with one symmetric scale for each output channel, activations scaled for each token while serving, so
nothing about them is stored. A quantized linear holds

    NAME.weight        int8, (out, in)
    NAME.weight_scale  (out, 1), in the checkpoint's dtype

The scale is rounded to its stored dtype before the weight is divided by it, so that what readers multiply is what was
divided by; rounding the scale afterwards would shift whole channels by up to 0.4% in bfloat16. float16 checkpoints
store float32 scales: amax / 127 of small weights would fall among float16's subnormal numbers.

The config's fields are those of compressed-tensors 0.17 (vLLM 0.32's), which later versions read too.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillroom.artifact import write_atomically
from stillroom.quantize.scheme import Selection

INT8_MAX = 127
"""Symmetric: -128 is not used."""

MAX_SHARD_SIZE = "5GB"


@torch.no_grad()
def save_int8(
    model: PreTrainedModel, selection: Selection, weight_amax: Callable[[str], Tensor], out_dir: Path
) -> None:
    """Write `model` with the selected linears as int8. Their weights are replaced one by one, so the model is used up.

    `weight_amax` gives max|w| of each row of a module's weight, shape (out, 1).
    """
    names = [name for name, _ in model.named_parameters()]  # without what calibration added; a tied head is not in it
    scales: dict[str, Tensor] = {}
    for name in selection.quantized:
        module = model.get_submodule(name)
        codes, scales[f"{name}.weight_scale"] = quantize_rows(module.weight, weight_amax(name))
        module.weight = nn.Parameter(codes, requires_grad=False)
    tensors = {name: model.get_parameter(name).detach() for name in names}
    model.save_pretrained(out_dir, state_dict=tensors | scales, max_shard_size=MAX_SHARD_SIZE)
    config_path = out_dir / "config.json"
    config = json.loads(config_path.read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_config(selection)
    write_atomically(config_path, json.dumps(config, indent=2) + "\n")


def quantize_rows(weight: Tensor, amax: Tensor) -> tuple[Tensor, Tensor]:
    """int8 codes (out, in) and scales (out, 1) of a weight (out, in) whose rows reach `amax` (out, 1).

    A row of zeros gets scale 1: engines want positive ones.
    """
    dtype = torch.float32 if weight.dtype == torch.float16 else weight.dtype
    exact = torch.where(amax > 0, amax.float() / INT8_MAX, 1.0)
    scale = exact.to(dtype)
    codes = (weight.float() / scale.float()).round().clamp(-INT8_MAX, INT8_MAX)
    return codes.to(torch.int8), scale


def quantization_config(selection: Selection) -> dict[str, Any]:
    """What config.json says about it."""
    shared = {"num_bits": 8, "type": "int", "symmetric": True}
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {**shared, "strategy": "channel", "dynamic": False},
                "input_activations": {**shared, "strategy": "token", "dynamic": True},
            }
        },
        "ignore": list(selection.ignored),
    }
