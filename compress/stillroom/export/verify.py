"""The verify stage: open what was exported again from disk, and compare it with the model it came from.

    static     every tensor, scale and companion is there and sane (checks.py)
    opening    for what does not generate: its own class finds every tensor, logits are finite (opening.py)
    drift      KL(reference || this) and top-1 agreement on held-out text (drift.py)
    writing    greedy continuations of held-out text, which must not all have become loops

Quantized checkpoints are run as an engine computes them, activations rounded too (`load_fake_quantized`). What is
whole and finite is asked of every result; the drift limits are asked of quantized ones only, because pruning and
distillation are meant to change the model, and gates judge those. Loops are judged against the reference: small
models loop by themselves.

The stage returns its judgement, it does not raise: the pipeline stops on `passed` False, with the artifact kept to
look at."""

from __future__ import annotations

import gc
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stillroom.artifact import Measurement, damaged_files, open_artifact
from stillroom.distill.data import heldout_text
from stillroom.errors import InputError
from stillroom.export.checks import Fact, check_checkpoint
from stillroom.export.dequantize import load_fake_quantized
from stillroom.export.drift import Drift, greedy, is_degenerate, measure_drift, save_logits, until_end
from stillroom.export.opening import opening_facts
from stillroom.models.family import Family
from stillroom.models.load import load_tokenizer
from stillroom.models.shape import read_config, shape_of
from stillroom.recipe import Verify
from stillroom.stage import Job, StageResult

NUM_PROMPTS = 4
PROMPT_TOKENS = 32
MAX_NEW_LOOPS = NUM_PROMPTS // 2
"""More prompts than this that loop here and not in the reference are a failure; one or two are chance."""

PROMPTS = (
    "The weather in the mountains changes quickly, so travellers should",
    "Here is a short list of things to remember when you cook rice:",
    "In 1969, two astronauts landed on the Moon. When they stepped out,",
    "A function that returns the larger of two numbers can be written as",
)
"""Where no held-out text is given."""


def run(job: Job) -> StageResult:
    """Verify `job.source` against `job.inputs["reference"]` on `job.text`.

    Raises InputError when a model cannot be read at all, or when the text holds no window.
    """
    config: Verify = job.config
    model_dir = job.source.model_dir
    facts = check_checkpoint(model_dir)
    failures = [f"{fact.check}: {fact.found}" for fact in facts if not fact.ok]
    details: dict[str, Any] = {"passed": False, "failures": failures, "facts": [asdict(fact) for fact in facts]}
    if failures:  # a broken checkpoint is not run: what came out would mean nothing
        return StageResult(measurements=(_passed(False),), details=details)
    shape = shape_of(read_config(model_dir), str(model_dir))
    shape.check_length(config.sequence_length, "verify.sequence_length")
    tokenizer = load_tokenizer(model_dir)
    windows = heldout_windows(job, tokenizer, config)
    if shape.family.task != "causal_lm":
        return _verify_opening(job, shape.family, windows, facts)
    prompts = held_out_prompts(windows)
    end_tokens = _end_tokens(tokenizer)

    expected = _ask_reference(job, windows, prompts, end_tokens)
    drift, written = _ask_candidate(job, windows, prompts, end_tokens)

    judged = job.source.manifest.kind == "quantize"
    failures += _drift_failures(drift, config if judged else None) + (
        _loop_failures(expected, written) if judged else []
    )
    details |= {
        "passed": not failures,
        "judged": judged,
        "reference_loops": sum(map(is_degenerate, expected)),
        "loops": sum(map(is_degenerate, written)),
        "samples": [
            {"prompt": tokenizer.decode(p), "reference": tokenizer.decode(e), "written": tokenizer.decode(w)}
            for p, e, w in zip(prompts, expected, written, strict=True)
        ],
    }
    tokens = drift.kl.tokens
    job.progress.log(f"KL {drift.kl.loss:.4f} nats, top-1 agreement {drift.top1.loss:.1%} on {tokens:,} tokens")
    return StageResult(tokens=tokens, measurements=(*_measured(drift), _passed(not failures)), details=details)


