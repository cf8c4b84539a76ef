"""Which shapes a search looks at: those on the edge of the budget, snapped to what kernels and GPUs take.

Every cost falls when any size falls, so the shapes worth scoring are the maximal ones: they fit, and no size of them
could be one step larger and still fit. Widths are multiples of 128 x tensor_parallel (each shard's FP8 and NVFP4
blocks), or of 64, 32 or 16 where a model is so small that 128 leaves fewer than four sizes; heads and KV groups divide
among the GPUs; what GQA, engines or transformers forbid is asked of targets.check_sizes.

Thousands of shapes lie on that edge, and each score costs a cut, a repair and a measurement, so a prior orders them:

    prior = sum over axes of weight * ln(kept share)^2        weight: 1 for layers and FFN, 2 for hidden and heads

A square prefers several moderate cuts to one deep one, and the weights spare what every layer reads and writes; both
are Minitron's advice (arXiv 2407.14679 and 2408.11796: width over depth, heads left alone), as is the limit on each
axis (ModelOpt 0.47's own search stops at 40% of the widths and 20% of the depth by default). The prior only orders: no
set of cut axes takes more than a quarter of the places, and the best shapes that cut depth alone, widths alone and FFN
channels alone always have one, so the measurement can contradict it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from stillroom.errors import InputError
from stillroom.models.shape import ModelShape
from stillroom.prune.correction import Correction, fit_table, load_table
from stillroom.prune.cost import Costs, Hardware, Load, check_load, load_of
from stillroom.prune.targets import check_sizes
from stillroom.recipe import Target

CutKind = Literal["depth", "width", "both"]

WIDTH_STEPS = (128, 64, 32, 16)
LEAST_STEP = {"nvfp4": 32}
"""NVFP4's blocks of 16, two to a kernel's row; the other schemes take 16."""
ENOUGH_SIZES = 4
AXIS_WEIGHTS = {
    "num_layers": 1.0,
    "intermediate_size": 1.0,
    "moe_intermediate_size": 1.0,
    "num_experts": 1.0,
    "hidden_size": 2.0,
    "num_attention_heads": 2.0,
    "num_key_value_heads": 0.0,
}
"""KV groups go with their query heads, and are not counted twice. Of an encoder-decoder the encoder's layers count; the
decoder keeps its own."""
EXPERT_PARTS = 8
"""Experts are kept in eighths of what there are."""

FfnField = Literal["intermediate_size", "moe_intermediate_size"]
WidthField = FfnField | Literal["hidden_size"]


@dataclass(frozen=True)
class Candidate:
    """A shape that fits the target."""

    shape: ModelShape
    """The dense model's, with other sizes; its `config` is still the dense one's."""
    costs: Costs
    cut: CutKind
    prior: float
    """Small for moderate cuts."""


@dataclass(frozen=True)
class Pricing:
    """All that prices a shape for a target."""

    target: Target
    load: Load
    hardware: Hardware | None
    correction: Correction

    def costs(self, shape: ModelShape) -> Costs:
        return self.correction.costs(shape, self.load, self.hardware)

    def fits(self, shape: ModelShape) -> bool:
        """Whether a shape meets every target; parameters are asked first, being the cheapest to count."""
        most = self.target.params
        return (most is None or shape.num_params <= most) and not self.missed(self.costs(shape))

    def missed(self, costs: Costs) -> dict[str, float]:
        """The targets that these costs miss, with what they reach instead; `gpu_memory` where the GPU is too small."""
        reached = {"params": costs.params, "memory_gb": costs.memory_gb, "latency_ms": costs.latency_ms,
                   "throughput": costs.throughput}  # fmt: skip
        missed: dict[str, float] = {}
        for name, wanted in self.target.given().items():
            value = reached[name]
            assert value is not None  # a speed is a target only with hardware
            if value < wanted if name == "throughput" else value > wanted:
                missed[name] = value
        if self.hardware is not None and costs.memory_gb > self.hardware.memory_gb:
            missed["gpu_memory"] = costs.memory_gb
        return missed


def price_target(target: Target, dense: ModelShape, hardware: Hardware | None) -> Pricing:
    """How shapes of a model are priced for a target; `hardware` is the figures of `target.hardware`, and gives way to
    those of a measured table that has them.

    Raises InputError where speeds cannot be priced (cost.check_load), or the measured table is not of that hardware.
    """
    load = load_of(target)
    table = None if target.measured is None else load_table(target.measured)
    if hardware is None or target.hardware is None:
        return Pricing(target, load, None, Correction())
    if table is not None and table.figures is not None:
        hardware = table.figures
    check_load(load, target.hardware, hardware, dense)
    correction = Correction() if table is None else fit_table(table, load, target.hardware, hardware)
    return Pricing(target, load, hardware, correction)


def candidates(dense: ModelShape, pricing: Pricing) -> list[Candidate]:
    """The shapes to score, at most `target.candidates`, in the order in which they are worth scoring.

    The best pure-depth and the best pure-width shape come first, where any of that kind fits. The same inputs give the
    same list. Raises InputError where the dense model already meets the target, or no allowed shape does: it names the
    nearest values that can be reached.
    """
    _check_dense(dense, pricing)
    grid = _grid(dense, pricing)
    edge = _maximal(_edge(dense, grid, pricing))
    if not edge:
        _raise_unreachable(dense, grid, pricing)
    found = sorted((_candidate(dense, shape, pricing) for shape in edge), key=_order)
    return _choose(dense, found, pricing.target.candidates)


def sizes_of(shape: ModelShape) -> dict[str, int]:
    """The sizes that the search changes, those that the family has."""
    return {axis: size for axis in AXIS_WEIGHTS if (size := getattr(shape, axis))}


def cut_of(dense: ModelShape, shape: ModelShape) -> CutKind:
    """Which kind of sizes are smaller."""
    axes = cut_axes(dense, shape)
    if "num_layers" in axes:
        return "depth" if len(axes) == 1 else "both"
    return "width"


def cut_axes(dense: ModelShape, shape: ModelShape) -> tuple[str, ...]:
    """Which sizes are smaller."""
    return tuple(axis for axis, size in sizes_of(shape).items() if size < getattr(dense, axis))


def prior_of(dense: ModelShape, shape: ModelShape) -> float:
    """How deep the cuts are; 0 for the dense shape."""
    return sum(
        AXIS_WEIGHTS[axis] * math.log(size / getattr(dense, axis)) ** 2 for axis, size in sizes_of(shape).items()
    )


@dataclass(frozen=True)
class _Grid:
    """Allowed sizes, ascending; the dense model's own is the last of each."""

    layers: tuple[int, ...]
    ffn: tuple[int, ...]
    ffn_field: FfnField
    narrow: tuple[ModelShape, ...]
    """The dense shape with every allowed combination of hidden size, heads, KV groups and experts."""

    def shape(self, start: ModelShape, num_layers: int, ffn: int) -> ModelShape:
        return _with(dataclasses.replace(start, num_layers=num_layers), self.ffn_field, ffn)


