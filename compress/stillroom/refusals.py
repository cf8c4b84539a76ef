"""Bad input that can be known before anything runs, each an InputError in one line. No torch, until text is read.

A plan asks what config.json tells (`check_step`, `check_tensors`). Only a run asks what takes reading: whether the
weights are numbers, whether hub datasets answer, and whether the text fills a window (`check_weights_and_text`). The
stages ask again, but the prune stage comes after the unpruned model was measured, which takes long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stillroom.errors import InputError
from stillroom.models.shape import ModelShape, require_decoder, shape_of
from stillroom.models.weights import check_known
from stillroom.plan import Plan, Step
from stillroom.prune.allowed import check_prune
from stillroom.recipe import Distill, Evaluate, Prune, Quantize, TextSource, Verify
from stillroom.text import HUB, TEACHER, require_document

FOR_DECODERS = {
    "text": ("the text source `teacher`", "name a text file or a data set in `data`"),
    "distill": ("distillation", "leave the stage out"),
    "evaluate": ("measuring perplexity and tasks", "set `evaluate: null`"),
    "bench": ("measuring speed", "set `bench: null`"),
}
"""Kinds of steps that take a causal language model, and what to do instead where there is none."""


def check_step(step: Step, shapes: Mapping[str, ModelShape]) -> None:
    """What a step's models do not allow; `shapes` are those known by now, by step."""
    if step.kind in FOR_DECODERS:
        for name in step.inputs.values():
            if name in shapes:
                require_decoder(shapes[name], *FOR_DECODERS[step.kind])
    config, shape = step.config, shapes.get(step.inputs.get("source", ""))
    if shape is None:
        return
    if isinstance(config, Prune):
        try:
            check_prune(config, shape)
        except InputError as error:
            raise InputError(f"stage {step.name!r}: {error}") from error
    if isinstance(config, Distill | Verify | Evaluate):
        shape.check_length(config.sequence_length, f"{step.name}: sequence_length")
    if isinstance(config, Quantize) and config.scheme == "fp8":
        shape.check_length(config.calibration.sequence_length, f"{step.name}: calibration.sequence_length")


def check_tensors(plan: Plan) -> None:
    """A model that is to be pruned has no tensors that its family has not."""
    dense = plan.sources["dense"]
    if dense.kind != "directory" or dense.path is None or dense.config is None:
        return
    if any(step.kind == "prune" for step in plan.steps):
        check_known(dense.path, shape_of(dense.config, dense.given))


def check_weights_and_text(plan: Plan, todo: Sequence[Step]) -> None:
    """The weights of local models are numbers, and the text fills what the stages read first."""
    from stillroom.models.finite import check_finite  # brings numpy, which a plan does without

    for step in todo:
        source = plan.sources.get(step.name)
        if source is not None and source.kind == "directory" and source.path is not None:
            check_finite(source.path)
    _check_hub_text(todo)
    _check_windows(plan, todo)


def _check_hub_text(todo: Sequence[Step]) -> None:
    """Each hub dataset that is read can be reached and has the column that is asked for."""
    for source in dict.fromkeys(text for step in todo for text in step.text if text.source.startswith(HUB)):
        require_document(source)


def _check_windows(plan: Plan, todo: Sequence[Step]) -> None:
    """As far as text and tokenizer are here already."""
    dense = plan.sources["dense"]
    if dense.kind != "directory" or dense.path is None:
        return
    if not all(_is_here(text) for text in plan.recipe.data.train):
        return
    wanted = [(step, *needs) for step in todo if (needs := _windows_of(step)) is not None]
    if not wanted:
        return
    from stillroom.distill.data import contamination_of, packed_windows
    from stillroom.models.load import load_tokenizer

    tokenizer = load_tokenizer(dense.path)
    evaluated = wanted[0][0].evaluated
    if evaluated is not None and not all(_is_here(text) for text in evaluated.heldout):
        evaluated = None
    for step, length, count in wanted:
        clear_of = contamination_of(evaluated, tokenizer)
        found = len(packed_windows(step.text, {}, tokenizer, length, count, seed=step.seed, clear_of=clear_of))
        if found < count:
            raise InputError(
                f"stage {step.name!r} needs {count} windows of {length} tokens, one to choose on and one kept apart, "
                f"and the text fills {found}: lower calibration.sequence_length or give more text"
            )


def _is_here(text: TextSource) -> bool:
    """Neither to be fetched nor to be written yet."""
    return text.source != TEACHER and not text.source.startswith(HUB)


def _windows_of(step: Step) -> tuple[int, int] | None:
    """Tokens in a window and the fewest windows that a step takes, where it reads any for certain."""
    config = step.config
    if isinstance(config, Prune) and config.backend == "stillroom" and config.drop_layers is None:
        return config.calibration.sequence_length, 2
    if isinstance(config, Distill):
        return config.sequence_length, 1
    if isinstance(config, Quantize) and config.scheme == "fp8":
        return config.calibration.sequence_length, 1
    return None
