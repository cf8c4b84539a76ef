"""The distill stage: the pruned student learns the unpruned teacher's next-token distributions, and keeps its form.

Everything that can be wrong is looked at before the first step: tokenizers, sizes, text, disk. Beside the training text
a few windows of the same blend are kept apart; KL to the teacher and top-1 agreement with it on them, before and after,
are in the details, whatever the training loss. They say whether training worked, not how good the model is: that is
measured on held-out text, which this stage never sees.

With `teacher_cache` the teacher runs before the student is loaded, once, and is not in memory while the student trains;
it is loaded again for the windows kept apart, before and after.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillroom.artifact import write_atomically
from stillroom.distill.breadth import narrow
from stillroom.distill.closeness import Closeness, closeness
from stillroom.distill.data import contamination_of, decontamination_details, packed_windows
from stillroom.distill.decontaminate import Contamination
from stillroom.distill.packing import Windows
from stillroom.distill.teacher_cache import TeacherCache, open_cache, write_cache
from stillroom.distill.train import BYTES_PER_PARAM, Point, Student, train
from stillroom.errors import EnvironmentCannot, InputError
from stillroom.export.checkpoint import save_checkpoint
from stillroom.models.load import load_model, load_tokenizer
from stillroom.models.shape import ModelShape, read_config, require_decoder, shape_of
from stillroom.recipe import Distill
from stillroom.stage import Job, StageResult
from stillroom.text import check_text

LOSS_FILE = "loss.json"

VALIDATION_WINDOWS = 8
"""Kept apart from training when there are four times as many."""


def run(job: Job) -> StageResult:
    """Distill `job.source` from `job.dense` on the job's text."""
    config: Distill = job.config
    student_dir, teacher_dir = job.source.model_dir, job.dense.model_dir
    shape, teacher_shape = (shape_of(read_config(path), str(path)) for path in (student_dir, teacher_dir))
    tokenizer = load_tokenizer(student_dir)
    _check(job, shape, teacher_shape, tokenizer, load_tokenizer(teacher_dir))
    clear_of = contamination_of(job.evaluated, tokenizer)
    passes: dict[str, int] = {}
    windows, validation = _windows(job, tokenizer, clear_of, passes)
    dropped = decontamination_details(clear_of, job)
    epochs = config.num_steps * config.batch_size / len(windows)
    warnings = narrow(job.text, {label: number * max(epochs, 1.0) for label, number in passes.items()})
    for warning in warnings:
        job.progress.log(f"warning: {warning}")
    job.progress.log(
        f"{config.num_steps} steps of {config.batch_size} x {config.sequence_length} tokens from {len(windows)} windows"
    )

    teacher = load_teacher(job) if config.teacher_cache is None else _written_cache(job, windows, tokenizer, shape)
    model = load_model(student_dir)
    dtype = model.dtype
    student = Student(model)
    before = _validate(job, student, teacher, validation)
    history = train(
        student, teacher, windows, config, seed=job.seed, scratch_dir=job.scratch_dir, progress=job.progress
    )
    after = _validate(job, student, teacher, validation)
    model.to(dtype)
    student.publish()
    save_checkpoint(model, student_dir, job.out_dir)
    _save_curve(job.out_dir / LOSS_FILE, history)
    return StageResult(
        tokens=history[-1].tokens,
        details=_details(history, len(windows))
        | _validated(before, "before")
        | _validated(after, "after")
        | {"decontamination": dropped, "warnings": warnings}
        | _cached(teacher, windows),
    )


