"""The prune stage: check, look at calibration text where something must be chosen, cut the checkpoint, repair it.

With `drop_layers` and `repair: []` the dense model is never loaded and no text is read. All scores are kept in
importance.json beside the weights, and the search for a target in frontier.json, so that the report can show why each
layer went and what else could have been. With `backend: megatron` another program chooses and cuts; what it kept is
found out from what it wrote, and repaired all the same.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from typing import Any

import torch
from torch import Tensor

from stillroom.artifact import write_atomically
from stillroom.distill.data import calibration_windows, clear_documents
from stillroom.errors import EnvironmentCannot, InputError
from stillroom.machine import this_machine
from stillroom.models.load import load_tokenizer
from stillroom.models.shape import ModelShape
from stillroom.prune import megatron
from stillroom.prune.allowed import check_prune, reads_text
from stillroom.prune.explain import IMPORTANCE_FILE
from stillroom.prune.frontier import Frontier, write_frontier
from stillroom.prune.importance.scores import Importance
from stillroom.prune.lost import what_went
from stillroom.prune.pruner import Made, Pruner
from stillroom.prune.recover import NotRecovered, recover_cut
from stillroom.prune.search import search_shape
from stillroom.prune.surgery import source_shape
from stillroom.prune.targets import target_shape
from stillroom.recipe import Prune, Repair
from stillroom.stage import Job, StageResult

log = logging.getLogger(__name__)

SIZES = (
    "num_layers", "num_decoder_layers", "hidden_size", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "num_experts", "moe_intermediate_size",
)  # fmt: skip


def run(job: Job) -> StageResult:
    """Prune `job.source` as `job.config` says into `job.out_dir`."""
    config: Prune = job.config
    shape = source_shape(job.source.model_dir)
    if config.backend == "megatron":
        return _by_megatron(job, shape)
    check_prune(config, shape)
    target = None if config.target is not None else target_shape(config, shape)
    pruner = _pruner(job, shape)
    pruner.check_memory()
    frontier = None
    if target is None:
        assert config.target is not None
        made, frontier = search_shape(pruner, config.target, job.source.key, job.out_dir)
        write_frontier(frontier, job.out_dir)
    else:
        made = pruner.best(target, job.out_dir)
    scores = pruner.scores_of(made.shape)
    if scores:
        write_atomically(job.out_dir / IMPORTANCE_FILE, json.dumps(score_tables(scores)) + "\n")
    details = _chosen(pruner, made, frontier) | _details(pruner, made)
    _say(job, shape, made)
    return StageResult(tokens=pruner.windows_NT.numel() or None, details=details)


def _pruner(job: Job, shape: ModelShape) -> Pruner:
    """The model, with the text that the recipe needs."""
    windows_NT = _windows(job) if reads_text(job.config, shape) else torch.empty(0, 1, dtype=torch.long)
    return Pruner(job.config, shape, job.source.model_dir, windows_NT, job.scratch_dir, job.seed, job.progress)


def _windows(job: Job) -> Tensor:
    """Calibration text, (N, T). Raises InputError where it does not fill two windows."""
    calibration = job.config.calibration
    tokenizer = load_tokenizer(job.source.model_dir)
    windows_NT = calibration_windows(job, tokenizer, calibration.sequence_length, calibration.samples)
    if len(windows_NT) < 2:
        raise InputError(
            f"pruning needs two windows of {calibration.sequence_length} tokens, one to choose on and one kept apart; "
            "raise calibration.samples, lower calibration.sequence_length, or give more text"
        )
    if len(windows_NT) < calibration.samples:
        job.progress.log(
            f"calibration has {len(windows_NT)} windows of {windows_NT.shape[1]} tokens, all that the text gives of "
            f"the {calibration.samples} asked for"
        )
    return windows_NT


def _by_megatron(job: Job, shape: ModelShape) -> StageResult:
    """ModelOpt's own pruner, as a process, and what repair can do about its cut."""
    config: Prune = job.config
    megatron.require_image()
    text = job.scratch_dir / "calibration.jsonl"
    argv = megatron.command(
        config,
        shape,
        job.source.model_dir,
        job.out_dir,
        len(this_machine().gpus),
        script=megatron.find_script(),
        scores_dir=job.scratch_dir / "scores",
        calibration_file=text,
    )
    check_prune(config, shape)
    pruner = _pruner(job, shape)
    if pruner.why_no_search:
        _not_repaired(job, pruner.why_no_search)
    tokenizer = load_tokenizer(job.source.model_dir)
    rows = (document for document in clear_documents(job, tokenizer) if isinstance(document, str))
    megatron.write_calibration(rows, text)
    megatron.run_backend(argv, job.out_dir, job.scratch_dir / "megatron.log", log=job.progress.log)
    target = megatron.result_shape(config, shape, job.out_dir)
    details: dict[str, Any] = {"backend": "megatron"}
    try:
        cut = recover_cut(job.source.model_dir, shape, job.out_dir, target)
    except NotRecovered as reason:
        _not_repaired(job, f"what stayed cannot be told from the result: {reason}")
        return StageResult(details=details | {"not_recovered": str(reason)} | _sizes(shape, target))
    made = pruner.repair(cut, target, job.out_dir)
    _say(job, shape, made)
    return StageResult(tokens=pruner.windows_NT.numel() or None, details=details | _details(pruner, made))


