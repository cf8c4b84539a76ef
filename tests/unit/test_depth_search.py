"""The search for the layers to keep against searches that reuse nothing."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel

from stillroom.distill.losses import Head, head_of
from stillroom.models.blocks import Blocks
from stillroom.models.family import families
from stillroom.prune.depth_search import (
    DepthScorer,
    Evolution,
    best_of,
    contiguous,
    evolve,
    greedy,
    leave_one_out,
    mutate,
)
from tiny import VOCAB_SIZE, tiny_model

NUM_LAYERS = 6


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("llama", num_hidden_layers=NUM_LAYERS).requires_grad_(False)


@pytest.fixture(scope="module")
def windows() -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (5, 32), generator=torch.Generator().manual_seed(1))


def scorer_for(model: PreTrainedModel, windows: torch.Tensor, stride: int = 1) -> DepthScorer:
    head = head_of(model)
    return DepthScorer(
        Blocks(model, families()["llama"]), Head(head.weight.detach()), windows, batch_size=2, stride=stride
    )


@torch.inference_mode()
def naive(model: PreTrainedModel, windows: torch.Tensor, keep: tuple[int, ...]) -> tuple[float, float]:
    """KL and loss in float64 from whole forward passes of a model with only these layers."""
    dense = model(windows, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList(layers[i] for i in keep)
    number, model.config.num_hidden_layers = model.config.num_hidden_layers, len(keep)
    cut = model(windows, use_cache=False).logits[:, :-1].double().log_softmax(-1)
    model.model.layers, model.config.num_hidden_layers = layers, number
    kl = (dense.exp() * (dense - cut)).sum(-1).mean().item()
    return kl, -cut.gather(-1, windows[:, 1:, None]).mean().item()


@pytest.mark.parametrize("keep", [(0, 1, 2, 3, 4, 5), (0, 2, 3, 5), (1, 4), (5,)])
def test_scores_are_those_of_whole_forward_passes(
    model: PreTrainedModel, windows: torch.Tensor, keep: tuple[int, ...]
) -> None:
    found = scorer_for(model, windows).score(keep)
    kl, loss = naive(model, windows, keep)
    assert found.kl == pytest.approx(kl, abs=2e-5)
    assert found.loss == pytest.approx(loss, abs=2e-5)


def test_reused_activations_change_no_bit(model: PreTrainedModel, windows: torch.Tensor) -> None:
    anchored, fresh = scorer_for(model, windows), scorer_for(model, windows)
    for anchor, keep in [((0, 1, 3, 4, 5), (0, 1, 3, 5)), ((0, 1, 3, 4, 5), (0, 2, 5)), ((0, 2), (0, 2, 3))]:
        anchored.anchor(anchor)
        fresh.anchor(())
        assert anchored.score(keep) == fresh.score(keep)
    assert anchored.layers_run < fresh.layers_run


def test_a_choice_is_measured_once(model: PreTrainedModel, windows: torch.Tensor) -> None:
    scorer = scorer_for(model, windows)
    first = scorer.score((0, 5))
    run = scorer.layers_run
    assert scorer.score((0, 5)) is first
    assert scorer.layers_run == run


def test_scoring_fewer_positions_still_scores_the_same_model(model: PreTrainedModel, windows: torch.Tensor) -> None:
    everything = tuple(range(NUM_LAYERS))
    assert scorer_for(model, windows, stride=4).score(everything).kl == pytest.approx(0, abs=1e-6)


def test_greedy_is_the_loop_over_whole_passes(model: PreTrainedModel, windows: torch.Tensor) -> None:
    keep = tuple(range(NUM_LAYERS))
    while len(keep) > 3:
        keep = min((tuple(i for i in keep if i != j) for j in keep), key=lambda k: naive(model, windows, k)[0])
    assert greedy(scorer_for(model, windows), 3) == keep


def test_evolution_is_never_worse_than_its_start_and_finds_the_best_of_a_small_model(
    model: PreTrainedModel, windows: torch.Tensor
) -> None:
    scorer = scorer_for(model, windows)
    start = (0, 1, 2)
    found = evolve(scorer, start, Evolution(generations=12, offspring=8), seed=0)
    assert scorer.score(found).kl <= scorer.score(start).kl
    best = best_of(scorer, list(itertools.combinations(range(NUM_LAYERS), 3)))
    assert found == best


def test_evolution_gives_the_same_for_the_same_seed(model: PreTrainedModel, windows: torch.Tensor) -> None:
    settings_ = Evolution(generations=2, offspring=3)
    first, second = (evolve(scorer_for(model, windows), (0, 1, 2), settings_, seed=7) for _ in range(2))
    assert first == second


def test_leaving_one_out_says_what_each_layer_costs(model: PreTrainedModel, windows: torch.Tensor) -> None:
    found = leave_one_out(scorer_for(model, windows))
    for layer, agreement in enumerate(found):
        without = tuple(i for i in range(NUM_LAYERS) if i != layer)
        assert agreement.kl == pytest.approx(naive(model, windows, without)[0], abs=2e-5)


@given(st.integers(2, 40), st.data())
def test_contiguous_choices_cut_each_block_once(num_layers: int, data: st.DataObject) -> None:
    count = data.draw(st.integers(1, num_layers - 1))
    choices = contiguous(num_layers, count)
    assert len(set(choices)) == len(choices) == num_layers - count + 1
    assert all(len(keep) == num_layers - count for keep in choices)


@settings(max_examples=200)
@given(st.integers(2, 40), st.integers(0, 1000), st.data())
def test_mutations_keep_the_number_of_layers_and_change_some(num_layers: int, seed: int, data: st.DataObject) -> None:
    size = data.draw(st.integers(1, num_layers - 1))
    keep = tuple(sorted(data.draw(st.permutations(range(num_layers)))[:size]))
    child = mutate(keep, num_layers, random.Random(seed))
    assert child != keep
    assert len(child) == len(keep)
    assert child == tuple(sorted(set(child)))
    assert all(0 <= layer < num_layers for layer in child)
