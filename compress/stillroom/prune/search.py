"""The best shape for a target: candidates are cut and repaired, the best few distilled for a while, all are kept.

Which shapes fit is shapes.py's, what they cost cost.py's, the order of scoring and the cache of scores frontier.py's.
Here the scores are made: KL to the dense model on calibration text that neither importance nor repair has seen, after
repair, and again after a short distillation of the best (Minitron, arXiv 2407.14679, ranks candidates so).
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch

from stillroom.distill.closeness import closeness
from stillroom.distill.packing import Windows
from stillroom.distill.train import Student, train
from stillroom.home import home
from stillroom.models.load import load_model
from stillroom.models.shape import ModelShape
from stillroom.prune.cost import Hardware, known_hardware
from stillroom.prune.frontier import Frontier, search
from stillroom.prune.measure_cpu import kept_cpu
from stillroom.prune.pruner import Made, Pruner, move_files, release_memory
from stillroom.prune.shapes import Candidate, candidates, price_target, sizes_of
from stillroom.recipe import Distill, Target

RERANK_BATCH_TOKENS = 8192
"""Tokens in an optimizer step of the short distillation, where its budget allows eight such steps."""


def search_shape(pruner: Pruner, target: Target, source_key: str, out_dir: Path) -> tuple[Made, Frontier]:
    """The winner, written to `out_dir`, and everything that was scored.

    Scores are cached under the model's key, the text's hash and all arguments, in stillroom's home, so that another run
    that asks for the same finds them. Raises InputError where no shape meets the target, naming the nearest values.
    """
    pricing = price_target(target, pruner.shape, hardware_of(target))
    found = candidates(pruner.shape, pricing)
    workshop = _Workshop(pruner, most=max(1, target.rerank))

    def score(shape: ModelShape) -> float:
        kl = workshop.made(shape)[0].kl
        assert kl is not None
        return kl

    def rerank(shape: ModelShape) -> float:
        return _after_distillation(pruner, workshop.made(shape)[1], target.rerank_tokens)

    def report(done: int, total: int, candidate: Candidate, kl: float) -> None:
        sizes = ", ".join(f"{name} {size}" for name, size in sizes_of(candidate.shape).items())
        pruner.progress.log(f"candidate {done} of {total}: {sizes}: KL {kl:.4f}")

    frontier = search(
        found,
        pruner.shape,
        pricing.costs(pruner.shape),
        score,
        rerank if target.rerank else None,
        cache_dir=home() / "scores",
        key=_key(pruner, target, source_key),
        target=target.given(),
        load=target.model_dump(mode="json", exclude={*target.given(), "candidates", "rerank", "rerank_tokens"}),
        num_reranked=target.rerank,
        progress=report,
    )
    winner = next(c.shape for c in found if sizes_of(c.shape) == frontier.winner.sizes)
    made, path = workshop.made(winner)
    move_files(path, out_dir)
    workshop.clear()
    return made, frontier


class _Workshop:
    """Candidates that were made, of which the best few stay on disk, to be distilled and to be the result."""

    def __init__(self, pruner: Pruner, most: int) -> None:
        self.pruner, self.most = pruner, most
        self.folder = pruner.scratch_dir / "candidates"
        self._made: dict[str, tuple[Made, Path]] = {}
        self.clear()

    def made(self, shape: ModelShape) -> tuple[Made, Path]:
        """The candidate of this shape and where it lies; of those that are not among the best few, only until the next
        one is made."""
        name = "-".join(str(size) for size in sizes_of(shape).values())
        if name not in self._made:
            for other in self._beyond_the_best():
                shutil.rmtree(self._made.pop(other)[1])
            path = self.folder / name
            self._made[name] = self.pruner.best(shape, path), path
        return self._made[name]

    def clear(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        self._made = {}

    def _beyond_the_best(self) -> list[str]:
        return sorted(self._made, key=lambda name: self._made[name][0].kl or 0.0)[self.most :]


def hardware_of(target: Target) -> Hardware | None:
    """The figures of the hardware that a target names; this machine's CPU is measured once."""
    if target.hardware == "cpu":
        return kept_cpu(home() / "cpu.json")
    return known_hardware()[target.hardware] if target.hardware else None


def _key(pruner: Pruner, target: Target, source_key: str) -> str:
    """A hash of all that determines a score beside the shape."""
    config = pruner.config.model_dump(mode="json", exclude={"name", "source", "target"})
    windows = hashlib.sha256(pruner.windows_NT.to(torch.int32).numpy().tobytes()).hexdigest()
    facts = [source_key, windows, config, target.rerank_tokens, pruner.seed]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _after_distillation(pruner: Pruner, model_dir: Path, tokens: int) -> float:
    """KL to the dense model of the model in `model_dir` after a short distillation, on the windows kept apart."""
    config = _short_distillation(tokens, pruner.windows_NT.shape[1])
    scratch = pruner.scratch_dir / "rerank"
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    student = Student(load_model(model_dir))
    windows, heldout = Windows(pruner.fitting_NT), Windows(pruner.heldout_NT)
    train(student, pruner.dense, windows, config, seed=pruner.seed, scratch_dir=scratch, progress=pruner.progress)
    kl = closeness(student.model, pruner.dense, heldout, config).kl
    shutil.rmtree(scratch)
    del student
    release_memory()
    return kl


def _short_distillation(tokens: int, sequence_length: int) -> Distill:
    """At least eight optimizer steps where the tokens allow it, and no checkpoints: it is short."""
    batch_tokens = min(RERANK_BATCH_TOKENS, tokens // 8)
    batch_size = max(1, batch_tokens // sequence_length)
    num_tokens = max(tokens, batch_size * sequence_length)
    return Distill(
        tokens=num_tokens,
        sequence_length=sequence_length,
        batch_size=batch_size,
        learning_rate=1e-4,
        save_every_steps=num_tokens,
    )
