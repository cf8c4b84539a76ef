"""A decoder taken apart: embeddings, layers one at a time, final norm and head.

What searches and repairs layers (prune/) must run some layers and not others, or two models in step. Each layer of a
transformers model takes arguments beside the hidden states (mask, rotary embeddings, positions) that the model makes
from the batch's size and the layer's kind, never from the tokens while there is no padding. So they are recorded once
a batch size, from the model's own forward pass with layers that pass their input on, and given to the real layers
later. That works for every decoder whose layers map hidden states to hidden states; no family is named here.

Shapes: B batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillroom.models.family import Family

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
"""What a layer is called with after the hidden states."""


class Blocks:
    """The parts of a decoder; running all of them gives what the model itself gives, bit for bit."""

    def __init__(self, model: PreTrainedModel, family: Family) -> None:
        self.model = model
        layers = model.get_submodule(family.layers)
        assert isinstance(layers, nn.ModuleList)
        self.layers: list[nn.Module] = list(layers)
        self.final_norm: nn.Module = model.get_submodule(family.final_norm) if family.final_norm else nn.Identity()
        self._arguments: dict[tuple[int, int], list[Arguments]] = {}

    @torch.no_grad()
    def embed(self, ids_BT: Tensor) -> Tensor:
        """The hidden states that the first layer takes, (B, T, D)."""
        recorded: list[tuple[Tensor, Arguments]] = []
        with self._recording(recorded):
            self.model.base_model(input_ids=ids_BT.to(self.model.device), use_cache=False)
        self._arguments[ids_BT.shape[0], ids_BT.shape[1]] = [arguments for _, arguments in recorded]
        return recorded[0][0]

    def layer(self, index: int, hidden_BTD: Tensor) -> Tensor:
        """The output of one layer; `embed` must have seen a batch of this size."""
        args, kwargs = self._arguments[hidden_BTD.shape[0], hidden_BTD.shape[1]][index]
        output: Tensor = self.layers[index](hidden_BTD, *args, **kwargs)
        return output

    def run(self, hidden_BTD: Tensor, layers: Iterable[int]) -> Tensor:
        """The hidden states after these layers, in their order."""
        for index in layers:
            hidden_BTD = self.layer(index, hidden_BTD)
        return hidden_BTD

    def normed(self, hidden_BTD: Tensor) -> Tensor:
        """What the head takes, from what the last layer gave."""
        output: Tensor = self.final_norm(hidden_BTD)
        return output

    @contextmanager
    def _recording(self, recorded: list[tuple[Tensor, Arguments]]) -> Iterator[None]:
        """While open, each layer notes its arguments and passes the hidden states on."""

        def passing(hidden_BTD: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            recorded.append((hidden_BTD, (args, kwargs)))
            return hidden_BTD

        for layer in self.layers:
            layer.forward = passing
        try:
            yield
        finally:
            for layer in self.layers:
                del layer.forward