def _not_repaired(job: Job, reason: str) -> None:
    """Say why, unless no repair is wanted. Raises EnvironmentCannot where the recipe names one."""
    asked: Repair = job.config.repair
    if asked.kinds not in ("auto", ()):
        raise EnvironmentCannot(
            f"repair {', '.join(asked.kinds)} cannot be done: {reason}; give repair: [] to do without"
        )
    if asked.kinds:
        job.progress.log(f"not repaired: {reason}")


def _say(job: Job, shape: ModelShape, made: Made) -> None:
    dropped = [i for i in range(shape.total_layers) if i not in made.cut.layers]
    line = f"pruned {shape.num_params:,} -> {made.shape.num_params:,} parameters"
    if dropped:
        line += f"; layers {dropped} went"
    if made.kl is not None and made.kl_cut is not None:
        line += f"; KL to the unpruned model {made.kl_cut:.4f}, repaired {made.kl:.4f} nats/token"
    job.progress.log(line)


def _chosen(pruner: Pruner, made: Made, frontier: Frontier | None) -> dict[str, Any]:
    """How it was chosen what goes."""
    scores = pruner.scores_of(made.shape)
    influence = scores.block_influence if scores else None
    return {
        "depth_importance": pruner.depth_method,
        "width_importance": pruner.config.width_importance,
        "block_influence": None if influence is None else _rounded(influence),
        "layer_kl": pruner.layer_costs(made.shape),
        "searched_shapes": len(frontier.candidates) if frontier else 0,
    }


def _details(pruner: Pruner, made: Made) -> dict[str, Any]:
    """What went, and what that cost, whoever cut it."""
    shape = pruner.shape
    return {
        "kept_layers": list(made.cut.layers),
        "dropped_layers": [i for i in range(shape.total_layers) if i not in made.cut.layers],
        "kl_cut": made.kl_cut,
        "kl": made.kl,
        "repairs": [
            {
                "layer": attempt.layer,
                "modules": list(attempt.modules),
                "kind": attempt.kind,
                "strength": attempt.strength,
                "kl_before": attempt.kl_before,
                "kl_after": attempt.kl_after,
                "kept": attempt.kept,
            }
            for attempt in made.attempts
        ],
        **what_went(pruner.scores_of(made.shape), shape, made.cut),
        **_sizes(shape, made.shape),
        "calibration_samples": len(pruner.windows_NT),
        "calibration_tokens": pruner.windows_NT.numel(),
    }


def _sizes(shape: ModelShape, target: ModelShape) -> dict[str, Any]:
    named = [size for size in SIZES if size != "num_key_value_heads" or not shape.family.one_key_value_head_a_head]
    before = {size: number for size in named if (number := getattr(shape, size))}
    after = {size: getattr(target, size) for size in before}
    return {
        "sizes_before": before,
        "sizes_after": after,
        "params_before": shape.num_params,
        "params_after": target.num_params,
        "params_saved_alone": {
            size: shape.num_params - _with_size(shape, size, after[size]).num_params
            for size in before
            if after[size] < before[size]
        },
    }


def _with_size(shape: ModelShape, size: str, number: int) -> ModelShape:
    if size == "num_attention_heads" and shape.family.one_key_value_head_a_head:
        return dataclasses.replace(shape, num_attention_heads=number, num_key_value_heads=number)
    changed: dict[str, Any] = {size: number}
    return dataclasses.replace(shape, **changed)


def score_tables(scores: Importance) -> dict[str, Any]:
    """Everything measured as lists, six significant digits: layers outermost, then channels, heads or groups."""
    return {
        "calibration_windows": scores.num_windows,
        "calibration_tokens": scores.num_tokens,
        **{method: _rounded(values) for method, values in scores.layers.items()},
        **{table: _rounded(values) for table, values in scores.tables().items()},
        "norm_shares": {module: _rounded(shares) for module, shares in scores.norm_shares.items()},
    }


def _rounded(values: Tensor) -> Any:
    """Nested lists of floats with six significant digits."""
    if values.ndim > 1:
        return [_rounded(row) for row in values]
    return [float(f"{value:.6g}") for value in values.tolist()]
