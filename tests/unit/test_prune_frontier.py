from __future__ import annotations

import math
from pathlib import Path

import pytest

from stillroom.errors import InputError
from stillroom.models.shape import ModelShape, shape_of
from stillroom.prune.cost import Load, costs_of
from stillroom.prune.frontier import Frontier, Scorer, read_frontier, search, write_frontier
from stillroom.prune.shapes import Candidate, candidates, price_target, sizes_of
from stillroom.recipe import Target

DENSE = shape_of(
    {"model_type": "qwen3", "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
     "head_dim": 16, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 384}, "tiny"
)  # fmt: skip
TARGET = Target(params=int(0.75 * DENSE.num_params), candidates=6)
FOUND = candidates(DENSE, price_target(TARGET, DENSE, None))


class Counting:
    """A loss made of the sizes, and the shapes it was asked for."""

    def __init__(self, sign: float = 1.0, dies_at: int | None = None) -> None:
        self.sign, self.dies_at = sign, dies_at
        self.asked: list[ModelShape] = []

    def __call__(self, shape: ModelShape) -> float:
        if len(self.asked) == self.dies_at:
            raise KeyboardInterrupt
        self.asked.append(shape)
        return 2.0 + self.sign * shape.intermediate_size / 128


def run(
    folder: Path, score: Scorer, rerank: Scorer | None = None, *, key: str = "k", num_reranked: int = 3
) -> Frontier:
    return search(
        FOUND, DENSE, costs_of(DENSE, Load()), score, rerank,
        cache_dir=folder / "scores", key=key, target=TARGET.given(), num_reranked=num_reranked,
    )  # fmt: skip


def test_without_a_second_pass_the_smallest_kl_wins(tmp_path: Path) -> None:
    frontier = run(tmp_path, Counting())
    assert frontier.winner.kl == min(c.kl for c in frontier.candidates)
    assert sum(c.winner for c in frontier.candidates) == 1
    assert [c.sizes for c in frontier.candidates] == [sizes_of(c.shape) for c in FOUND]
    assert all(c.reranked is None for c in frontier.candidates)


def test_the_best_few_are_ranked_again_and_the_last_word_is_theirs(tmp_path: Path) -> None:
    first, second = Counting(), Counting(sign=-1.0)
    frontier = run(tmp_path, first, second, num_reranked=2)
    ranked = sorted(frontier.candidates, key=lambda c: c.kl)[:2]
    assert {id(c) for c in frontier.candidates if c.reranked is not None} == {id(c) for c in ranked}
    assert frontier.winner.reranked == min(c.reranked for c in ranked if c.reranked is not None)
    assert (len(first.asked), len(second.asked)) == (len(FOUND), 2)


def test_a_killed_search_goes_on_where_it_stopped(tmp_path: Path) -> None:
    dies = Counting(dies_at=3)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, dies)
    goes_on, rerank = Counting(), Counting()
    frontier = run(tmp_path, goes_on, rerank)
    assert [*dies.asked, *goes_on.asked] == [c.shape for c in FOUND]
    again, rerank_again = Counting(), Counting()
    assert run(tmp_path, again, rerank_again) == frontier
    assert again.asked == rerank_again.asked == []


def test_any_other_key_scores_again(tmp_path: Path) -> None:
    run(tmp_path, Counting())
    again = Counting()
    run(tmp_path, again, key="other data")
    assert len(again.asked) == len(FOUND)


def test_a_spoiled_score_is_made_again(tmp_path: Path) -> None:
    frontier = run(tmp_path, Counting())
    spoiled = sorted((tmp_path / "scores").glob("score-*.json"))[0]
    spoiled.write_text("{", encoding="utf-8")
    again = Counting()
    repeated = run(tmp_path, again)
    assert len(again.asked) == 1
    assert [c.kl for c in repeated.candidates] == [c.kl for c in frontier.candidates]


def test_an_unusable_shape_is_recorded_and_never_wins(tmp_path: Path) -> None:
    def score(shape: ModelShape) -> float:
        return math.inf if shape == FOUND[0].shape else math.nan if shape == FOUND[1].shape else 1.0

    frontier = run(tmp_path, score)
    assert frontier.winner == frontier.candidates[2]
    write_frontier(frontier, tmp_path)
    kept = read_frontier(tmp_path)
    assert kept is not None
    assert math.isinf(kept.candidates[0].kl)
    assert math.isnan(kept.candidates[1].kl)


def test_only_unusable_shapes_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none of the 6 shapes"):
        run(tmp_path, lambda shape: math.inf)


def test_the_frontier_is_one_document_with_every_candidate(tmp_path: Path) -> None:
    frontier = run(tmp_path, Counting(), Counting())
    assert read_frontier(tmp_path) is None
    write_frontier(frontier, tmp_path)
    assert read_frontier(tmp_path) == frontier
    assert frontier.cost_axis == "params"
    assert frontier.dense["params"] == DENSE.num_params
    assert frontier.dense_sizes == sizes_of(DENSE)


def test_progress_counts_both_passes(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []

    def hear(done: int, total: int, candidate: Candidate, kl: float) -> None:
        heard.append((done, total))

    search(
        FOUND, DENSE, costs_of(DENSE, Load()), Counting(), Counting(),
        cache_dir=tmp_path, key="k", target=TARGET.given(), num_reranked=2, progress=hear,
    )  # fmt: skip
    total = len(FOUND) + 2
    assert heard == [(i, total) for i in range(1, total + 1)]
