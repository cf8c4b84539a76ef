"""Where a decoder can be repaired: the modules of a layer that write into the residual stream, and those that read it.

A layer's writers are its attention output and its FFN output; its readers are all other matrices over hidden channels,
grouped by the tensor that they read (query, key and value read one, gate and up another). What a site sees and says is
caught by hooks while the layer runs, so that it is right for every layer that transformers knows how to run.

    B batch, T tokens, D hidden, K inputs of a writer
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from stillroom.models.family import Family


@dataclass(frozen=True)
class Site:
    """Modules of one layer that are solved for together, by their names with `{layer}` in them."""

    role: Literal["attention", "ffn", "reader"]
    """`attention` and `ffn` are writers."""
    modules: tuple[str, ...]


def matrix(module: nn.Module) -> Tensor:
    """The weight as (outputs, inputs)."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return oriented(module, weight)


def oriented(module: nn.Module, weight: Tensor) -> Tensor:
    """From the way in which a module holds its weight to (outputs, inputs); GPT-2's Conv1D holds the transpose."""
    return weight.T if isinstance(module, Conv1D) else weight


def set_matrix(module: nn.Module, weight: Tensor) -> None:
    """Replace the weight's values by these, (outputs, inputs)."""
    matrix(module).copy_(weight)


@contextmanager
def caught(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """While open, the last input and output of each of these modules, by name."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def hook_for(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            seen[name] = args[0], output

        return hook

    with ExitStack() as stack:
        for name in names:
            stack.callback(model.get_submodule(name).register_forward_hook(hook_for(name)).remove)
        yield seen


class _Reached(Exception):
    """Unwinds a forward pass that has gone far enough."""


@contextmanager
def caught_until(model: nn.Module, name: str) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """As `caught` for one module, whose call ends the forward pass inside: what follows it is not computed."""

    def stop(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        raise _Reached

    with caught(model, [name]) as seen:
        handle = model.get_submodule(name).register_forward_hook(stop)  # after the one that notes
        try:
            yield seen
        except _Reached:
            pass
        finally:
            handle.remove()


def readers_of(family: Family) -> tuple[str, ...]:
    """Names of the matrices in a layer that read the residual stream."""
    writers = (family.attention_output, family.ffn_output)
    names = (
        name.removesuffix(".weight")
        for name, axes in family.tensors.items()
        if "{layer}" in name and name.endswith(".weight") and len(axes) == 2 and "hidden" in axes
    )
    return tuple(name for name in names if name not in writers)


def grouped(seen: dict[str, tuple[Tensor, Tensor]], names: Sequence[str], layer: int) -> list[Site]:
    """The readers by the tensor that they read, in the order of the forward pass."""
    groups: dict[int, list[str]] = {}
    order = list(seen)
    for name in sorted(names, key=lambda n: order.index(n.format(layer=layer))):
        groups.setdefault(id(seen[name.format(layer=layer)][0]), []).append(name)
    return [Site("reader", tuple(group)) for group in groups.values()]
