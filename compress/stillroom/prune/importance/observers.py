"""What watches a module during the calibration pass, and how it is put there and taken away.

An observer is a forward hook with a streamed accumulator: what it holds does not grow with the text. It is known by
what it measures and by the module's name, so anything that runs modules of those names may be observed: a model in
memory, or one that is brought from disk layer by layer.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

from torch import Tensor, nn

from stillroom.errors import InputError


class Observer(Protocol):
    """A forward hook that adds up."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        """Take one batch in."""
        ...

    def result(self) -> Tensor:
        """The score so far, float64 on the CPU."""
        ...


Key = tuple[str, str, str]
"""The metric, what it scores, and the module's name."""
Observers = dict[Key, Observer]
"""In about the order of the forward pass, so that the first that is not finite is where it began."""
Results = dict[Key, Tensor]


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The hidden states that a module was called with, positionally or not."""
    states: Tensor = args[0] if args else kwargs["hidden_states"]
    return states.detach()


def output_of(output: Any) -> Tensor:
    """The hidden states that a module returned, alone or first of a tuple."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states.detach()


@contextmanager
def observed(model: nn.Module, observers: Mapping[Key, Observer]) -> Iterator[None]:
    """While open, each observer sees every call of its module of `model`."""
    with ExitStack() as stack:
        for (_, _, name), observer in observers.items():
            handle = model.get_submodule(name).register_forward_hook(observer, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def results_of(observers: Mapping[Key, Observer]) -> Results:
    """Every score. Raises InputError naming the first module where one is NaN or infinite."""
    results = {key: observer.result() for key, observer in observers.items()}
    for (_, _, module), result in results.items():
        if not result.isfinite().all():
            raise InputError(
                f"activations at {module} are NaN or infinite on the calibration text: the weights are damaged, "
                "or the activations overflow float16 (then use dtype: bfloat16)"
            )
    return results
