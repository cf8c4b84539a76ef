"""When a blend is called narrow, in the plan and in the stage."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from runs import tiny_recipe
from stillroom.distill.breadth import narrow, narrow_by_recipe
from stillroom.plan import make_plan
from stillroom.preflight import outlook
from stillroom.recipe import Distill, TextSource, load_recipe, shipped_recipes


def source(name: str, weight: float, tokens: int | None = None, of: str = "x.txt") -> TextSource:
    return TextSource(source=of, name=name, weight=weight, tokens=tokens)


CONFIG = Distill(tokens=1_000_000, sequence_length=100, batch_size=10)


def test_one_source_with_nearly_all_tokens_is_narrow() -> None:
    (warning,) = narrow_by_recipe([source("web", 95), source("chat", 5)], CONFIG)
    assert warning.startswith("95% of the training text is from web")
    assert "MMLU-Pro 40.6 -> 11.3" in warning
    assert narrow_by_recipe([source("web", 9), source("chat", 1)], CONFIG) == []


def test_what_the_unpruned_model_writes_is_not_one_kind() -> None:
    assert narrow_by_recipe([source("teacher", 1, 1_000_000, "teacher")], CONFIG) == []


def test_text_that_is_read_more_than_four_times_is_narrow() -> None:
    """By its share of the tokens, not by all of them."""
    sources = [source("web", 1), source("chat", 1, 120_000)]
    (warning,) = narrow_by_recipe(sources, CONFIG)
    assert warning.startswith("chat is read 4.2 times")
    assert narrow_by_recipe([source("web", 1), source("chat", 1, 125_000)], CONFIG) == []
    assert narrow(sources, {"web": 4.0, "chat": 5.0}) == [warning.replace("4.2", "5.0")]


@pytest.mark.parametrize("name", shipped_recipes())
def test_no_shipped_recipe_is_narrow(name: str) -> None:
    recipe = load_recipe(name)
    assert [narrow_by_recipe(recipe.data.train, stage) for stage in recipe.stages if isinstance(stage, Distill)] == [[]]


def test_a_plan_warns_of_a_narrow_blend(tmp_path: Path) -> None:
    recipe = load_recipe(str(tiny_recipe(tmp_path)), ["data.train.1.weight=0.05"])
    steps = {row.step.name: row for row in outlook(make_plan(recipe), None).steps}
    assert steps["prune"].warnings == ()
    (warning,) = steps["distill"].warnings
    assert warning.startswith("95% of the training text is from train")
    said = outlook(make_plan(recipe), None).as_json()
    assert warning in json.dumps(said)