def _verify_opening(job: Job, family: Family, windows: Sequence[Tensor], facts: list[Fact]) -> StageResult:
    """What can be asked of a model that does not generate."""
    total = len(windows)
    facts = facts + opening_facts(
        job.source.model_dir, family, windows, lambda done: job.progress.update(done, total, "windows")
    )
    failures = [f"{fact.check}: {fact.found}" for fact in facts if not fact.ok]
    job.progress.log(f"{family.architecture} opens and runs" if not failures else failures[0])
    details = {
        "passed": not failures, "failures": failures, "facts": [asdict(fact) for fact in facts], "judged": False,
    }  # fmt: skip
    return StageResult(sum(map(len, windows)), (_passed(not failures),), details)


def _ask_reference(
    job: Job, windows: Sequence[Tensor], prompts: Sequence[Tensor], end_tokens: set[int]
) -> list[list[int]]:
    """Leave the reference's logits in the scratch directory and return what it writes; its memory is free after."""
    total = 2 * len(windows)
    model = load_fake_quantized(job.inputs["reference"].model_dir)
    save_logits(model, windows, job.scratch_dir, lambda done: job.progress.update(done, total, "windows"))
    return _continue(model, prompts, end_tokens)


def _ask_candidate(
    job: Job, windows: Sequence[Tensor], prompts: Sequence[Tensor], end_tokens: set[int]
) -> tuple[Drift, list[list[int]]]:
    """The drift from the logits in the scratch directory, and what the verified model writes."""
    gc.collect()  # modules refer to each other in circles: without this the reference would still be there
    before, total = len(windows), 2 * len(windows)
    model = load_fake_quantized(job.source.model_dir)
    drift = measure_drift(
        model, windows, job.scratch_dir, lambda done: job.progress.update(before + done, total, "windows")
    )
    return drift, _continue(model, prompts, end_tokens)