def _check(
    job: Job,
    shape: ModelShape,
    teacher_shape: ModelShape,
    tokenizer: PreTrainedTokenizerBase,
    teacher_tokenizer: PreTrainedTokenizerBase,
) -> None:
    config: Distill = job.config
    require_decoder(shape, "distillation", "leave the stage out")
    if shape.vocab_size != teacher_shape.vocab_size:
        raise InputError(
            f"the student has {shape.vocab_size} tokens, the teacher {teacher_shape.vocab_size}; "
            "distributions over different vocabularies cannot be compared"
        )
    if tokenizer.get_vocab() != teacher_tokenizer.get_vocab():
        raise InputError(
            f"the tokenizers of student ({job.source.model_dir}) and teacher ({job.dense.model_dir}) differ; "
            "a student is distilled from the model it was cut from"
        )
    shape.check_length(config.sequence_length, "sequence_length")
    for source in job.text:
        check_text(source)
    # the checkpoint that is being written beside the one before, and the result
    needed = 2 * BYTES_PER_PARAM * shape.num_params + shape.weight_bytes("float32")
    free = shutil.disk_usage(job.scratch_dir).free
    if free < needed:
        raise EnvironmentCannot(
            f"distillation checkpoints need {needed / 1e9:.1f} GB in {job.scratch_dir}, "
            f"{free / 1e9:.1f} GB are free; make room"
        )


def _windows(
    job: Job, tokenizer: PreTrainedTokenizerBase, clear_of: Contamination | None, passes: dict[str, int]
) -> tuple[Windows, Windows]:
    """Windows to train on and windows kept apart; the latter may be none. `clear_of` and `passes` are told of it."""
    config: Distill = job.config
    wanted = config.num_steps * config.batch_size + VALIDATION_WINDOWS
    length = config.sequence_length
    windows = packed_windows(
        job.text, job.inputs, tokenizer, length, wanted, seed=job.seed, clear_of=clear_of, passes=passes
    )
    if not config.document_masks:
        windows = Windows(windows.ids)
    apart = VALIDATION_WINDOWS if len(windows) >= 4 * VALIDATION_WINDOWS else 0
    return windows[: len(windows) - apart], windows[len(windows) - apart :]


def load_teacher(job: Job) -> PreTrainedModel:
    return load_model(job.dense.model_dir).requires_grad_(False)


def _written_cache(job: Job, windows: Windows, tokenizer: PreTrainedTokenizerBase, shape: ModelShape) -> TeacherCache:
    """What the teacher says of the windows, on disk; it is in memory while something is missing there."""
    config: Distill = job.config
    cache = open_cache(config, windows, job.dense.model_dir, tokenizer, shape.vocab_size, seed=job.seed)
    was = "written" if cache.missing() else "reused"
    if cache.missing():
        write_cache(cache, load_teacher(job), windows, config, seed=job.seed, progress=job.progress)
    job.progress.log(
        f"teacher cache {was}: {cache.num_bytes() / 1e6:.1f} MB, {cache.num_bytes() / windows.ids.numel():.1f} bytes a "
        f"token, in {cache.path}"
    )
    return cache


def _validate(
    job: Job, student: Student, teacher: PreTrainedModel | TeacherCache, validation: Windows
) -> Closeness | None:
    """A cached teacher is loaded for it: a part of what it says is no measure."""
    if not len(validation):
        return None
    whole = load_teacher(job) if isinstance(teacher, TeacherCache) else teacher
    return closeness(student.model, whole, validation, job.config)


def _validated(found: Closeness | None, when: str) -> dict[str, float | None]:
    return {
        f"validation_kl_{when}": found.kl if found else None,
        f"validation_agreement_{when}": found.agreement if found else None,
    }


def _cached(teacher: PreTrainedModel | TeacherCache, windows: Windows) -> dict[str, Any]:
    if not isinstance(teacher, TeacherCache):
        return {}
    num_bytes = teacher.num_bytes()
    facts = {"key": teacher.key, "bytes": num_bytes, "bytes_per_token": num_bytes / windows.ids.numel()}
    return {"teacher_cache": facts}


def _save_curve(path: Path, history: list[Point]) -> None:
    write_atomically(path, json.dumps([asdict(point) for point in history], indent=1) + "\n")


def _details(history: list[Point], num_windows: int) -> dict[str, float | int]:
    """Losses are means over the first and the last tenth of the steps."""
    tenth = max(len(history) // 10, 1)
    seconds = sum((point.tokens / point.step) / point.tok_s for point in history)
    return {
        "steps": len(history),
        "windows": num_windows,
        "first_loss": sum(point.loss for point in history[:tenth]) / tenth,
        "last_loss": sum(point.loss for point in history[-tenth:]) / tenth,
        "tok_s": history[-1].tokens / seconds,
    }
