"""Every method by its name: what must be measured for it, and how its scores come from that.

A new method is a module, a name in names.py and a line here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from stillroom.models.shape import ModelShape
from stillroom.prune.importance import activations, angular, block_influence, contribution, controls, experts, taylor
from stillroom.prune.importance.magnitude import Magnitudes
from stillroom.prune.importance.names import DepthMethod, Wanted, WidthMethod
from stillroom.prune.importance.observers import Observers, Results
from stillroom.prune.importance.points import Points
from stillroom.prune.importance.scores import Importance, WidthScores
from stillroom.prune.width import strongest


@dataclass(frozen=True)
class Evidence:
    """All that was measured, whichever methods it was measured for."""

    shape: ModelShape
    points: Points
    wanted: frozenset[Wanted]
    results: Results
    gates: taylor.Gates
    weights: Magnitudes | None
    seed: int

    @property
    def measured_weights(self) -> Magnitudes:
        """The weights' magnitudes, which the method asked for."""
        assert self.weights is not None
        return self.weights


def _nothing(shape: ModelShape, points: Points, wanted: frozenset[Wanted]) -> Observers:
    return {}


@dataclass(frozen=True)
class Width:
    """A way to score channels and heads."""

    scores: Callable[[Evidence], WidthScores]
    observers: Callable[[ModelShape, Points, frozenset[Wanted]], Observers] = _nothing
    """What it needs of activations."""
    gradients: bool = False
    weights: bool = False


@dataclass(frozen=True)
class Depth:
    """A way to score layers: (layers,), or for `angular` the distances of all blocks."""

    scores: Callable[[Evidence], Tensor]
    observers: Callable[[Points], Observers] = lambda points: {}
    gradients: bool = False
    weights: bool = False


def _activations(metric: activations.Magnitude) -> Width:
    def scores(evidence: Evidence) -> WidthScores:
        found = activations.tables(metric, evidence.shape, evidence.results)
        return found.joined(experts.tables(metric, evidence.results, evidence.wanted))

    def observers(shape: ModelShape, points: Points, wanted: frozenset[Wanted]) -> Observers:
        return activations.observers(metric, points, wanted) | experts.observers(shape, points, wanted)

    return Width(scores, observers)


def _contribution() -> Width:
    def scores(evidence: Evidence) -> WidthScores:
        found = contribution.tables(evidence.results)
        return found.joined(experts.tables("contribution", evidence.results, evidence.wanted))

    def observers(shape: ModelShape, points: Points, wanted: frozenset[Wanted]) -> Observers:
        return contribution.observers(shape, points, wanted) | experts.observers(shape, points, wanted)

    return Width(scores, observers)


_MINITRON = _activations("minitron")

WIDTH_METHODS: dict[WidthMethod, Width] = {
    "minitron": _MINITRON,
    "mean_abs": _activations("mean_abs"),
    "l2": _activations("l2"),
    "contribution": _contribution(),
    "magnitude": Width(lambda evidence: evidence.measured_weights.width.only(evidence.wanted), weights=True),
    "taylor": Width(lambda evidence: taylor.tables(evidence.gates), gradients=True),
    "random": Width(lambda evidence: controls.random_width(evidence.shape, evidence.wanted, evidence.seed)),
    "reversed": Width(lambda evidence: controls.reversed_width(_MINITRON.scores(evidence)), _MINITRON.observers),
}

DEPTH_METHODS: dict[DepthMethod, Depth] = {
    "block_influence": Depth(
        lambda evidence: block_influence.scores(evidence.results),
        lambda points: block_influence.observers(points.layers),
    ),
    "angular": Depth(
        lambda evidence: angular.distances(evidence.results, evidence.points.stacks),
        lambda points: angular.observers(points.stacks),
    ),
    "magnitude": Depth(lambda evidence: evidence.measured_weights.layers, weights=True),
    "taylor": Depth(lambda evidence: taylor.layer_scores(evidence.gates), gradients=True),
    "random": Depth(lambda evidence: controls.random_layers(evidence.shape, evidence.seed)),
    "reversed": Depth(
        lambda evidence: -block_influence.scores(evidence.results),
        lambda points: block_influence.observers(points.layers),
    ),
}


def keep_layers(
    scores: Importance, method: DepthMethod, num_layers: int, among: range | None = None
) -> tuple[int, ...]:
    """The `num_layers` layers that stay by a depth method that was measured, ascending; of equal ones the lower stays.

    `among` are the layers of one stack, all of them by default. `angular` cuts one contiguous block, the others the
    layers that score least.
    """
    table = scores.layers[method]
    if method == "angular":
        among = among or range(len(table) - 1)
        block = angular.closest_block(table, len(among) - num_layers, among)
        return tuple(layer for layer in among if layer not in block)
    among = among or range(len(table))
    return tuple(among[i] for i in strongest([table[layer].item() for layer in among], num_layers))
