"""Pruning asked for what cannot be: one line that says why and what to do, exit code 2, nothing written."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from runs import TINY_CALIBRATION, tiny_recipe
from stillroom import cli
from tiny import tiny_checkpoint

Run = Callable[..., tuple[int, str]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Run]:
    """Runs a recipe of one prune stage as `stillroom run` does; gives the exit code and what went to stderr."""
    monkeypatch.setenv("STILLROOM_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(prune: dict[str, Any], **changes: Any) -> tuple[int, str]:
        stages = [{"kind": "prune", "calibration": TINY_CALIBRATION} | prune]
        fields = {"stages": stages, "evaluate": None, "gates": [], "data": text_of(tmp_path)}
        recipe = tiny_recipe(tmp_path / "recipe", **fields | changes)
        monkeypatch.setattr(sys, "argv", ["stillroom", "run", str(recipe), "--out", str(tmp_path / "run")])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        assert isinstance(ended.value.code, int)
        return ended.value.code, capsys.readouterr().err

    before = signal.getsignal(signal.SIGTERM)  # the command line sets its own
    yield run
    signal.signal(signal.SIGTERM, before)


def text_of(folder: Path) -> dict[str, Any]:
    """The recipe's own files, without what a teacher would have to write."""
    return {
        "train": [str(folder / "recipe" / "train.txt")],
        "heldout": [{"source": str(folder / "recipe" / "heldout.txt"), "name": "heldout"}],
        "decontaminate": False,
    }


def refused(answer: tuple[int, str], message: str, folder: Path) -> None:
    code, said = answer
    lines = [line for line in said.splitlines() if line.startswith("stillroom: ")]
    assert code == 2, said
    assert len(lines) == 1
    assert message in lines[0]
    assert "Traceback" not in said
    assert not (folder / "run").exists()
    assert not (folder / "home" / "scores").exists()


def model(folder: Path, family: str, **sizes: Any) -> None:
    """The recipe's model, in place of the llama that it has by default."""
    tiny_checkpoint(folder / "recipe" / "model", family, **sizes)


