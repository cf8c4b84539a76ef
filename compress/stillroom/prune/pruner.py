"""One model on its way to smaller ones: looked at once, then cut and repaired as often as a search asks.

The calibration text is parted: most of it is what importance is measured on, layers are searched on and modules are
solved on; some windows at its end are kept apart. On those each repair must pay, and candidates are compared. Neither
is text that anything is reported on.
"""

from __future__ import annotations

import dataclasses
import functools
import gc
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillroom.distill.losses import Head, head_of
from stillroom.errors import EnvironmentCannot
from stillroom.export.rewrite import replace_tensors
from stillroom.models.blocks import Blocks
from stillroom.models.disk import too_large
from stillroom.models.load import load_model
from stillroom.models.shape import ModelShape
from stillroom.prune.allowed import SEARCHES, what_to_score
from stillroom.prune.choice import width_cut
from stillroom.prune.cut import Cut, selected
from stillroom.prune.depth_search import (
    DepthScorer,
    Evolution,
    Keep,
    best_of,
    contiguous,
    evolve,
    greedy,
    leave_one_out,
)
from stillroom.prune.importance.from_disk import measure_from_disk
from stillroom.prune.importance.measure import measure
from stillroom.prune.importance.methods import keep_layers
from stillroom.prune.importance.names import DepthMethod, Wanted
from stillroom.prune.importance.scores import Importance
from stillroom.prune.repair.kinds import is_narrowed, repair_kinds
from stillroom.prune.repair.sweep import Attempt, Pair, Sweep
from stillroom.prune.surgery import cut_checkpoint
from stillroom.prune.width import strongest
from stillroom.recipe import Prune, RepairKind
from stillroom.stage import Progress


@dataclass(frozen=True)
class Made:
    """A cut model that was written, and how near it is to the dense one on text kept apart, in nats per token."""

    cut: Cut
    shape: ModelShape
    kl_cut: float | None = None
    """Before repair; None where nothing was compared."""
    kl: float | None = None
    """After repair."""
    attempts: tuple[Attempt, ...] = ()


