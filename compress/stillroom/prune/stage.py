"""The prune stage: check, look at calibration text where something must be chosen, cut the checkpoint file by file.

The dense model is in memory only while importance is measured; with `drop_layers` alone it is never loaded. All
scores are kept in importance.json beside the weights, so that the report can show why each layer went.
"""

from __future__ import annotations

import gc
import json
import logging
from typing import Any

import torch

from stillroom.artifact import write_atomically
from stillroom.distill.data import calibration_windows
from stillroom.errors import InputError
from stillroom.models.load import load_model, load_tokenizer
from stillroom.models.shape import ModelShape
from stillroom.prune.cut import Cut
from stillroom.prune.depth import keep_layers
from stillroom.prune.importance.measure import measure
from stillroom.prune.importance.names import Wanted
from stillroom.prune.importance.scores import Importance
from stillroom.prune.surgery import cut_checkpoint, source_shape
from stillroom.prune.targets import target_shape
from stillroom.prune.width import keep_heads, strongest
from stillroom.recipe import Prune
from stillroom.stage import Job, StageResult

log = logging.getLogger(__name__)

IMPORTANCE_FILE = "importance.json"
SIZES = ("num_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


def run(job: Job) -> StageResult:
    """Prune `job.source` as `job.config` says into `job.out_dir`."""
    config: Prune = job.config
    source_dir = job.source.model_dir
    shape = source_shape(source_dir)
    target = target_shape(config, shape)
    wanted = what_to_measure(config, shape, target)
    scores = _measure(job, shape, wanted) if wanted else None
    cut = choose(config, shape, target, scores)

    def report(done: int, total: int) -> None:
        job.progress.update(done, total, "tensors")

    shares = scores.norm_shares if scores else None
    target = cut_checkpoint(source_dir, shape, cut, job.out_dir, norm_shares=shares, progress=report)
    details = _details(shape, target, cut, scores)
    if scores:
        write_atomically(job.out_dir / IMPORTANCE_FILE, json.dumps(score_tables(scores)) + "\n")
    job.progress.log(
        f"pruned {shape.num_params:,} -> {target.num_params:,} parameters"
        + (f"; layers {details['dropped_layers']} went" if details["dropped_layers"] else "")
    )
    return StageResult(tokens=scores.num_tokens if scores else None, details=details)


def what_to_measure(config: Prune, shape: ModelShape, target: ModelShape) -> frozenset[Wanted]:
    """What there is to choose; nothing for given layers and for sizes that stay."""
    chosen: dict[Wanted, bool] = {
        "layers": target.num_layers < shape.num_layers and config.drop_layers is None,
        "ffn": target.intermediate_size < shape.intermediate_size,
        "heads": target.num_attention_heads < shape.num_attention_heads,
        "hidden": target.hidden_size < shape.hidden_size,
    }
    return frozenset(what for what, is_cut in chosen.items() if is_cut)


def choose(config: Prune, shape: ModelShape, target: ModelShape, scores: Importance | None) -> Cut:
    """What stays, from the scores; an axis that keeps its size is left alone."""
    if config.drop_layers is not None:
        layers = tuple(i for i in range(shape.num_layers) if i not in config.drop_layers)
    elif scores is not None and scores.block_influence is not None:
        layers = keep_layers(scores.block_influence.tolist(), target.num_layers)
    else:
        layers = tuple(range(shape.num_layers))
    if scores is None:
        return Cut(layers)
    ffn = hidden = None
    if scores.ffn is not None:
        ffn = {i: strongest(scores.ffn[i].tolist(), target.intermediate_size) for i in layers}
    if scores.hidden is not None:
        hidden = strongest(scores.hidden.tolist(), target.hidden_size)
    groups, heads = _choose_heads(shape, target, scores, layers)
    return Cut(layers, hidden=hidden, ffn=ffn, heads=heads, kv_groups=groups)


def _choose_heads(
    shape: ModelShape, target: ModelShape, scores: Importance, layers: tuple[int, ...]
) -> tuple[dict[int, tuple[int, ...]] | None, dict[int, tuple[int, ...]] | None]:
    """KV groups first, then the query heads in each group that stays, by layer."""
    if scores.heads is None or scores.kv_groups is None:
        return None, None
    groups = {i: strongest(scores.kv_groups[i].tolist(), target.num_key_value_heads) for i in layers}
    heads = {
        i: keep_heads(
            scores.heads[i].tolist(),
            groups[i],
            num_kv_groups=shape.num_key_value_heads,
            heads_per_group=target.num_attention_heads // target.num_key_value_heads,
        )
        for i in layers
    }
    return groups, heads


def _measure(job: Job, shape: ModelShape, wanted: frozenset[Wanted]) -> Importance:
    """Load the dense model, measure, and free it."""
    config: Prune = job.config
    calibration = config.calibration
    longest = shape.config.get("max_position_embeddings")
    if longest is not None and calibration.sequence_length > longest:
        raise InputError(
            f"calibration.sequence_length {calibration.sequence_length} is beyond the model's {longest} positions; "
            f"give at most {longest}"
        )
    tokenizer = load_tokenizer(job.source.model_dir)
    windows = calibration_windows(job, tokenizer, calibration.sequence_length, calibration.samples)
    short = (
        f", all that the text gives of the {calibration.samples} asked for"
        if len(windows) < calibration.samples
        else ""
    )
    job.progress.log(
        f"measuring {', '.join(sorted(wanted))} on {len(windows)} windows of {windows.shape[1]} tokens{short}"
    )
    model = load_model(job.source.model_dir)

    def report(done: int, total: int) -> None:
        job.progress.update(done, total, "windows")

    scores = measure(model, shape, windows, batch_size=calibration.batch_size, wanted=wanted, progress=report)
    del model
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return scores


def _details(shape: ModelShape, target: ModelShape, cut: Cut, scores: Importance | None) -> dict[str, Any]:
    influence = scores.block_influence if scores else None
    return {
        "kept_layers": list(cut.layers),
        "dropped_layers": [i for i in range(shape.num_layers) if i not in cut.layers],
        "block_influence": None if influence is None else _rounded(influence),
        "sizes_before": {size: getattr(shape, size) for size in SIZES},
        "sizes_after": {size: getattr(target, size) for size in SIZES},
        "params_before": shape.num_params,
        "params_after": target.num_params,
        "calibration_samples": scores.num_windows if scores else 0,
        "calibration_tokens": scores.num_tokens if scores else 0,
    }


def score_tables(scores: Importance) -> dict[str, Any]:
    """Everything measured as lists, six significant digits: layers outermost, then channels, heads or groups."""
    tables = ("block_influence", "ffn", "heads", "kv_groups", "hidden")
    return {
        "calibration_windows": scores.num_windows,
        "calibration_tokens": scores.num_tokens,
        **{table: _rounded(values) for table in tables if (values := getattr(scores, table)) is not None},
        "norm_shares": {module: _rounded(shares) for module, shares in scores.norm_shares.items()},
    }


def _rounded(values: torch.Tensor) -> Any:
    """Nested lists of floats with six significant digits."""
    if values.ndim > 1:
        return [_rounded(row) for row in values]
    return [float(f"{value:.6g}") for value in values.tolist()]