def with_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    file = folder / "recipe" / "model" / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ({"params": 1000}, "target cannot be reached with at most 50% of each size cut: params 1000 (nearest "),
        ({"params": 1000, "hardware": "cpu"}, "params 1000 (nearest "),
        ({"memory_gb": 1e-6}, "memory_gb 1e-06 (nearest "),
        ({"throughput": 1e12, "hardware": "H100"}, "throughput 1e+12 (nearest "),
        ({"latency_ms": 1e-9, "params": 300_000, "hardware": "H100"}, "; params can be reached"),
        ({"params": 10**9}, "is already met by the model itself"),
        ({"params": 300_000, "tensor_parallel": 3}, "tensor_parallel 3 divides no number of heads"),
        ({"latency_ms": 1.0}, "latency_ms needs `hardware`: one of H100, H200"),
        ({}, "give at least one of params, memory_gb, latency_ms, throughput"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_a_target_that_no_shape_reaches_says_the_nearest_that_one_does(
    target: dict[str, Any], message: str, run: Run, tmp_path: Path
) -> None:
    refused(run({"target": target}), message, tmp_path)


def test_the_nearest_value_that_was_named_can_be_reached(run: Run, tmp_path: Path) -> None:
    _, said = run({"target": {"params": 1000}})
    nearest = int(said.partition("(nearest ")[2].partition(")")[0])
    refused(run({"target": {"params": nearest - 1}}), f"(nearest {nearest})", tmp_path)
    code, said = run({"target": {"params": nearest, "candidates": 2, "rerank": 0}, "depth_importance": "greedy"})
    assert code == 0, said


@pytest.mark.parametrize(
    ("prune", "message"),
    [
        ({"target": {"params": 300_000}, "num_layers": 2}, "give target or sizes (num_layers), not both"),
        ({"num_layers": 2, "drop_layers": [1]}, "give num_layers or drop_layers, not both"),
        ({}, "nothing to cut: give num_layers"),
        ({"num_layers": 5}, "num_layers 5 is above the model's 4"),
        ({"num_attention_heads": 3}, "each group keeps the same number of its 2 query heads; use one of [2, 4]"),
        ({"num_key_value_heads": 3}, "num_key_value_heads 3 is above the model's 2"),
        ({"intermediate_size": 101}, "intermediate_size 101 is odd"),
        ({"num_experts": 2}, "llama models have nothing of that name to cut"),
        ({"drop_layers": [0, 1, 2, 3]}, "drop_layers names all 4 layers"),
        ({"num_layers": 3, "repair": ["readout"]}, "repair readout: no hidden channel is cut; possible here: "),
        ({"intermediate_size": 128, "repair": ["fold"]}, "repair fold: no layer is cut"),
        (
            {"num_layers": 3, "calibration": {"samples": 4, "sequence_length": 4096}},
            "calibration.sequence_length 4096 is beyond the model's 2048 positions",
        ),
        ({"num_layers": 3, "calibration": {"samples": 1, "sequence_length": 64}}, "pruning needs two windows"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, dict) else "",
)
def test_sizes_and_options_that_a_llama_forbids(prune: dict[str, Any], message: str, run: Run, tmp_path: Path) -> None:
    refused(run(prune), message, tmp_path)


@pytest.mark.parametrize(
    ("family", "prune", "message"),
    [
        ("bert", {"num_layers": 3, "depth_importance": "search"}, "bert is none; use block_influence"),
        ("t5", {"num_layers": 1, "depth_importance": "greedy"}, "t5 is none; use block_influence"),
        ("bert", {"target": {"params": 150_000}}, "bert is no decoder; give sizes, such as num_layers"),
        ("roberta", {"num_layers": 3, "repair": ["refit"]}, "repair refit: repair runs decoders layer by layer"),
        ("gemma2", {"num_layers": 3, "repair": ["fold"]}, "a norm stands between attention or FFN and the residual"),
        ("qwen3_moe", {"num_experts": 3, "width_importance": "taylor"}, "taylor cannot score experts"),
        ("gpt2", {"hidden_size": 48}, "it must stay 16"),
        ("roberta", {"num_layers": 3, "calibration": {"sequence_length": 2048}}, "the model's 2045 positions"),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_what_a_family_s_architecture_forbids(
    family: str, prune: dict[str, Any], message: str, run: Run, tmp_path: Path
) -> None:
    model(tmp_path, family)
    refused(run(prune), message, tmp_path)


def test_text_that_fills_no_window(run: Run, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("The still was small and the fire was low.")
    data = {"train": [str(short)], "heldout": [str(short)], "decontaminate": False}
    refused(run({"num_layers": 3}, data=data), "tokens, a window needs 64; lower sequence_length", tmp_path)


def test_text_that_fills_one_window_and_leaves_none_to_judge_by(run: Run, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("The still was small and the fire was low. " * 5)
    data = {"train": [str(short)], "heldout": [str(short)], "decontaminate": False}
    refused(run({"num_layers": 3}, data=data), "needs 2 windows of 64 tokens", tmp_path)


def test_text_that_is_what_is_measured_on(run: Run, tmp_path: Path) -> None:
    same = tmp_path / "same.txt"
    same.write_text("The still was small and the fire was low, so the rose water came slowly. " * 50)
    data = {"train": [str(same)], "heldout": [str(same)]}
    refused(run({"num_layers": 3}, data=data), "share 13 words in a row with the evaluation text", tmp_path)


def test_weights_that_are_no_numbers(run: Run, tmp_path: Path) -> None:
    model(tmp_path, "llama")

    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors["model.layers.2.mlp.up_proj.weight"][7, 5] = float("nan")

    with_tensors(tmp_path, spoil)
    message = "model.layers.2.mlp.up_proj.weight in model.safetensors holds NaN or infinite values"
    refused(run({"drop_layers": [0], "repair": []}), message, tmp_path)
    refused(run({"num_layers": 3}), message, tmp_path)


def test_a_variant_with_modules_that_the_family_has_not(run: Run, tmp_path: Path) -> None:
    model(tmp_path, "llama")

    def add(tensors: dict[str, Tensor]) -> None:
        for layer in range(4):
            tensors[f"model.layers.{layer}.self_attn.sinks"] = tensors["model.norm.weight"][:4].clone()

    with_tensors(tmp_path, add)
    refused(run({"num_layers": 3}), "holds 4 tensors that a llama model with its config does not have", tmp_path)


def test_a_variant_that_lacks_modules(run: Run, tmp_path: Path) -> None:
    model(tmp_path, "qwen3")

    def remove(tensors: dict[str, Tensor]) -> None:
        del tensors["model.layers.1.self_attn.q_norm.weight"]

    with_tensors(tmp_path, remove)
    refused(run({"num_layers": 3}), "lacks 1 tensors that its config promises", tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "mamba"}, "model family 'mamba' is not supported; supported: bert, gemma2, gemma3_text, gpt2"),
        ({"hidden_size": None}, "config.json lacks 'hidden_size'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "is already quantized"),
    ],
)
def test_a_config_of_another_kind(change: dict[str, Any], message: str, run: Run, tmp_path: Path) -> None:
    model(tmp_path, "llama")
    path = tmp_path / "recipe" / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    refused(run({"num_layers": 3}), message, tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluate": {"sequence_length": 64}}, "causal language model, and bert is none: set `evaluate: null`"),
        ({"bench": {"engine": "transformers"}}, "set `bench: null`"),
        ({"data": {"train": [{"source": "teacher", "tokens": 64}]}}, "the text source `teacher`"),
        (
            {"stages": [{"kind": "distill", "tokens": 64, "sequence_length": 32, "batch_size": 2}]},
            "distillation takes a causal language model, and bert is none: leave the stage out",
        ),
        ({"stages": [{"kind": "quantize", "scheme": "fp8"}]}, "scheme fp8 is for decoders"),
    ],
    ids=["evaluate", "bench", "teacher", "distill", "quantize"],
)
def test_steps_that_an_encoder_cannot_take(changes: dict[str, Any], message: str, run: Run, tmp_path: Path) -> None:
    model(tmp_path, "bert")
    refused(run({"num_layers": 3}, **changes), message, tmp_path)