@dataclass
class Pruner:
    """A dense model with the text to judge it by."""

    config: Prune
    shape: ModelShape
    source_dir: Path
    windows_NT: Tensor
    """Calibration text; its last windows are kept apart."""
    scratch_dir: Path
    seed: int
    progress: Progress
    scores: dict[frozenset[Wanted], Importance] = field(default_factory=dict)
    """What was measured, by what was wanted."""
    _chosen: dict[tuple[int, int], list[Keep]] = field(default_factory=dict)

    @property
    def depth_method(self) -> str:
        """The recipe's, with `auto` resolved: searching takes a decoder that fits in memory."""
        if self.config.depth_importance != "auto":
            return self.config.depth_importance
        return "block_influence" if self.why_no_search else "search"

    @functools.cached_property
    def why_no_search(self) -> str | None:
        """Why layers cannot be searched and modules not repaired, or None."""
        if self.shape.family.task != "causal_lm":
            return f"that runs decoders layer by layer, and {self.shape.family.model_type} is none"
        if too_large(self.source_dir):
            return "the model does not fit in memory"
        return None

    def check_memory(self) -> None:
        """Say what a model that does not fit in memory is cut without.

        Raises EnvironmentCannot for what was asked for by name and needs all of it in memory.
        """
        if not too_large(self.source_dir):
            return
        asked = [f"depth_importance {self.config.depth_importance}"] * (self.config.depth_importance in SEARCHES)
        asked += [f"repair {', '.join(self.config.repair.kinds)}"] * (self.config.repair.kinds not in ("auto", ()))
        asked += ["target"] * (self.config.target is not None)
        if asked:
            raise EnvironmentCannot(
                f"{self.source_dir} does not fit in memory, and {asked[0]} runs all of it; give sizes, block_influence "
                "and repair: [], or take a machine with more memory"
            )
        self.progress.log(
            "the model does not fit in memory: importance runs layer by layer from disk, layers are ranked by "
            f"{self.depth_method} instead of searched, and nothing is repaired"
        )

    @functools.cached_property
    def dense(self) -> PreTrainedModel:
        """The dense model."""
        return load_model(self.source_dir).requires_grad_(False)

    @functools.cached_property
    def blocks(self) -> Blocks:
        return Blocks(self.dense, self.shape.family)

    @functools.cached_property
    def scorer(self) -> DepthScorer:
        """Measures choices of layers on the first of the windows."""
        budget = self.config.search
        head = head_of(self.dense)
        return DepthScorer(
            self.blocks,
            Head(head.weight.detach(), head.softcap),
            self.fitting_NT[: self._num_windows(budget.tokens)],
            batch_size=self.config.calibration.batch_size,
            stride=max(1, round(1 / budget.scored_share)),
        )

    @property
    def heldout_NT(self) -> Tensor:
        """Windows kept apart: as many as asked for, at most a quarter; none where nothing is judged on them."""
        return self.windows_NT[len(self.windows_NT) - self._num_heldout :]

    @property
    def fitting_NT(self) -> Tensor:
        """All others."""
        return self.windows_NT[: len(self.windows_NT) - self._num_heldout]

    @property
    def _num_heldout(self) -> int:
        asked = self.config.repair.kinds or self.config.target or self.depth_method == "search"
        if not asked or self.why_no_search:
            return 0
        return min(self._num_windows(self.config.repair.heldout_tokens), max(1, len(self.windows_NT) // 4))

    def _num_windows(self, tokens: int) -> int:
        return math.ceil(tokens / self.windows_NT.shape[1])

    @property
    def all_scores(self) -> Importance | None:
        """All that was measured, of whatever passes; None where nothing was."""
        measured = list(self.scores.values())
        return functools.reduce(Importance.together, measured) if measured else None

    def scores_of(self, target: ModelShape) -> Importance | None:
        """What was measured for this shape, and not for other candidates, which a search that goes on after a kill does
        not look at again; None where nothing was."""
        widths = what_to_score(self.shape, target)
        passes = [widths]
        if target.total_layers < self.shape.total_layers:
            passes += [frozenset({"layers"}), widths | {"layers"}]
        measured = [self.scores[wanted] for wanted in dict.fromkeys(passes) if wanted in self.scores]
        return functools.reduce(Importance.together, measured) if measured else None

    def layer_costs(self, target: ModelShape) -> list[float] | None:
        """KL to the dense model without each layer, where layers were searched for this shape."""
        if "scorer" not in self.__dict__ or target.total_layers == self.shape.total_layers:
            return None
        return [agreement.kl for agreement in leave_one_out(self.scorer)]

    # choosing

    def importance(self, wanted: frozenset[Wanted]) -> Importance:
        """Scores of all that is wanted, from one pass over the text."""
        if wanted not in self.scores:
            self.scores[wanted] = self._measure(wanted)
        return self.scores[wanted]

    def layer_choices(self, target: ModelShape) -> list[Keep]:
        """Choices of layers, the likeliest first; one, unless the method is to compare several after repair."""
        if self.config.drop_layers is not None:
            return [tuple(i for i in range(self.shape.total_layers) if i not in self.config.drop_layers)]
        if target.total_layers == self.shape.total_layers:
            return [tuple(range(self.shape.total_layers))]
        numbers = target.num_layers, target.num_decoder_layers
        if numbers not in self._chosen:
            searched = self.depth_method in SEARCHES
            self._chosen[numbers] = self._searched(target.num_layers) if searched else [self._ranked(target)]
        return self._chosen[numbers]

    def cut_for(self, target: ModelShape, layers: Keep) -> Cut:
        """What stays of these layers at the sizes of `target`."""
        wanted = what_to_score(self.shape, target)
        return width_cut(self.shape, target, layers, self.importance(wanted) if wanted else None)

    def _ranked(self, target: ModelShape) -> Keep:
        """The layers that a single metric keeps, each stack's own number."""
        method: DepthMethod = self.depth_method  # type: ignore[assignment]
        scores = self.importance(what_to_score(self.shape, target) | {"layers"})
        encoder = keep_layers(scores, method, target.num_layers, range(self.shape.num_layers))
        if not self.shape.num_decoder_layers:
            return encoder
        decoder = range(self.shape.num_layers, self.shape.total_layers)
        return encoder + keep_layers(scores, method, target.num_decoder_layers, decoder)

    def _searched(self, count: int) -> list[Keep]:
        """The choices of the search methods, best first."""
        assert self.why_no_search is None, self.why_no_search
        method = self.depth_method
        if method in ("leave_one_out_kl", "leave_one_out_loss"):
            costs = [a.kl if method == "leave_one_out_kl" else a.loss for a in leave_one_out(self.scorer)]
            return [strongest(costs, count)]
        budget = Evolution(self.config.search.generations, self.config.search.offspring)
        num_greedy = sum(range(count + 1, self.shape.num_layers + 1))
        num_evolved = 0 if method == "greedy" else budget.generations * budget.offspring
        tick = self._ticking("choices", num_greedy + num_evolved)
        found = [greedy(self.scorer, count, tick)]
        if method != "greedy":
            found += [best_of(self.scorer, contiguous(self.shape.num_layers, self.shape.num_layers - count))]
            found += [strongest([a.kl for a in leave_one_out(self.scorer)], count)]
            found += [self._by_block_influence(count)]
            found = [evolve(self.scorer, best_of(self.scorer, found), budget, seed=self.seed, progress=tick), *found]
        best_first = sorted(dict.fromkeys(found), key=lambda keep: self.scorer.score(keep).kl)
        return best_first[: self.config.search.finalists if method == "search" else 1]

    def _by_block_influence(self, count: int) -> Keep:
        scores = self.importance(frozenset({"layers"}))
        return keep_layers(scores, "block_influence", count)

    def _measure(self, wanted: frozenset[Wanted]) -> Importance:
        method = self.depth_method
        depth: tuple[DepthMethod, ...] = ("block_influence",)
        if method not in SEARCHES:
            depth = (method,)  # type: ignore[assignment]
        self.progress.log(
            f"measuring {', '.join(sorted(wanted))} on {len(self.fitting_NT)} windows of "
            f"{self.windows_NT.shape[1]} tokens"
        )

        def report(done: int, total: int) -> None:
            self.progress.update(done, total, "windows")

        how: dict[str, Any] = {
            "batch_size": self.config.calibration.batch_size,
            "wanted": wanted,
            "width": self.config.width_importance,
            "depth": depth,
            "seed": self.seed,
            "progress": report,
        }
        if too_large(self.source_dir):
            return measure_from_disk(self.source_dir, self.shape, self.fitting_NT, scratch_dir=self.scratch_dir, **how)
        return measure(self.dense, self.shape, self.fitting_NT, **how)

    # making

    def best(self, target: ModelShape, out_dir: Path) -> Made:
        """Cut and repair the model to the sizes of `target`; of several choices of layers the best after repair."""
        choices = self.layer_choices(target)
        if len(choices) == 1:
            return self.make(self.cut_for(target, choices[0]), out_dir, compare=self.config.target is not None)
        best: tuple[Made, Path] | None = None
        for number, layers in enumerate(choices):
            path = self.scratch_dir / f"finalist-{number}"
            shutil.rmtree(path, ignore_errors=True)
            made = self.make(self.cut_for(target, layers), path, compare=True)
            dropped = [i for i in range(self.shape.num_layers) if i not in layers]
            self.progress.log(f"without layers {dropped}: KL {made.kl_cut:.4f}, repaired {made.kl:.4f}")
            if best is None or (made.kl or 0) < (best[0].kl or 0):
                if best is not None:
                    shutil.rmtree(best[1])
                best = made, path
            else:
                shutil.rmtree(path)
        assert best is not None
        move_files(best[1], out_dir)
        return best[0]

    def make(self, cut: Cut, out_dir: Path, *, compare: bool = False) -> Made:
        """Write what `cut` leaves to `out_dir`, repaired; `compare` wants a KL even where nothing can be repaired."""

        def report(done: int, total: int) -> None:
            self.progress.update(done, total, "tensors")

        scores = self.all_scores
        target = cut_checkpoint(
            self.source_dir,
            self.shape,
            cut,
            out_dir,
            norm_shares=scores.norm_shares if scores else None,
            norm_means=scores.norm_means if scores else None,
            progress=report,
        )
        return self.repair(cut, target, out_dir, compare=compare)

    def repair(self, cut: Cut, target: ModelShape, out_dir: Path, *, compare: bool = False) -> Made:
        """Repair the checkpoint in `out_dir` in place: what `cut` left, a model of shape `target`, whoever cut it."""
        kinds = repair_kinds(self.config.repair, self.shape, target)
        if self.why_no_search or not (kinds or compare):
            return Made(cut, target)
        return self._repaired(cut, target, kinds, out_dir)

    def _repaired(self, cut: Cut, target: ModelShape, kinds: frozenset[RepairKind], out_dir: Path) -> Made:
        """Repair the checkpoint in `out_dir` in place, as far as it pays."""
        model = load_model(out_dir).requires_grad_(False)
        whole_rows = dataclasses.replace(cut, hidden=None)
        pair = Pair(
            dense=self.blocks,
            cut=Blocks(model, target.family),
            family=self.shape.family,
            layers=cut.layers,
            hidden=cut.hidden,
            narrowed=is_narrowed(self.shape, target),
            kept_rows=lambda name, weight: selected(name, weight, self.shape, whole_rows),
        )
        text = self.fitting_NT[: self._num_windows(self.config.repair.tokens)]
        sweep = Sweep(
            pair,
            kinds,
            text,
            self.heldout_NT,
            batch_size=self.config.calibration.batch_size,
            stride=max(1, round(1 / self.config.search.scored_share)),
        )
        before = sweep.kl
        sweep.run(lambda done, total: self.progress.update(done, total, "layers", kl=sweep.kl))
        if sweep.changed:
            state = model.state_dict()
            values = {f"{module}.weight": state[f"{module}.weight"] for module in sweep.changed}
            replace_tensors(out_dir, values, self.scratch_dir / "repaired")
        del model, pair
        release_memory()
        return Made(cut, target, before, sweep.kl, tuple(sweep.attempts))

    def _ticking(self, unit: str, total: int) -> Callable[[], None]:
        """What counts one more of `total` each time that it is called."""
        done = 0

        def tick() -> None:
            nonlocal done
            done += 1
            self.progress.update(done, total, unit)

        return tick


def move_files(path: Path, out_dir: Path) -> None:
    """Move what a directory holds into another, and remove it."""
    out_dir.mkdir(parents=True, exist_ok=True)
    for file in path.iterdir():
        shutil.move(file, out_dir / file.name)
    path.rmdir()


def release_memory() -> None:
    """Give back what a model that went held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
