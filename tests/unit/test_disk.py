"""Running a decoder layer by layer from disk: the same numbers as in memory, in less of it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stillroom.errors import EnvironmentCannot
from stillroom.models import disk
from stillroom.models.disk import HiddenStates, layerwise_forward, too_large
from stillroom.models.family import families
from stillroom.models.load import load_model
from stillroom.models.shape import ModelShape, read_config, shape_of
from stillroom.prune.importance.measure import gather, measure, observers_for
from stillroom.prune.importance.names import DepthMethod, Wanted
from stillroom.prune.importance.observers import observed, results_of
from tiny import tiny_checkpoint

DECODERS = sorted(name for name, family in families().items() if family.task == "causal_lm")


def windows(num: int = 5, length: int = 12) -> Tensor:
    return torch.randint(3, 384, (num, length), generator=torch.Generator().manual_seed(1))


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of arguments or an output, in order."""
    if isinstance(value, Tensor):
        return [value.clone()]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, (tuple, list)) else ()
    return [tensor for part in parts for tensor in tensors_in(part)]


@contextmanager
def noting(model: nn.Module, shape: ModelShape, seen: dict[str, list[Tensor]]) -> Iterator[None]:
    """While open, all that goes into and out of the modules of layers and the final norm is added to `seen`."""
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if name.startswith(f"{shape.family.layers}.") or name == shape.family.final_norm:

                def note(_: nn.Module, args: Any, kwargs: Any, output: Any, name: str = name) -> None:
                    seen.setdefault(name, []).extend(tensors_in((args, kwargs, output)))

                stack.callback(module.register_forward_hook(note, with_kwargs=True).remove)
        yield


@pytest.mark.parametrize("family", DECODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_module_sees_what_it_sees_in_memory(
    family: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, over two full batches and a short one, with the hidden states in a file."""
    monkeypatch.setattr(disk, "STATES_SHARE", 0.0)
    dense = tiny_checkpoint(tmp_path / "dense", family, dtype=dtype)
    shape = shape_of(read_config(dense), "dense")
    in_memory: dict[str, list[Tensor]] = {}
    from_disk: dict[str, list[Tensor]] = {}
    model = load_model(dense)
    with torch.inference_mode(), noting(model, shape, in_memory):
        for batch in torch.split(windows(), 2):
            model.base_model(input_ids=batch, use_cache=False)
    layerwise_forward(
        dense, shape, windows(), batch_size=2, observed=lambda m: noting(m, shape, from_disk), scratch_dir=tmp_path
    )
    assert len(in_memory[f"{shape.family.layers}.0"]) >= 6
    assert from_disk.keys() == in_memory.keys()
    for name, tensors in in_memory.items():
        assert [t.dtype for t in tensors] == [t.dtype for t in from_disk[name]], name
        assert all(torch.equal(a, b) for a, b in zip(tensors, from_disk[name], strict=True)), name
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_one_layer_is_in_memory_at_a_time(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", tie_word_embeddings=False)
    present: set[tuple[str, ...]] = set()

    @contextmanager
    def watching(model: nn.Module) -> Iterator[None]:
        def note(*_: Any) -> None:
            there = (name for name, parameter in model.named_parameters() if not parameter.is_meta)
            present.add(tuple(sorted({".".join(name.split(".")[:3]) for name in there})))

        for layer in range(4):
            model.get_submodule(f"model.layers.{layer}").register_forward_hook(note)
        yield

    shape = shape_of(read_config(dense), "dense")
    layerwise_forward(dense, shape, windows(), batch_size=2, observed=watching, scratch_dir=tmp_path)
    assert present == {(f"model.layers.{layer}",) for layer in range(4)}


def test_a_config_without_a_dtype_means_that_of_the_weights(tmp_path: Path) -> None:
    """As transformers has it; OpenAI's GPT-2 is such a checkpoint."""
    dense = tiny_checkpoint(tmp_path / "dense", "gpt2")
    config = {name: value for name, value in read_config(dense).items() if name not in ("dtype", "torch_dtype")}
    (dense / "config.json").write_text(json.dumps(config))
    seen: dict[str, list[Tensor]] = {}
    shape = shape_of(config, "dense")
    layerwise_forward(
        dense, shape, windows(), batch_size=2, observed=lambda m: noting(m, shape, seen), scratch_dir=tmp_path
    )
    assert load_model(dense).dtype == seen["transformer.ln_f"][0].dtype == torch.float32


@pytest.mark.parametrize("family", ["gemma3_text", "gpt2", "llama", "qwen3_moe"])
def test_scores_are_those_of_the_model_in_memory(family: str, tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", family)
    shape = shape_of(read_config(dense), "dense")
    wanted: frozenset[Wanted] = frozenset({"layers", "ffn", "heads", "hidden"})
    if shape.num_experts:
        wanted = frozenset({"layers", "heads", "hidden", "experts"})
    depth: tuple[DepthMethod, ...] = ("block_influence", "angular")
    expected = measure(load_model(dense), shape, windows(), batch_size=2, wanted=wanted, depth=depth)
    observers = observers_for(shape, wanted, width=("minitron",), depth=depth)
    told: list[tuple[int, int]] = []
    layerwise_forward(
        dense,
        shape,
        windows(),
        batch_size=2,
        observed=lambda model: observed(model, observers),
        scratch_dir=tmp_path,
        progress=lambda done, total: told.append((done, total)),
    )
    found = gather(shape, wanted, results_of(observers), "minitron", depth, num_windows=5, num_tokens=windows().numel())
    assert_same(dataclasses.asdict(found), dataclasses.asdict(expected))
    assert told == sorted(told)
    assert told[-1] == (5, 5)


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(found, Tensor):
        assert torch.equal(found, expected)
    elif isinstance(found, dict):
        assert found.keys() == expected.keys()
        for key in found:
            assert_same(found[key], expected[key])
    else:
        assert found == expected


def test_hidden_states_in_a_file_come_back_as_they_were(tmp_path: Path) -> None:
    batches = [torch.randn(2, 3, 4), torch.randn(2, 3, 4), torch.randn(1, 3, 4)]
    with HiddenStates(tmp_path) as states:
        states.replace_all(batch.to(torch.bfloat16) for batch in batches)
        states.replace_all(state * 2 for state in states)
        for _ in range(2):
            expected = [batch.to(torch.bfloat16) * 2 for batch in batches]
            assert all(torch.equal(a, b) for a, b in zip(states, expected, strict=True))


def test_a_model_is_too_large_where_free_memory_is_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    num_bytes = (dense / "model.safetensors").stat().st_size
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for free, expected in ((num_bytes, True), (2 * num_bytes, False)):
        monkeypatch.setattr(disk, "_free_memory_bytes", lambda free=free: free)
        assert too_large(dense) is expected


@pytest.mark.parametrize("family", ["bert", "t5"])
def test_only_decoders_run_from_disk(family: str, tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", family)
    shape = shape_of(read_config(dense), "dense")
    with pytest.raises(EnvironmentCannot, match=f"{family} is none: use a machine with more memory"):
        layerwise_forward(
            dense, shape, windows(), batch_size=2, observed=lambda m: noting(m, shape, {}), scratch_dir=tmp_path
        )
