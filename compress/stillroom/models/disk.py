"""Run a decoder that does not fit in memory: one layer at a time, brought from the checkpoint on disk.

A forward pass goes batch by batch through all layers. Here all batches go through one layer before the next is read,
so the checkpoint is read once, and what is held is one layer (or the embeddings) and the hidden states of all windows.
Those go to a file where they are large, too: 1,024 windows of 2,048 tokens and 4,096 channels are 17 GB in bfloat16.
The model is built without weights, and transformers' own loader puts each layer's tensors in, fused experts and all.
So its modules are the ones that hooks know, and they compute bit for bit what they would in the whole model.

Shapes: N windows, B batch, T tokens, D hidden.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import IO, Any

import psutil
import torch
from accelerate import init_empty_weights  # type: ignore[import-untyped]
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging as transformers_logging

from stillroom.errors import EnvironmentCannot
from stillroom.machine import WEIGHTS_SHARE, this_machine
from stillroom.models.blocks import Blocks
from stillroom.models.load import DTYPES, pick_device
from stillroom.models.shape import ModelShape
from stillroom.models.tensors import TORCH_DTYPES, read_tensor
from stillroom.models.weights import TensorEntry, family_entries, tensor_entries

STATES_SHARE = 0.1
"""The share of free memory that the hidden states of all windows may take before they go to a file."""


def too_large(model_dir: Path) -> bool:
    """The checkpoint's weights do not fit where models are run: the first GPU, or this machine's free memory."""
    num_bytes = sum(entry.num_bytes for entry in tensor_entries(model_dir).values())
    room = torch.cuda.mem_get_info()[0] if torch.cuda.is_available() else _free_memory_bytes()
    return num_bytes > WEIGHTS_SHARE * room


def layerwise_forward(
    model_dir: Path,
    shape: ModelShape,
    windows_NT: Tensor,
    *,
    batch_size: int,
    observed: Callable[[nn.Module], AbstractContextManager[None]],
    scratch_dir: Path,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> None:
    """Run every layer and the final norm over windows of token ids, in batches of `batch_size`, without the head.

    `observed(model)` is open while they run: hooks on the layers' modules and on the final norm see what they would in
    a forward pass, but all batches of a layer come before the next layer's. Weights are there only while their layer
    runs, on the meta device otherwise. Hidden states that are large lie in a nameless file in `scratch_dir`.
    `progress` is told windows done and in all, each counted when it has been through its share of the layers.
    Raises InputError where the checkpoint cannot be read, EnvironmentCannot for what is no decoder.
    """
    parts = _Parts(model_dir, shape)
    batches = torch.split(windows_NT, batch_size)
    held = windows_NT.numel() * shape.hidden_size * parts.dtype.itemsize <= STATES_SHARE * _free_memory_bytes()
    with torch.inference_mode(), HiddenStates(None if held else scratch_dir) as states:
        with parts.loaded(parts.outside_layers):
            states.replace_all(parts.blocks.embed(batch_BT) for batch_BT in batches)
        with observed(parts.model):
            for layer in range(shape.num_layers):
                with parts.loaded(parts.of_layer(layer)):
                    states.replace_all(parts.blocks.layer(layer, hidden.to(parts.device)) for hidden in states)
                progress((layer + 1) * len(windows_NT) // (shape.num_layers + 1), len(windows_NT))
            with parts.loaded(parts.of_final_norm):
                for hidden_BTD in states:
                    parts.blocks.normed(hidden_BTD.to(parts.device))
    progress(len(windows_NT), len(windows_NT))


class HiddenStates:
    """The hidden states of all batches, on the CPU: a list, or a nameless file in a directory where one is given.

    Iterating reads them in order; `replace_all` may be given what is computed from that very iteration.
    """

    def __init__(self, directory: Path | None) -> None:
        self._file: IO[bytes] | None = None
        if directory is not None:
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115  (closed by __exit__)
        self._states: list[Tensor] = []
        """In memory; with a file, on the meta device, for their shapes and dtypes."""

    def __enter__(self) -> HiddenStates:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()

    def __iter__(self) -> Iterator[Tensor]:
        start = 0
        for state in self._states:
            yield state if self._file is None else self._read(state, start)
            start += state.nbytes

    def replace_all(self, states: Iterable[Tensor]) -> None:
        """Put these in the place of the ones that are there. Raises EnvironmentCannot for a full disk."""
        start = 0
        for index, state in enumerate(states):
            kept = state.cpu() if self._file is None else state.to("meta")
            self._states[index : index + 1] = [kept]
            if self._file is not None:
                self._write(state.cpu(), start)
            start += state.nbytes

    def _read(self, like: Tensor, start: int) -> Tensor:
        assert self._file is not None
        state = torch.empty_like(like, device="cpu")
        data = _bytes_of(state)
        done = 0
        while done < len(data):
            done += os.preadv(self._file.fileno(), [data[done:]], start + done)
        return state

    def _write(self, state: Tensor, start: int) -> None:
        assert self._file is not None
        data = _bytes_of(state.contiguous())
        done = 0
        try:
            while done < len(data):
                done += os.pwrite(self._file.fileno(), data[done:], start + done)
        except OSError as error:
            raise EnvironmentCannot(
                f"no room for the hidden states of the calibration text ({error.strerror}); free some disk, or give "
                "fewer samples or a shorter sequence_length"
            ) from error


class _Parts:
    """A model without weights, and what brings those of its parts in and takes them out again."""

    def __init__(self, model_dir: Path, shape: ModelShape) -> None:
        if shape.family.task != "causal_lm":
            raise EnvironmentCannot(
                f"{model_dir} does not fit in memory, and only decoders can be run layer by layer from disk; "
                f"{shape.family.model_type} is none: use a machine with more memory"
            )
        self.family, self.device = shape.family, pick_device()
        self.entries = family_entries(model_dir, shape.family)
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
        self.dtype = _dtype_of(shape, self.entries)
        with init_empty_weights(include_buffers=False):
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=self.dtype).eval()
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = buffer if buffer is None else buffer.to(self.device)
        self.blocks = Blocks(self.model, shape.family)
        self._load_config = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=self.dtype,
            dtype_plan=self.model._get_dtype_plan(self.dtype),
            weight_mapping=get_model_conversion_mapping(self.model),
        )

    @property
    def outside_layers(self) -> dict[str, TensorEntry]:
        """Embeddings and final norm: all but the layers and the head."""
        heads = ("lm_head.", *self.family.tied_tensors)
        return {n: e for n, e in self.entries.items() if not n.startswith((f"{self.family.layers}.", *heads))}

    @property
    def of_final_norm(self) -> dict[str, TensorEntry]:
        name = self.family.final_norm
        return {n: e for n, e in self.entries.items() if n.startswith(f"{name}.")} if name else {}

    def of_layer(self, layer: int) -> dict[str, TensorEntry]:
        return {n: e for n, e in self.entries.items() if n.startswith(f"{self.family.layers}.{layer}.")}

    @contextmanager
    def loaded(self, entries: dict[str, TensorEntry]) -> Iterator[None]:
        """While open, the parameters that these tensors make are in the model."""
        bars = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            tensors = {name: read_tensor(entry) for name, entry in entries.items()}
            convert_and_load_state_dict_in_model(self.model, tensors, self._load_config, tp_plan=None)
        finally:
            if bars:
                transformers_logging.enable_progress_bar()
        del tensors
        try:
            yield
        finally:
            for module in self.model.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None and not parameter.is_meta:
                        empty = torch.empty_like(parameter, device="meta")
                        module._parameters[name] = nn.Parameter(empty, requires_grad=False)


def _dtype_of(shape: ModelShape, entries: dict[str, TensorEntry]) -> torch.dtype:
    """What transformers would open the checkpoint in: the config's type, else its first tensor's."""
    named = shape.config.get("dtype") or shape.config.get("torch_dtype")
    return DTYPES[named] if named else TORCH_DTYPES[next(iter(entries.values())).dtype]


def _bytes_of(tensor: Tensor) -> memoryview[Any]:
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _free_memory_bytes() -> int:
    """What this process may still fill: what the machine has free, or its container's limit."""
    return min(psutil.virtual_memory().available, this_machine().memory_bytes)
