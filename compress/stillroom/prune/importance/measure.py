"""Importance of layers, channels, heads and experts on calibration text: one pass serves all that need activations.

Whoever asks names what there is to choose among (`wanted`), the width methods and the depth methods. Their observers
are put on the model together; Taylor's gradients need a pass of their own, weight magnitudes none. Hidden cuts, and
cuts of heads under norms over all heads, also need what these norms' inputs are made of, which is always measured.

A model that does not fit in memory is measured by the same parts (from_disk.py): `observers_for`, `observed` around
whatever runs modules of those names over the text, and `gather`.

    # N windows, T tokens
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillroom.models.shape import ModelShape
from stillroom.prune.importance import forward, norm_inputs, taylor
from stillroom.prune.importance.magnitude import Magnitudes, magnitudes, reader_of
from stillroom.prune.importance.methods import DEPTH_METHODS, WIDTH_METHODS, Evidence
from stillroom.prune.importance.names import DepthMethod, Wanted, WidthMethod, check_method
from stillroom.prune.importance.observers import Observers, Results, observed, results_of
from stillroom.prune.importance.points import Points, points_of
from stillroom.prune.importance.scores import Importance

Progress = Callable[[int, int], None]


def measure(
    model: PreTrainedModel,
    shape: ModelShape,
    windows_NT: Tensor,
    *,
    batch_size: int,
    wanted: frozenset[Wanted],
    width: WidthMethod = "minitron",
    depth: Sequence[DepthMethod] = ("block_influence",),
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> Importance:
    """Scores of everything in `wanted` on windows of token ids; `progress` gets windows done, of all passes.

    `seed` is for `random`, and for what Taylor corrupts of a masked language model's text. Raises InputError for what a
    method cannot score, and, after the first batch already, naming the first module with NaN or infinite activations.
    """
    return measure_each(
        model,
        shape,
        windows_NT,
        batch_size=batch_size,
        wanted=wanted,
        width=(width,),
        depth=depth,
        seed=seed,
        progress=progress,
    )[width]


def measure_each(
    model: PreTrainedModel,
    shape: ModelShape,
    windows_NT: Tensor,
    *,
    batch_size: int,
    wanted: frozenset[Wanted],
    width: Sequence[WidthMethod],
    depth: Sequence[DepthMethod] = ("block_influence",),
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> dict[WidthMethod, Importance]:
    """`measure` by several width methods for comparing them; the passes are shared."""
    observers = observers_for(shape, wanted, width=width, depth=depth)
    sloped = needs_gradients(wanted, width, depth)
    total = len(windows_NT) * (bool(observers) + bool(sloped))
    results = _observe(model, shape, windows_NT, observers, batch_size, lambda done: progress(done, total))
    gates: taylor.Gates = {}
    if sloped:
        before = total - len(windows_NT)
        gates = taylor.gate_gradients(
            model,
            shape,
            windows_NT,
            wanted=sloped,
            seed=seed,
            progress=lambda done: progress(before + done, total),
        )
    weights = magnitudes(shape, reader_of(model)) if needs_weights(wanted, width, depth) else None
    return {
        method: gather(shape, wanted, results, method, depth, num_windows=len(windows_NT),
                       num_tokens=windows_NT.numel(), gates=gates, weights=weights, seed=seed)
        for method in width
    }  # fmt: skip


def observers_for(
    shape: ModelShape, wanted: frozenset[Wanted], *, width: Sequence[WidthMethod], depth: Sequence[DepthMethod]
) -> Observers:
    """All that these methods must see of activations, each thing once, in about the order of the forward pass.

    Raises InputError where a method cannot score what is wanted.
    """
    points = points_of(shape)
    found: Observers = {}
    if "layers" in wanted:
        for depth_method in depth:
            found |= DEPTH_METHODS[depth_method].observers(points)
    for width_method in width:
        check_method(width_method, wanted)
        found |= WIDTH_METHODS[width_method].observers(shape, points, wanted)
    if "hidden" in wanted:
        found |= norm_inputs.observers(points.norms, centred=shape.family.norm == "layer")
    if "heads" in wanted:
        found |= norm_inputs.observers(points.head_norms, centred=False)
    return dict(sorted(found.items(), key=lambda item: _depth_of(item[0][2], points)))


def _depth_of(module: str, points: Points) -> int:
    """The layer that a module is in; those in none come last."""
    inside = (index for index, layer in enumerate(points.layers) if f"{module}.".startswith(f"{layer}."))
    return next(inside, len(points.layers))


def gather(
    shape: ModelShape,
    wanted: frozenset[Wanted],
    results: Results,
    width: WidthMethod,
    depth: Sequence[DepthMethod],
    *,
    num_windows: int,
    num_tokens: int,
    gates: taylor.Gates | None = None,
    weights: Magnitudes | None = None,
    seed: int = 0,
) -> Importance:
    """The tables of one width method and these depth methods, from what was measured for them."""
    evidence = Evidence(shape, points_of(shape), wanted, results, gates or {}, weights, seed)
    layers = {method: DEPTH_METHODS[method].scores(evidence) for method in depth} if "layers" in wanted else {}
    return Importance(
        num_windows=num_windows,
        num_tokens=num_tokens,
        layers=layers,
        norm_shares=norm_inputs.tables(norm_inputs.SHARES, results),
        norm_means=norm_inputs.tables(norm_inputs.MEANS, results),
        **WIDTH_METHODS[width].scores(evidence).tables(),
    )


def needs_gradients(
    wanted: frozenset[Wanted], width: Sequence[WidthMethod], depth: Sequence[DepthMethod]
) -> frozenset[Wanted]:
    """What gradients are needed for."""
    of_layers = any(DEPTH_METHODS[method].gradients for method in depth)
    of_width = any(WIDTH_METHODS[method].gradients for method in width)
    return frozenset(what for what in wanted if (of_layers if what == "layers" else of_width))


def needs_weights(wanted: frozenset[Wanted], width: Sequence[WidthMethod], depth: Sequence[DepthMethod]) -> bool:
    """Whether weights are needed for anything."""
    of_layers = any(DEPTH_METHODS[method].weights for method in depth)
    of_width = any(WIDTH_METHODS[method].weights for method in width)
    return any(of_layers if what == "layers" else of_width for what in wanted)


def _observe(
    model: PreTrainedModel,
    shape: ModelShape,
    windows_NT: Tensor,
    observers: Observers,
    batch_size: int,
    progress: Callable[[int], None],
) -> Results:
    """The observers' results after one pass over the windows; none where there are no observers."""
    if not observers:
        return {}
    modules = {name for _, _, name in observers}
    with torch.inference_mode(), observed(model, observers):
        for start in range(0, len(windows_NT), batch_size):
            batch_BT = windows_NT[start : start + batch_size].to(model.device)
            forward.run(model, shape.family, modules, batch_BT)
            if start == 0:
                results_of(observers)
            progress(min(start + batch_size, len(windows_NT)))
    return results_of(observers)