def heldout_windows(job: Job, tokenizer: PreTrainedTokenizerBase, config: Verify) -> list[Tensor]:
    """Windows (T,) of the held-out sources, each source with an equal share of `config.tokens`.

    The last window of a source is as short as it comes. Raises InputError when a source holds fewer than two tokens.
    """
    share = max(config.tokens // len(job.text), 2)
    windows: list[Tensor] = []
    for source in job.text:
        text = heldout_text(source, job.inputs, tokenizer, share)
        length = config.sequence_length - (text.bos is not None)
        pieces = [piece for piece in torch.split(text.ids, length) if len(piece) > 1]
        if not pieces:
            raise InputError(f"held-out text {source.source} has {len(text.ids)} token; verification needs at least 2")
        prefix = torch.tensor([] if text.bos is None else [text.bos], dtype=torch.int64)
        windows += [torch.cat([prefix, piece]) for piece in pieces]
    return windows


def held_out_prompts(windows: Sequence[Tensor]) -> list[Tensor]:
    """The first tokens of windows spread over the text, (T,) each, all of one length."""
    step = max(1, len(windows) // NUM_PROMPTS)
    chosen = list(windows[::step][:NUM_PROMPTS])
    length = min(PROMPT_TOKENS, *(len(window) for window in windows))
    return [window[:length] for window in chosen]


def _continue(model: PreTrainedModel, prompts: Sequence[Tensor], end_tokens: set[int]) -> list[list[int]]:
    """What the model writes after each prompt, until it ends the text itself."""
    if len({len(prompt) for prompt in prompts}) == 1:
        rows = greedy(model, torch.stack(list(prompts)))
    else:
        rows = torch.cat([greedy(model, prompt[None]) for prompt in prompts])
    return [until_end(row.tolist(), end_tokens) for row in rows]


def _end_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    return set() if tokenizer.eos_token_id is None else {int(tokenizer.eos_token_id)}


def _drift_failures(drift: Drift, limits: Verify | None) -> list[str]:
    """Why the drift is not acceptable; without limits only what is no number at all is not."""
    kl, agreement = drift.kl.loss, drift.top1.loss
    if not math.isfinite(kl):
        return ["the logits are not finite numbers"]
    failures = []
    if limits is not None and kl > limits.max_kl:
        failures.append(f"KL to the unquantized model is {kl:.4f} nats per token; verify.max_kl allows {limits.max_kl}")
    if limits is not None and agreement < limits.min_top1_agreement:
        failures.append(
            f"top-1 agreement with the unquantized model is {agreement:.3f}; verify.min_top1_agreement asks for "
            f"{limits.min_top1_agreement}"
        )
    return failures


def _loop_failures(expected: Sequence[list[int]], written: Sequence[list[int]]) -> list[str]:
    new = sum(is_degenerate(w) and not is_degenerate(e) for e, w in zip(expected, written, strict=True))
    if new > MAX_NEW_LOOPS:
        return [f"{new} of {len(written)} continuations are loops where the unquantized model writes none"]
    return []


def _measured(drift: Drift) -> tuple[Measurement, ...]:
    kl, top1 = drift.kl, drift.top1
    return (
        Measurement(
            name="verify.kl", value=kl.loss, unit="nats/token", n=kl.tokens, stderr=kl.stderr, higher_is_better=False
        ),
        Measurement(
            name="verify.top1_agreement",
            value=top1.loss,
            unit="share",
            n=top1.tokens,
            stderr=top1.stderr,
            higher_is_better=True,
        ),
    )


def _passed(passed: bool) -> Measurement:
    return Measurement(name="verify.passed", value=float(passed), unit="bool", higher_is_better=True)


@dataclass(frozen=True)
class Report:
    """What `stillroom verify PATH` says about a directory."""

    path: Path
    facts: tuple[Fact, ...]
    samples: tuple[tuple[str, str], ...] = ()
    """Prompts and what the model wrote."""
    notes: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return all(fact.ok for fact in self.facts)

    def as_json(self) -> dict[str, Any]:
        return {
            "path": str(self.path),
            "passed": self.passed,
            "facts": [asdict(fact) for fact in self.facts],
            "samples": [{"prompt": prompt, "written": text} for prompt, text in self.samples],
            "notes": list(self.notes),
        }

    def render(self) -> str:
        lines = [f"{'ok  ' if fact.ok else 'FAIL'} {fact.check}: {fact.found}" for fact in self.facts]
        lines += [f"note {note}" for note in self.notes]
        lines += [f"     {prompt!r} -> {text!r}" for prompt, text in self.samples]
        return "\n".join([*lines, f"{'passed' if self.passed else 'FAILED'}: {self.path}"])


def verify_directory(path: Path) -> Report:
    """Check an artifact or any checkpoint directory without a reference.

    Static checks, hashes where it is sealed, and a greedy generation: its text is shown, its logits must be finite.

    Raises InputError when it is no checkpoint, or one of a family or scheme that is not known.
    """
    artifact = open_artifact(path)
    model_dir = artifact.model_dir if artifact else path
    facts = check_checkpoint(model_dir)
    if artifact is not None:
        damaged = damaged_files(artifact)
        found = (
            f"{len(artifact.manifest.files)} files" if not damaged else f"changed or missing: {', '.join(damaged[:3])}"
        )
        facts.append(Fact("files are those that were sealed", not damaged, found))
    if not all(fact.ok for fact in facts):
        return Report(path, tuple(facts))
    tokenizer = load_tokenizer(model_dir)
    prompts = [torch.tensor(tokenizer(text)["input_ids"]) for text in PROMPTS]
    family = shape_of(read_config(model_dir), str(model_dir)).family
    if family.task != "causal_lm":
        return Report(path, (*facts, *opening_facts(model_dir, family, prompts)))
    model = load_fake_quantized(model_dir)
    with torch.inference_mode():
        finite = bool(model(prompts[0][None].to(model.device)).logits.isfinite().all())
    facts.append(Fact("the model runs, logits finite", finite, "yes" if finite else "NaN or infinite logits"))
    written = _continue(model, prompts, _end_tokens(tokenizer))
    loops = sum(map(is_degenerate, written))
    notes = (f"{loops} of {len(written)} greedy continuations are loops",) if loops else ()
    texts = tuple(tokenizer.decode(tokens) for tokens in written)
    return Report(path, tuple(facts), tuple(zip(PROMPTS, texts, strict=True)), notes)
