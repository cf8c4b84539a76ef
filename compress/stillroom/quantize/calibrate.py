"""Calibration with NVIDIA Model Optimizer: which ranges weights and activations take, by the maxima seen on text.

ModelOpt wraps each linear module and watches it while calibration text runs through. Its default configs would leave
the choice of modules to name patterns of its own, and a config without them quantizes the embeddings too; here
everything is off first and exactly the selected linears are switched on.

The maxima of an FP8 KV cache are calibrated as well (ModelOpt's `fp8_cast` preset writes no scales), in every layer,
also where the layer's linears are ignored: engines hold one cache dtype for the whole model."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator
from typing import Any

import modelopt.torch.quantization as mtq
import torch
from torch import Tensor, nn

from stillroom.quantize.scheme import Selection
from stillroom.recipe import Quantize
from stillroom.stage import Progress

log = logging.getLogger(__name__)

E4M3 = {"num_bits": (4, 3), "axis": None}
INT8_PER_ROW = {"num_bits": 8, "axis": 0}
INT8_PER_CHANNEL = {"num_bits": 8, "axis": -1}

# N windows, B windows in a forward pass, T tokens


def reads_text(config: Quantize) -> bool:
    """Whether calibration runs text. FP8 has static activation scales and SmoothQuant weighs channels; plain INT8
    scales activations per token when serving, so its weights are all that it needs."""
    return config.scheme == "fp8" or config.smoothquant


def modelopt_config(config: Quantize, selection: Selection) -> dict[str, Any]:
    """What `mtq.quantize` takes: `quant_cfg` is an ordered list, later entries override (since ModelOpt 0.44)."""
    weights, inputs = (E4M3, E4M3) if config.scheme == "fp8" else (INT8_PER_ROW, INT8_PER_CHANNEL)
    entries: list[dict[str, Any]] = [
        {"quantizer_name": "*", "enable": False},
        {"quantizer_name": "*weight_quantizer", "parent_class": "nn.Linear", "cfg": weights},
    ]
    if reads_text(config):
        entries.append({"quantizer_name": "*input_quantizer", "parent_class": "nn.Linear", "cfg": inputs})
    for module in selection.experts:  # not an nn.Linear: a weight quantizer for each expert, inputs share one
        entries.append({"quantizer_name": f"{module}.*_weight_quantizers.*", "cfg": weights})
        entries.append({"quantizer_name": f"{module}.*_input_quantizer", "cfg": inputs})
    entries += [{"quantizer_name": f"{name}.*_quantizer", "enable": False} for name in selection.ignored]
    if config.kv_cache == "fp8":
        entries.append({"quantizer_name": "*[kv]_bmm_quantizer", "cfg": E4M3})
    return {"quant_cfg": entries, "algorithm": "max"}


def calibrate(
    model: nn.Module, config: Quantize, selection: Selection, windows_NT: Tensor | None, progress: Progress
) -> None:
    """Insert quantizers into `model` and set their ranges. `windows_NT` may be None where no text is read."""

    @torch.inference_mode()
    def run_text(calibrated: nn.Module) -> None:
        assert windows_NT is not None
        device = next(calibrated.parameters()).device
        done = 0
        for ids_BT in torch.split(windows_NT, config.calibration.batch_size):
            calibrated(ids_BT.to(device), use_cache=False, logits_to_keep=1)
            done += len(ids_BT)
            progress.update(done, len(windows_NT), "windows")

    with quiet():
        mtq.quantize(model, modelopt_config(config, selection), run_text if reads_text(config) else None)


def recalibrate_weights(model: nn.Module) -> None:
    """Take the maxima again after weights were changed; activations are not looked at."""
    with quiet(), torch.no_grad():
        mtq.calibrate(model, algorithm="max")


def weight_amax(model: nn.Module, name: str) -> Tensor:
    """max|w| of each row of a calibrated INT8 weight, shape (out, 1), float32."""
    return _amax(model, name, "weight_quantizer").view(-1, 1)


def input_amax(model: nn.Module, name: str) -> Tensor:
    """max|x| of each input channel over the calibration text, shape (in,), float32."""
    return _amax(model, name, "input_quantizer").flatten()


def _amax(model: nn.Module, name: str, quantizer: str) -> Tensor:
    amax = model.get_submodule(f"{name}.{quantizer}").amax
    assert isinstance(amax, Tensor), f"{name}.{quantizer} is not calibrated"
    return amax.detach().float()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """ModelOpt prints to stdout, which belongs to our answer and to `--json` events; its lines go to the debug log."""
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            yield
    finally:
        for line in printed.getvalue().splitlines():
            log.debug("modelopt: %s", line)
