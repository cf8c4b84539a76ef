"""Importance of a model that does not fit in memory: its layers are brought from disk one by one.

The checkpoint is read once for all that needs activations, and once more, tensor by tensor, for weight magnitudes.
Activations come in the same batches as in memory and are the same, bit for bit. Scores are too, but for those that
multiply weights themselves (`contribution`): there the last bits depend on how a tensor lies in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from torch import Tensor

from stillroom.errors import InputError
from stillroom.models.disk import layerwise_forward
from stillroom.models.shape import ModelShape
from stillroom.prune.importance.magnitude import magnitudes, reader_of_files
from stillroom.prune.importance.measure import gather, needs_gradients, needs_weights, observers_for
from stillroom.prune.importance.names import DepthMethod, Wanted, WidthMethod
from stillroom.prune.importance.observers import observed, results_of
from stillroom.prune.importance.scores import Importance


def measure_from_disk(
    model_dir: Path,
    shape: ModelShape,
    windows_NT: Tensor,
    *,
    batch_size: int,
    wanted: frozenset[Wanted],
    scratch_dir: Path,
    width: WidthMethod = "minitron",
    depth: Sequence[DepthMethod] = ("block_influence",),
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Importance:
    """`measure` of a checkpoint directory; hidden states that are large go to `scratch_dir`.

    Raises InputError for what `measure` does (NaN and infinite activations are found at the end), and for Taylor, whose
    backward pass wants the whole model; EnvironmentCannot for what is no decoder, and for a full disk.
    """
    if needs_gradients(wanted, (width,), depth):
        raise InputError(
            f"{model_dir} does not fit in memory, and taylor needs all of it for its backward pass; use another "
            "method, or a machine with more memory"
        )
    observers = observers_for(shape, wanted, width=(width,), depth=depth)
    if observers:
        layerwise_forward(
            model_dir,
            shape,
            windows_NT,
            batch_size=batch_size,
            observed=lambda model: observed(model, observers),
            scratch_dir=scratch_dir,
            progress=progress,
        )
    weights = None
    if needs_weights(wanted, (width,), depth):
        weights = magnitudes(shape, reader_of_files(model_dir, shape.family))
    return gather(
        shape,
        wanted,
        results_of(observers),
        width,
        depth,
        num_windows=len(windows_NT),
        num_tokens=windows_NT.numel(),
        weights=weights,
        seed=seed,
    )
