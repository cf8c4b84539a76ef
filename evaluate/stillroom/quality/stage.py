"""The evaluate stage: perplexity on every held-out text and lm-eval tasks, on one model.

What is measured is saved at once, text by text and task by task, so a killed run measures only what is missing, and a
model whose numbers are all there is not opened again. A quantized checkpoint is opened dequantized, with activations
quantized and dequantized as the engine does it, so the numbers are those of the model that is served.
"""

from __future__ import annotations

import functools
import json
import logging
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillroom.artifact import Artifact, Measurement, write_atomically
from stillroom.distill.data import heldout_text
from stillroom.export.dequantize import load_fake_quantized
from stillroom.models.load import load_tokenizer
from stillroom.models.shape import read_config, require_decoder, shape_of
from stillroom.quality.perplexity import score_windows, text_measurements
from stillroom.quality.scoring import ReportingLM, run_task
from stillroom.recipe import Evaluate, Task, TextSource
from stillroom.stage import Job, Progress, StageResult

MEASUREMENTS_FILE = "measurements.json"

log = logging.getLogger(__name__)

_LIST = TypeAdapter(tuple[Measurement, ...])


def run(job: Job) -> StageResult:
    """Measure `job.source` on `job.text` and the config's tasks; writes measurements.json."""
    measured = measure(
        job.source.model_dir, job.config, job.text, job.inputs, job.scratch_dir, seed=job.seed, progress=job.progress
    )
    content = {"schema_version": 1, "measurements": [m.model_dump(mode="json") for m in measured]}
    write_atomically(job.out_dir / MEASUREMENTS_FILE, json.dumps(content, indent=2) + "\n")
    tokens = sum(m.n or 0 for m in measured if m.name.endswith(".perplexity"))
    return StageResult(tokens=tokens, measurements=measured)


def evaluate_directory(
    model_dir: Path, config: Evaluate, text: tuple[TextSource, ...], progress: Progress, *, seed: int = 0
) -> tuple[Measurement, ...]:
    """Measure any checkpoint directory, plain or quantized, outside of a run; nothing is written."""
    with tempfile.TemporaryDirectory(prefix="stillroom-evaluate-") as scratch:
        return measure(model_dir, config, text, {}, Path(scratch), seed=seed, progress=progress)


def measure(
    model_dir: Path,
    config: Evaluate,
    text: tuple[TextSource, ...],
    inputs: Mapping[str, Artifact],
    scratch_dir: Path,
    *,
    seed: int,
    progress: Progress,
) -> tuple[Measurement, ...]:
    """All numbers of one model, each part kept in `scratch_dir` as soon as it is known."""
    shape = shape_of(read_config(model_dir), str(model_dir))
    require_decoder(shape, "measuring perplexity and tasks", "set `evaluate: null`")
    subject = _Subject(model_dir, config.batch_size)
    measured: list[Measurement] = []
    for source in text:
        on_text = functools.partial(_measure_text, subject, config, source, inputs, progress)
        measured += _kept(scratch_dir / f"text-{source.label}.json", on_text)
    for task in config.tasks:
        on_task = functools.partial(_measure_task, subject, task, seed, progress)
        measured += _kept(scratch_dir / f"task-{task.name}.json", on_task)
    return tuple(measured)


@dataclass(frozen=True)
class _Subject:
    """The model under measurement, opened when it is first needed."""

    model_dir: Path
    batch_size: int

    @functools.cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return load_tokenizer(self.model_dir)

    @functools.cached_property
    def model(self) -> PreTrainedModel:
        log.info("opening %s", self.model_dir)
        return load_fake_quantized(self.model_dir)

    @functools.cached_property
    def lm(self) -> ReportingLM:
        return ReportingLM(self.model, self.tokenizer, self.batch_size)


def _measure_text(
    subject: _Subject, config: Evaluate, source: TextSource, inputs: Mapping[str, Artifact], progress: Progress
) -> tuple[Measurement, ...]:
    text = heldout_text(source, inputs, subject.tokenizer, config.perplexity_tokens)
    losses = score_windows(
        subject.model,
        text.ids,
        sequence_length=config.sequence_length,
        batch_size=config.batch_size,
        prefix=text.bos,
        on_tokens=lambda done: progress.update(done, len(text.ids), "tokens", text=text.label),
    )
    return text_measurements(text.label, losses, num_tokens=len(text.ids), num_bytes=text.num_bytes)


def _measure_task(subject: _Subject, task: Task, seed: int, progress: Progress) -> tuple[Measurement, ...]:
    return run_task(subject.lm, task, seed=seed, progress=progress)


def _kept(path: Path, measure_part: Callable[[], tuple[Measurement, ...]]) -> tuple[Measurement, ...]:
    """What an earlier attempt measured, or a new measurement, kept at `path`."""
    if path.exists():
        return _LIST.validate_json(path.read_bytes())
    measured = measure_part()
    write_atomically(path, _LIST.dump_json(measured).decode())
    return measured
