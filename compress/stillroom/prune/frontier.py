"""The search among candidate shapes: score each by what it loses, rank the best again after a short training, keep all.

The first score is cheap (the KL to the dense model after cut and repair), and says well which shapes are bad, but not
which of the good ones trains best: Minitron (arXiv 2407.14679) ranks candidates only after some retraining. So the best
few are trained for a little while and ranked again, and the winner is the best of those.

A score may take minutes, so each is written to disk by itself, as soon as it is there, under a hash of everything that
determines it: the caller's key (model, data, arguments), the sizes, and which of the two scores it is. A killed search
goes on where it stopped; a change of anything scores again. What was found is one document, frontier.json, with every
candidate and not only the winner. Nothing here imports torch; what cuts and measures is handed in.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from stillroom.artifact import write_atomically
from stillroom.errors import InputError
from stillroom.models.shape import ModelShape
from stillroom.prune.cost import Costs
from stillroom.prune.shapes import Candidate, CutKind, sizes_of

log = logging.getLogger(__name__)

FRONTIER_FILE = "frontier.json"

Pass = Literal["score", "rerank"]
Scorer = Callable[[ModelShape], float]
"""What a shape loses, in nats per token; lower is better. Infinity or NaN where it cannot be used at all."""


class Frozen(BaseModel):
    # a shape may be unusable, and its infinity has to survive its JSON
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, ser_json_inf_nan="strings")


class Scored(Frozen):
    """One candidate with all that is known of it."""

    sizes: dict[str, int]
    cut: CutKind
    params: int
    memory_gb: float
    latency_ms: float | None = None
    throughput: float | None = None
    prior: float
    kl: float
    """To the dense model after cut and repair, in nats per token."""
    seconds: float
    """That both scores took."""
    reranked: float | None = None
    """The same after a short distillation; None: it was not among the best few."""
    winner: bool = False


class Frontier(Frozen):
    """A finished search."""

    schema_version: Literal[1] = 1
    key: str
    """Of the model, the data and the arguments."""
    target: dict[str, float]
    """The targets that were given."""
    load: dict[str, Any] = {}
    """Hardware, batch, context and formats that the costs are for."""
    dense: dict[str, float]
    """The dense model's costs."""
    dense_sizes: dict[str, int]
    candidates: tuple[Scored, ...]
    """In the order in which they were scored."""

    @property
    def winner(self) -> Scored:
        return next(scored for scored in self.candidates if scored.winner)

    @property
    def cost_axis(self) -> str:
        """The cost that a plot shows: the first target that was given."""
        return next(iter(self.target))


def search(
    candidates: Sequence[Candidate],
    dense: ModelShape,
    dense_costs: Costs,
    score: Scorer,
    rerank: Scorer | None,
    *,
    cache_dir: Path,
    key: str,
    target: dict[str, float],
    load: dict[str, Any] | None = None,
    num_reranked: int = 3,
    progress: Callable[[int, int, Candidate, float], None] = lambda done, total, candidate, kl: None,
) -> Frontier:
    """Score every candidate, rank the `num_reranked` best again where `rerank` is given, and name the winner.

    `key` stands for all that determines a score beside the sizes: a hash of the model, the data and the arguments of
    both scorers. `progress` hears of each score, cached ones too. Raises InputError where no candidate has a finite
    score. What was scored before an error or a kill is in `cache_dir` and is not scored again.
    """
    assert candidates
    cache_dir.mkdir(parents=True, exist_ok=True)
    total = len(candidates) + (min(num_reranked, len(candidates)) if rerank else 0)
    losses: list[float] = []
    seconds: list[float] = []
    for candidate in candidates:
        loss, took = _cached(cache_dir, key, "score", candidate.shape, score)
        losses.append(loss)
        seconds.append(took)
        progress(len(losses), total, candidate, loss)
    best = _finite(losses)[: num_reranked if rerank else 1]
    if not best:
        raise InputError(
            f"none of the {len(candidates)} shapes for target {target} gives a model with finite loss; cut less: give "
            "an easier target, or repair the cut models"
        )
    again: dict[int, float] = {}
    if rerank is not None:
        for done, index in enumerate(best, start=len(candidates) + 1):
            again[index], took = _cached(cache_dir, key, "rerank", candidates[index].shape, rerank)
            seconds[index] += took
            progress(done, total, candidates[index], again[index])
    order = [best[i] for i in _finite([again[index] for index in best])] if again else best
    winner = order[0] if order else best[0]
    scored = [
        _scored(candidate, losses[i], seconds[i], again.get(i), winner=i == winner)
        for i, candidate in enumerate(candidates)
    ]
    costs = {name: value for name, value in dataclasses.asdict(dense_costs).items() if value is not None}
    return Frontier(
        key=key,
        target=target,
        load=load or {},
        dense=costs,
        dense_sizes=sizes_of(dense),
        candidates=tuple(scored),
    )


def write_frontier(frontier: Frontier, out_dir: Path) -> Path:
    """Write frontier.json."""
    path = out_dir / FRONTIER_FILE
    write_atomically(path, frontier.model_dump_json(indent=1) + "\n")
    return path


def read_frontier(directory: Path) -> Frontier | None:
    """The frontier that a search left in `directory`; None where there was no search."""
    try:
        return Frontier.model_validate_json((directory / FRONTIER_FILE).read_bytes())
    except FileNotFoundError:
        return None


class _Kept(Frozen):
    """A score on disk."""

    key: str
    which: Pass
    sizes: dict[str, int]
    value: float
    seconds: float


def _cached(cache_dir: Path, key: str, which: Pass, shape: ModelShape, scorer: Scorer) -> tuple[float, float]:
    """The score and the seconds it took, from disk where it is there."""
    sizes = sizes_of(shape)
    named = json.dumps([key, which, sizes], sort_keys=True)
    path = cache_dir / f"{which}-{hashlib.sha256(named.encode()).hexdigest()[:24]}.json"
    try:
        kept = _Kept.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        pass
    except ValidationError:
        log.warning("%s cannot be read; scoring again", path)
    else:
        if (kept.key, kept.which, kept.sizes) == (key, which, sizes):
            return kept.value, kept.seconds
    started = time.monotonic()
    value = scorer(shape)
    took = time.monotonic() - started
    log.info("%s of %s: %.4f nats/token, %.0f s", which, sizes, value, took)
    write_atomically(path, _Kept(key=key, which=which, sizes=sizes, value=value, seconds=took).model_dump_json() + "\n")
    return value, took


def _finite(values: Sequence[float]) -> list[int]:
    """Indices of the finite values, the smallest first, equal ones in their order."""
    return sorted((i for i, value in enumerate(values) if math.isfinite(value)), key=lambda i: (values[i], i))


def _scored(candidate: Candidate, kl: float, seconds: float, reranked: float | None, *, winner: bool) -> Scored:
    costs = candidate.costs
    return Scored(
        sizes=sizes_of(candidate.shape),
        cut=candidate.cut,
        params=costs.params,
        memory_gb=costs.memory_gb,
        latency_ms=costs.latency_ms,
        throughput=costs.throughput,
        prior=candidate.prior,
        kl=kl,
        seconds=seconds,
        reranked=reranked,
        winner=winner,
    )