def _grid(dense: ModelShape, pricing: Pricing) -> _Grid:
    target = pricing.target
    least = _least(target.max_cut)
    heads = _head_choices(dense, target)
    steps = [s for s in WIDTH_STEPS if s >= LEAST_STEP.get(target.scheme, 0)]
    if target.multiple_of is not None:
        steps = [target.multiple_of]

    def sizes(field: WidthField, starts: Sequence[ModelShape]) -> tuple[int, ...]:
        """Multiples at the largest step that leaves enough of them, or else at the smallest."""
        own = getattr(dense, field)
        smaller: list[int] = []
        for step in steps:
            unit = step * target.tensor_parallel
            multiples = range(-(-least(own) // unit) * unit, own, unit)
            smaller = [n for n in multiples if any(_can_be(dense, _with(start, field, n)) for start in starts)]
            if len(smaller) >= ENOUGH_SIZES:
                break
        return (*smaller, own)

    narrow = [
        wanted
        for hidden in sizes("hidden_size", heads)
        for start in heads
        for experts in _expert_choices(dense, target)
        if _can_be(dense, wanted := dataclasses.replace(start, hidden_size=hidden, num_experts=experts))
    ]
    ffn_field: FfnField = "moe_intermediate_size" if dense.num_experts else "intermediate_size"
    layers = tuple(range(max(1, least(dense.num_layers)), dense.num_layers + 1))
    return _Grid(layers, sizes(ffn_field, [dense]), ffn_field, tuple(narrow))


def _head_choices(dense: ModelShape, target: Target) -> list[ModelShape]:
    """The dense shape with each allowed number of KV groups and query heads.

    Raises InputError where tensor parallelism allows none, the dense model's own among them.
    """
    least, gpus = _least(target.max_cut), target.tensor_parallel
    each = dense.num_attention_heads // dense.num_key_value_heads
    shapes = [
        dataclasses.replace(dense, num_key_value_heads=groups, num_attention_heads=groups * heads)
        for groups in range(1, dense.num_key_value_heads + 1)
        if groups % gpus == 0 or gpus % groups == 0
        for heads in range(1, each + 1)
        if groups * heads % gpus == 0 and groups * heads >= least(dense.num_attention_heads)
    ]
    if not shapes:
        raise InputError(
            f"tensor_parallel {gpus} divides no number of heads that {dense.num_attention_heads} heads in "
            f"{dense.num_key_value_heads} KV groups can be cut to; use one of "
            f"{[n for n in range(1, dense.num_attention_heads + 1) if dense.num_attention_heads % n == 0]}"
        )
    return shapes


def _expert_choices(dense: ModelShape, target: Target) -> list[int]:
    """Numbers of experts to keep, not fewer than a token is sent to; a single 0 where there are none."""
    least = max(_least(target.max_cut)(dense.num_experts), dense.num_experts_per_token)
    eighths = {dense.num_experts * part // EXPERT_PARTS for part in range(1, EXPERT_PARTS + 1)}
    return sorted(n for n in eighths if n >= least and n % target.tensor_parallel == 0) or [dense.num_experts]


def _least(max_cut: float) -> Callable[[int], int]:
    """The smallest size that an axis may be cut to; the tiny term keeps 0.5 x 36 at 18."""
    return lambda size: math.ceil((1 - max_cut) * size - 1e-9)


def _with(shape: ModelShape, field: WidthField, size: int) -> ModelShape:
    if field == "hidden_size":
        return dataclasses.replace(shape, hidden_size=size)
    if field == "moe_intermediate_size":
        return dataclasses.replace(shape, moe_intermediate_size=size)
    return dataclasses.replace(shape, intermediate_size=size)


def _can_be(dense: ModelShape, wanted: ModelShape) -> bool:
    """Whether engines and transformers take these sizes."""
    try:
        check_sizes(dense, wanted)
    except InputError:
        return False
    return True


def _edge(dense: ModelShape, grid: _Grid, pricing: Pricing) -> list[ModelShape]:
    """For each combination of the other sizes, the staircase of layers against FFN channels that just fit."""
    edge: list[ModelShape] = []
    for start in grid.narrow:
        step = len(grid.ffn) - 1
        for layers in grid.layers:  # with more layers the FFN only gets narrower, so the staircase is walked once
            while step >= 0:
                shape = grid.shape(start, layers, grid.ffn[step])
                if pricing.fits(shape):
                    edge.append(shape)
                    break
                step -= 1
    return [shape for shape in edge if sizes_of(shape) != sizes_of(dense)]


def _maximal(shapes: Sequence[ModelShape]) -> list[ModelShape]:
    """Those that no other one contains. A shape is contained only in one whose sizes sum to more."""
    kept: list[tuple[tuple[int, ...], ModelShape]] = []
    for shape in sorted(shapes, key=lambda s: (-sum(sizes_of(s).values()), *sizes_of(s).values())):
        sizes = tuple(sizes_of(shape).values())
        if not any(all(a <= b for a, b in zip(sizes, other, strict=True)) for other, _ in kept):
            kept.append((sizes, shape))
    return [shape for _, shape in kept]


def _candidate(dense: ModelShape, shape: ModelShape, pricing: Pricing) -> Candidate:
    return Candidate(shape, pricing.costs(shape), cut_of(dense, shape), prior_of(dense, shape))


def _order(candidate: Candidate) -> tuple[float, ...]:
    """By the prior; of equal ones the larger first, then by sizes, so that the order is always the same."""
    return (candidate.prior, -candidate.costs.params, *sizes_of(candidate.shape).values())


def _choose(dense: ModelShape, found: Sequence[Candidate], count: int) -> list[Candidate]:
    """The best that cut depth alone, widths alone and FFN channels alone, then by the prior with at most a quarter of
    the places for each set of cut axes."""
    alone: list[Callable[[Candidate], bool]] = [
        lambda c: c.cut == "depth",
        lambda c: c.cut == "width",
        lambda c: cut_axes(dense, c.shape) in (("intermediate_size",), ("moe_intermediate_size",)),
    ]
    first = [next((c for c in found if is_alone(c)), None) for is_alone in alone]
    chosen = [c for i, c in enumerate(first) if c is not None and c not in first[:i]][:count]
    taken = Counter(cut_axes(dense, c.shape) for c in chosen)
    share = max(2, count // 4)
    rest = [c for c in found if c not in chosen]
    crowded: list[Candidate] = []
    for candidate in rest:
        axes = cut_axes(dense, candidate.shape)
        (chosen if taken[axes] < share else crowded).append(candidate)
        taken[axes] += 1
    return (chosen + crowded)[:count]


def _check_dense(dense: ModelShape, pricing: Pricing) -> None:
    """Raise InputError where there is nothing to cut."""
    costs = pricing.costs(dense)
    if pricing.missed(costs):
        return
    raise InputError(
        f"target {_words(pricing.target)} is already met by the model itself: {_reached(costs)}. Pruning only cuts: "
        "give a harder target"
    )


def _raise_unreachable(dense: ModelShape, grid: _Grid, pricing: Pricing) -> None:
    """Name the nearest values: every cost falls with every size, so they are those of the smallest shapes."""
    smallest = [pricing.costs(grid.shape(start, grid.layers[0], grid.ffn[0])) for start in grid.narrow]
    nearest = Costs(
        params=min(c.params for c in smallest),
        memory_gb=min(c.memory_gb for c in smallest),
        latency_ms=None if pricing.hardware is None else min(c.latency_ms or math.inf for c in smallest),
        throughput=None if pricing.hardware is None else max(c.throughput or 0.0 for c in smallest),
    )
    missed = pricing.missed(nearest)
    reachable = [name for name in pricing.target.given() if name not in missed]
    if "gpu_memory" in missed:
        raise InputError(
            f"batch {pricing.load.batch} x context {pricing.load.context} takes {nearest.memory_gb:.4g} GB on each GPU "
            f"even with the smallest shape, and {pricing.target.hardware} has {_gpu_gb(pricing):.4g}; lower batch or "
            "context, or raise tensor_parallel"
        )
    parts = [
        f"{name} {pricing.target.given()[name]:g} (nearest {_number(name, value)})" for name, value in missed.items()
    ]
    beside = f"; {' and '.join(reachable)} can be reached" if reachable else ""
    raise InputError(
        f"target cannot be reached with at most {pricing.target.max_cut:.0%} of each size cut: {', '.join(parts)}"
        f"{beside}. Give the nearest value or an easier one, raise max_cut, or let a quantized scheme do part of it"
    )


def _gpu_gb(pricing: Pricing) -> float:
    assert pricing.hardware is not None
    return pricing.hardware.memory_gb


def _number(name: str, value: float) -> str:
    """Rounded to the side that can be reached."""
    if name == "params":
        return f"{value:.0f}"
    digits = 3 - math.floor(math.log10(value))
    scaled = value * 10.0**digits
    rounded = math.floor(scaled) if name == "throughput" else math.ceil(scaled)
    return f"{rounded / 10.0**digits:g}"


def _words(target: Target) -> str:
    return ", ".join(f"{name} {value:g}" for name, value in target.given().items())


def _reached(costs: Costs) -> str:
    words = [f"params {costs.params}", f"memory_gb {costs.memory_gb:.4g}"]
    if costs.latency_ms is not None and costs.throughput is not None:
        words += [f"latency_ms {costs.latency_ms:.4g}", f"throughput {costs.throughput:.4g}"]
    return ", ".join(words)
