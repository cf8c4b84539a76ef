"""The quantize stage: calibrate with ModelOpt, write what engines take, and a card that says what was done.

The three schemes end in the same kind of directory: weights, config.json with TensorRT-LLM's top-level fields,
tokenizer and the other companions of the source, README.md. Everything that can be refused is refused from
config.json, before the weights are opened. One model is in memory: ModelOpt's export and ours both use up the one
that was calibrated."""

from __future__ import annotations

import importlib.metadata
import json
import logging
import shutil
import time
from pathlib import Path
from typing import Any

import torch
from modelopt.torch.export import export_hf_checkpoint
from transformers import PreTrainedModel

from stillroom.artifact import write_atomically
from stillroom.distill.data import calibration_windows
from stillroom.errors import InputError
from stillroom.export.card import CARD, card_of_job
from stillroom.export.checkpoint import copy_companions, finish_config
from stillroom.export.int8 import save_int8
from stillroom.models.load import load_model, load_tokenizer
from stillroom.models.shape import ModelShape, read_config, shape_of
from stillroom.models.weights import INDEX, tensor_entries, weight_files
from stillroom.quantize import calibrate
from stillroom.quantize.scheme import Selection, select_modules
from stillroom.quantize.smooth import ALPHA, smooth
from stillroom.recipe import Quantize
from stillroom.stage import Job, StageResult

log = logging.getLogger(__name__)


def run(job: Job) -> StageResult:
    """Quantize `job.source` into `job.out_dir`.

    Raises InputError when the scheme does not fit the model, when an `ignore` pattern matches nothing, or when the text
    does not fill a calibration window.
    """
    config: Quantize = job.config
    source_dir = job.source.model_dir
    began = time.monotonic()
    shape = source_shape(source_dir)
    tokens = None
    if config.scheme == "none":
        _copy_weights(source_dir, job.out_dir)
        details: dict[str, Any] = {}
    else:
        details, tokens = _quantize(job, shape, select_modules(shape, config, str(source_dir)))
    copy_companions(source_dir, job.out_dir)
    finish_config(job.out_dir)
    details = {
        "scheme": config.scheme,
        "weight_bytes_before": weight_bytes(source_dir),
        "weight_bytes_after": weight_bytes(job.out_dir),
        **details,
    }
    (job.out_dir / CARD).write_text(card_of_job(job, details), encoding="utf-8")
    job.progress.log(
        f"{config.scheme}: {details['weight_bytes_before']:,} -> {details['weight_bytes_after']:,} bytes of weights "
        f"in {time.monotonic() - began:.1f} s"
    )
    return StageResult(tokens=tokens, details=details)


def source_shape(model_dir: Path) -> ModelShape:
    """The shape of an unquantized checkpoint. Raises InputError for a quantized one."""
    config = read_config(model_dir)
    if "quantization_config" in config:
        raise InputError(f"{model_dir} is quantized already; quantize reads an unquantized model: name it as `source`")
    return shape_of(config, str(model_dir))


def weight_bytes(model_dir: Path) -> int:
    """Bytes of all tensors of a checkpoint."""
    return sum(entry.num_bytes for entry in tensor_entries(model_dir).values())


def _quantize(job: Job, shape: ModelShape, selection: Selection) -> tuple[dict[str, Any], int | None]:
    """Details of the result, and how many calibration tokens were read."""
    config: Quantize = job.config
    source_dir = job.source.model_dir
    windows_NT = None
    if calibrate.reads_text(config):
        wanted = config.calibration
        shape.check_length(wanted.sequence_length, "calibration.sequence_length")
        windows_NT = calibration_windows(job, load_tokenizer(source_dir), wanted.sequence_length, wanted.samples)
    model = load_model(source_dir)
    calibrate.calibrate(model, config, selection, windows_NT, job.progress)
    details: dict[str, Any] = {
        "modelopt": importlib.metadata.version("nvidia-modelopt"),
        "modules_quantized": len(selection.quantized),
        "modules_ignored": list(selection.ignored),
        "calibration_tokens": 0 if windows_NT is None else windows_NT.numel(),
    }
    if config.scheme == "fp8":
        _save_fp8(model, job.out_dir)
        details["kv_cache"] = config.kv_cache
    else:
        if config.smoothquant:
            input_amax = {name: calibrate.input_amax(model, name) for name in selection.quantized}
            details["modules_smoothed"] = smooth(model, shape, selection.quantized, input_amax)
            if left := len(selection.quantized) - details["modules_smoothed"]:
                job.progress.log(
                    f"SmoothQuant: {left} of {len(selection.quantized)} modules cannot be smoothed exactly"
                )
            details["smoothquant_alpha"] = ALPHA
            calibrate.recalibrate_weights(model)
        save_int8(model, selection, lambda name: calibrate.weight_amax(model, name), job.out_dir)
    return details, None if windows_NT is None else windows_NT.numel()


def _save_fp8(model: PreTrainedModel, out_dir: Path) -> None:
    """ModelOpt's unified checkpoint: config.json with quantization_config, and hf_quant_config.json for TensorRT-LLM.

    q, k, v and gate, up, which engines load as one matrix, come out with one input scale.
    """
    with calibrate.quiet(), torch.no_grad():
        export_hf_checkpoint(model, export_dir=out_dir)


def _copy_weights(source_dir: Path, out_dir: Path) -> None:
    for path in weight_files(source_dir):
        shutil.copyfile(path, out_dir / path.name)
    if (source_dir / INDEX).is_file():
        shutil.copyfile(source_dir / INDEX, out_dir / INDEX)
    write_atomically(out_dir / "config.json", json.dumps(read_config(source_dir), indent=2) + "\n")
