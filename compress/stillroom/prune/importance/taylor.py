"""Taylor importance: how fast the loss changes when a channel, head or layer begins to close.

Molchanov et al., "Importance Estimation for Neural Network Pruning", arXiv 1906.10771, section 3, by gates:
with a gate z = 1 on a unit's activation a, the loss without the unit is about L - dL/dz, and

    importance = mean over windows of (dL/dz)^2,   dL/dz = sum over the window of a * dL/da

L is the cross-entropy of the model's own task (forward.py), the mean over the window's tokens. (KL to the dense model
would not do: it is least at the dense model, where its gradient is zero.) A gate on a head closes all its channels at
once, one on a KV group all its heads, one on a layer what the layer adds to the residual stream; a hidden channel has
one at each norm's output, and the importances are summed over norms.

Only gradients of activations are computed: no weight gets one, so the pass needs a model and one window's graph. The
windows go through one by one, with a backward pass each.

    # N windows, T tokens, C channels
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillroom.errors import InputError
from stillroom.models.shape import ModelShape
from stillroom.prune.importance.forward import summed_loss
from stillroom.prune.importance.names import Wanted
from stillroom.prune.importance.points import Points, points_of
from stillroom.prune.importance.scores import WidthScores

Gates = dict[tuple[str, str], Tensor]
"""By what is gated and the module's name: the mean of squared gate gradients, float64 on the CPU."""


class _Gate:
    """The gates of one module's channels, `num_units` of them (all of them if None), or one for a layer."""

    def __init__(self, num_units: int | None) -> None:
        self.num_units = num_units
        self.slopes: Tensor | None = None
        self.total = torch.zeros((), dtype=torch.float64)

    def watch(self, values: Tensor, amount: Tensor) -> None:
        """Add what the backward pass brings for `values`; closing the gates takes `amount` from them, (1, T, C)."""
        kept = amount.detach()

        def backward(gradient: Tensor) -> None:
            slopes_C = (gradient.float() * kept.float()).flatten(0, -2).sum(0, dtype=torch.float64)
            self.slopes = slopes_C if self.num_units is None else slopes_C.reshape(self.num_units, -1).sum(-1)

        values.register_hook(backward)  # type: ignore[no-untyped-call]

    def end_window(self, num_tokens: int) -> None:
        """Add a window whose summed loss was over so many tokens."""
        assert self.slopes is not None
        self.total = self.total + (self.slopes / num_tokens).square().cpu()
        self.slopes = None


def gate_gradients(
    model: PreTrainedModel,
    shape: ModelShape,
    windows_NT: Tensor,
    *,
    wanted: frozenset[Wanted],
    seed: int = 0,
    progress: Callable[[int], None] = lambda done: None,
) -> Gates:
    """Importances of everything in `wanted` from a forward and a backward pass of each window.

    Raises InputError where the loss is NaN or infinite, or, naming the module, a gradient.
    """
    gates = _gates(shape, points_of(shape), wanted)
    with torch.enable_grad(), _only_activations_have_gradients(model), _gated(model, gates):
        for index, window_T in enumerate(windows_NT):
            loss, num_tokens = _checked_loss(model, shape, window_T.to(model.device), seed + index)
            loss.backward()  # type: ignore[no-untyped-call]
            for gate in gates.values():
                gate.end_window(num_tokens)
            progress(index + 1)
    for (_, module), gate in gates.items():
        if not gate.total.isfinite().all():
            raise InputError(
                f"gradients at {module} are NaN or infinite on the calibration text: they overflow the model's type; "
                "use another method than taylor, or dtype: bfloat16"
            )
    return {key: gate.total / len(windows_NT) for key, gate in gates.items()}


def tables(gates: Gates) -> WidthScores:
    """The tables of channels and heads."""
    return WidthScores(
        ffn=_stacked(gates, "ffn"),
        heads=_stacked(gates, "heads"),
        kv_groups=_stacked(gates, "kv_groups"),
        cross_heads=_stacked(gates, "cross_heads"),
        hidden=None if (by_norm := _stacked(gates, "hidden")) is None else by_norm.sum(0),
    )


def layer_scores(gates: Gates) -> Tensor:
    """(layers,)."""
    scores = _stacked(gates, "layers")
    assert scores is not None
    return scores.squeeze(-1)


def _stacked(gates: Gates, what: str) -> Tensor | None:
    found = [gate for (gated, _), gate in gates.items() if gated == what]
    return torch.stack(found) if found else None


def _gates(shape: ModelShape, points: Points, wanted: frozenset[Wanted]) -> dict[tuple[str, str], _Gate]:
    found: dict[tuple[str, str], _Gate] = {}
    if "layers" in wanted:
        found |= {("layers", module): _Gate(1) for module in points.layers}
    if "ffn" in wanted:
        found |= {("ffn", module): _Gate(None) for module in points.ffn}
    if "heads" in wanted:
        found |= {("heads", module): _Gate(shape.num_attention_heads) for module in points.heads}
        found |= {("kv_groups", module): _Gate(shape.num_key_value_heads) for module in points.heads}
        found |= {("cross_heads", module): _Gate(shape.num_attention_heads) for module in points.cross_heads}
    if "hidden" in wanted:
        found |= {("hidden", module): _Gate(None) for module in points.norms}
    return found


def _checked_loss(model: PreTrainedModel, shape: ModelShape, window_T: Tensor, seed: int) -> tuple[Tensor, int]:
    loss, num_tokens = summed_loss(model, shape.family, window_T, seed)
    if not loss.isfinite():
        raise InputError(
            "the loss on the calibration text is NaN or infinite: the weights are damaged, or the activations "
            "overflow float16 (then use dtype: bfloat16)"
        )
    return loss, num_tokens


@contextmanager
def _only_activations_have_gradients(model: PreTrainedModel) -> Iterator[None]:
    """While open, gradients begin at the embeddings and reach no weight."""
    required = {parameter: parameter.requires_grad for parameter in model.parameters()}
    for parameter in required:
        parameter.requires_grad_(False)
    embeddings = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    handles = [e.register_forward_hook(lambda module, args, output: output.requires_grad_()) for e in embeddings]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for parameter, before in required.items():
            parameter.requires_grad_(before)


@contextmanager
def _gated(model: PreTrainedModel, gates: dict[tuple[str, str], _Gate]) -> Iterator[None]:
    with ExitStack() as stack:
        for (what, name), gate in gates.items():
            hook = _hook(what, gate)
            handle = model.get_submodule(name).register_forward_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _hook(what: str, gate: _Gate) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
    """A forward hook that gates a layer's addition to the stream, a module's input, or a norm's output."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before: Tensor = args[0] if args else kwargs["hidden_states"]
        after: Tensor = output[0] if isinstance(output, tuple) else output
        if what == "layers":
            gate.watch(after, after - before)
        elif what == "hidden":
            gate.watch(after, after)
        else:
            gate.watch(before, before)

    return hook
