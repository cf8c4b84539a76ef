"""Closed-form repair against slow float64 references, and on models of which the right answer is known."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, PreTrainedModel

from jobs import Kept
from minitron import random_cut, sliced_checkpoint
from stillroom.export.rewrite import replace_tensors
from stillroom.models.family import families
from stillroom.models.load import load_model
from stillroom.models.tensors import read_tensor
from stillroom.models.weights import tensor_entries
from stillroom.prune.cut import Cut
from stillroom.prune.importance.measure import measure
from stillroom.prune.pruner import Made, Pruner
from stillroom.prune.recover import recover_cut
from stillroom.prune.repair.kinds import repair_kinds
from stillroom.prune.repair.ridge import LeastSquares, fold, ridge
from stillroom.prune.surgery import source_shape
from stillroom.recipe import Calibration, Prune, Repair, SearchBudget
from tiny import ALL_FAMILIES, VOCAB_SIZE, edited_checkpoint, tiny_checkpoint, tiny_model

WRITERS = [
    name
    for name in ALL_FAMILIES
    if families()[name].task == "causal_lm"
    and families()[name].writes_residual_directly
    and families()[name].experts is None
]


def sums_of(inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, pieces: int = 1) -> LeastSquares:
    sums = LeastSquares(inputs.shape[1], targets.shape[1], torch.device("cpu"))
    for a, y, w in zip(*(torch.tensor_split(t, pieces) for t in (inputs, targets, weights)), strict=True):
        sums.add(a, y, w)
    return sums


def slow_ridge(
    inputs: torch.Tensor, targets: torch.Tensor, weights: torch.Tensor, prior: torch.Tensor, strength: float
) -> torch.Tensor:
    """The same as one least-squares problem: the penalty as further rows, and no Gram matrix."""
    scale = weights.double().sqrt()[:, None]
    a, y = inputs.double() * scale, targets.double() * scale
    penalty = (strength * a.square().sum(0).mean()).sqrt()
    rows = torch.cat([a, penalty * torch.eye(a.shape[1], dtype=torch.float64)])
    wanted = torch.cat([y, penalty * prior.double().T])
    solution: torch.Tensor = torch.linalg.lstsq(rows, wanted, driver="gelsd").solution.T
    return solution


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(3, 60),
    inputs=st.integers(1, 12),
    outputs=st.integers(1, 8),
    pieces=st.integers(1, 3),
    strength=st.sampled_from([0.01, 0.5, 3.0]),
    seed=st.integers(0, 100),
)
def test_ridge_and_fold_solve_what_a_slow_solver_solves(
    tokens: int, inputs: int, outputs: int, pieces: int, strength: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    a, y = torch.randn(tokens, inputs, generator=generator), torch.randn(tokens, outputs, generator=generator)
    counted = torch.rand(tokens, generator=generator) + 0.1
    weight = torch.randn(outputs, inputs, generator=generator)
    sums = sums_of(a, y, counted, pieces)
    torch.testing.assert_close(ridge(sums, weight, strength), slow_ridge(a, y, counted, weight, strength),
                               rtol=1e-4, atol=1e-4)  # fmt: skip
    said = a.double() @ weight.double().T
    mapping = slow_ridge(said, y, counted, torch.eye(outputs), strength)
    torch.testing.assert_close(fold(sums, weight, strength), mapping @ weight.double(), rtol=1e-3, atol=1e-3)


def test_what_the_text_does_not_show_stays_as_it_was() -> None:
    weight, inputs = torch.randn(4, 6), torch.randn(50, 6)
    inputs[:, 3:] = 0
    sums = sums_of(inputs, torch.randn(50, 4), torch.ones(50))
    found = ridge(sums, weight, 0.1)
    torch.testing.assert_close(found[:, 3:], weight[:, 3:].double())
    assert not torch.allclose(found[:, :3], weight[:, :3].double())


def pruner_for(source_dir: Path, tmp_path: Path, repair: Repair | None = None) -> Pruner:
    shape = source_shape(source_dir)
    windows = torch.randint(7, VOCAB_SIZE, (24, 48), generator=torch.Generator().manual_seed(0))
    config = Prune(
        num_layers=shape.num_layers,
        calibration=Calibration(samples=24, sequence_length=48, batch_size=4),
        search=SearchBudget(tokens=64, scored_share=1.0),
        repair=repair or Repair(heldout_tokens=240),
    )
    scratch = tmp_path / "scratch"
    scratch.mkdir(exist_ok=True)
    return Pruner(config, shape, source_dir, windows, scratch, 0, Kept())


def digests(folder: Path) -> dict[str, str]:
    return {name: hashlib.sha256(read_tensor(entry).numpy(force=True).tobytes()).hexdigest()
            for name, entry in tensor_entries(folder).items()}  # fmt: skip


def made(pruner: Pruner, cut: Cut, out: Path) -> Made:
    return pruner.make(cut, out)


@pytest.mark.parametrize("family", WRITERS)
def test_a_depth_cut_comes_nearer_to_the_dense_model_and_only_projections_change(family: str, tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", family)
    bare = made(pruner_for(dense, tmp_path, Repair(kinds=())), Cut((0, 2, 3)), tmp_path / "bare")
    assert bare.kl is None
    repaired = made(pruner_for(dense, tmp_path), Cut((0, 2, 3)), tmp_path / "repaired")
    assert repaired.kl is not None
    assert repaired.kl_cut is not None
    assert repaired.kl < repaired.kl_cut
    before, after = digests(tmp_path / "bare"), digests(tmp_path / "repaired")
    assert before.keys() == after.keys()
    description = families()[family]
    writers = {pattern.format(layer=i) + ".weight" for i in range(3)
               for pattern in (description.attention_output, description.ffn_output)}  # fmt: skip
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= writers
    assert len(changed) == sum(attempt.kept for attempt in repaired.attempts)


def test_layers_before_the_first_cut_are_left_alone(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", "llama", num_hidden_layers=6)
    found = made(pruner_for(dense, tmp_path), Cut((0, 1, 2, 4, 5)), tmp_path / "out")
    assert min(attempt.layer for attempt in found.attempts if attempt.layer is not None) == 2
    assert {attempt.kind for attempt in found.attempts} <= {"fold", "refit"}


def test_the_repaired_checkpoint_is_the_model_that_was_measured(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", "qwen3", dtype=torch.bfloat16)
    pruner = pruner_for(dense, tmp_path)
    found = made(pruner, Cut((0, 1, 3)), tmp_path / "out")
    cut, teacher = load_model(tmp_path / "out"), load_model(dense)
    windows = pruner.heldout_NT
    with torch.inference_mode():
        q, p = (m(windows, use_cache=False).logits[:, :-1].float().log_softmax(-1) for m in (cut, teacher))
    assert (p.exp() * (p - q)).sum(-1).mean().item() == pytest.approx(found.kl, rel=0.02)


@pytest.mark.parametrize("family", WRITERS)
def test_a_doubled_ffn_channel_is_reconstructed_exactly(family: str, tmp_path: Path) -> None:
    """Channels 96 to 127 say what 0 to 31 say: after the cut the projection of the latter must count double."""
    shape = source_shape(tiny_checkpoint(tmp_path / "single", family))
    output = shape.family.ffn_output + ".weight"

    def double(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if name not in shape.places or shape.places[name].pattern == output:
                continue
            for dim, axis in enumerate(shape.axes(name)):
                for start in range(0, 128 * axis.count("ffn"), 128):
                    part = parameter.narrow(dim, start, 128)
                    part.narrow(dim, 96, 32).copy_(part.narrow(dim, 0, 32))

    dense = edited_checkpoint(tmp_path / "dense", family, double)
    pruner = pruner_for(dense, tmp_path)
    kept = {layer: tuple(range(96)) for layer in range(4)}
    found = made(pruner, Cut((0, 1, 2, 3), ffn=kept), tmp_path / "out")
    assert found.kl is not None
    assert found.kl_cut is not None
    assert found.kl < 0.05 * found.kl_cut
    assert {attempt.kind for attempt in found.attempts} == {"reconstruct"}


@pytest.mark.parametrize("tied", [True, False])
def test_a_doubled_hidden_channel_is_read_from_its_twin(tied: bool, tmp_path: Path) -> None:
    """Channels 48 to 63 carry what 0 to 15 carry; what reads them must read the latter twice."""

    def double(model: Any) -> None:
        table = model.model.embed_tokens.weight
        table[:, 48:] = table[:, :16]
        for layer in model.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight[48:] = writer.weight[:16]

    dense = edited_checkpoint(tmp_path / "dense", "llama", double, tie_word_embeddings=tied)
    pruner = pruner_for(dense, tmp_path)
    scores = measure(load_model(dense), pruner.shape, pruner.fitting_NT, batch_size=4, wanted=frozenset({"hidden"}))
    pruner.scores[frozenset({"hidden"})] = scores
    found = made(pruner, Cut((0, 1, 2, 3), hidden=tuple(range(48))), tmp_path / "out")
    assert found.kl is not None
    assert found.kl_cut is not None
    assert found.kl < (0.6 if tied else 0.1) * found.kl_cut
    assert "readout" in {attempt.kind for attempt in found.attempts if attempt.kept}
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.tie_word_embeddings is tied


IN_ANY_ORDER: dict[str, dict[str, int]] = {
    "llama": {"num_layers": 3, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 2},
    "qwen3": {"num_layers": 3, "hidden_size": 64, "intermediate_size": 128},  # widths whole, and in another order
    "gemma3_text": {"num_layers": 3, "hidden_size": 48, "num_attention_heads": 2},
    "gpt2": {"num_layers": 3, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 3},
    "starcoder2": {"hidden_size": 48, "intermediate_size": 96},
}


@pytest.mark.parametrize("family", IN_ANY_ORDER)
def test_what_another_cut_in_another_order_is_repaired_like_what_is_in_order(family: str, tmp_path: Path) -> None:
    """Order changes no logit, so the same numbers must come out, up to rounding."""
    dense = tiny_checkpoint(tmp_path / "dense", family)
    shape = source_shape(dense)
    drawn = random_cut(shape, IN_ANY_ORDER[family], seed=0)
    assert drawn != in_order(drawn)
    found = []
    for name, cut in (("drawn", drawn), ("in order", in_order(drawn))):
        target = sliced_checkpoint(dense, cut, tmp_path / name)
        cut = recover_cut(dense, shape, tmp_path / name, target)
        found.append(pruner_for(dense, tmp_path).repair(cut, target, tmp_path / name))
    drawn_made, made_in_order = found
    assert drawn_made.kl is not None
    assert drawn_made.kl_cut is not None
    assert drawn_made.kl < 0.99 * drawn_made.kl_cut
    assert drawn_made.kl_cut == pytest.approx(made_in_order.kl_cut, rel=1e-4)
    assert drawn_made.kl == pytest.approx(made_in_order.kl, rel=0.01)


def in_order(cut: Cut) -> Cut:
    """The same parts, ascending."""
    per_layer: dict[str, Any] = {
        name: {layer: tuple(sorted(kept)) for layer, kept in parts.items()}
        for name in ("ffn", "heads")
        if (parts := getattr(cut, name))
    }
    hidden = None if cut.hidden is None else tuple(sorted(cut.hidden))
    return dataclasses.replace(cut, hidden=hidden, **per_layer)


def test_a_cut_that_changes_nothing_is_not_repaired(tmp_path: Path) -> None:
    def silence(model: Any) -> None:
        model.model.layers[1].self_attn.o_proj.weight.zero_()
        model.model.layers[1].mlp.down_proj.weight.zero_()

    dense = edited_checkpoint(tmp_path / "dense", "llama", silence)
    found = made(pruner_for(dense, tmp_path), Cut((0, 2, 3)), tmp_path / "out")
    assert found.kl == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("family", ALL_FAMILIES)
def test_auto_asks_for_nothing_that_the_family_forbids(family: str, tmp_path: Path) -> None:
    shape = source_shape(tiny_checkpoint(tmp_path / "dense", family))
    description = shape.family
    kinds = repair_kinds(Repair(), shape, shape)
    assert not kinds - {"refit"}
    allowed = description.task == "causal_lm" and description.writes_residual_directly
    assert bool(kinds) == allowed


def test_replaced_tensors_are_new_and_all_others_are_byte_for_byte_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    model: PreTrainedModel = tiny_model("llama", dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="100KB")
    before = digests_of_bits(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    value = torch.randn(64, 128).to(torch.bfloat16)
    replace_tensors(folder, {name: value}, tmp_path / "work")
    after = digests_of_bits(folder)
    assert {n for n in before if before[n] != after[n]} == {name}
    opened = AutoModelForCausalLM.from_pretrained(folder)
    assert torch.equal(opened.model.layers[1].mlp.down_proj.weight, value)
    assert not (tmp_path / "work").exists()


def digests_of_bits(folder: Path) -> dict[str, str]:
    entries = tensor_entries(folder)
    return {
        n: hashlib.sha256(read_tensor(e).view(torch.int16).numpy().tobytes()).hexdigest() for n, e in entries.items()
    }
