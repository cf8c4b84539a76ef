"""Recipes: what is allowed, and how errors read."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillroom.errors import InputError
from stillroom.recipe import Distill, Recipe, load_recipe, parse_recipe, shipped_recipes

MINIMAL: dict[str, Any] = {"name": "small", "model": "smollm2-135m", "stages": [{"kind": "prune", "num_layers": 20}]}


def with_field(path: str, value: Any) -> dict[str, Any]:
    """MINIMAL with one field set."""
    raw: dict[str, Any] = yaml.safe_load(yaml.safe_dump(MINIMAL))
    *parents, last = path.split(".")
    here: Any = raw
    for key in parents:
        here = here[int(key)] if isinstance(here, list) else here.setdefault(key, {})
    if isinstance(here, list):
        here[int(last)] = value
    else:
        here[last] = value
    return raw


@pytest.mark.parametrize("name", sorted(shipped_recipes()))
def test_every_shipped_recipe_parses_and_survives_a_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description
    assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe


def test_the_qwen3_recipes_hold_the_published_settings() -> None:
    prune, distill, _ = load_recipe("qwen3-8b-depth-6b-fp8").stages
    assert prune.kind == "prune"
    assert (prune.num_layers, prune.calibration.samples, prune.calibration.sequence_length) == (24, 1024, 4096)
    assert distill.kind == "distill"
    assert (distill.batch_size, distill.sequence_length) == (768, 4096)
    assert (distill.learning_rate, distill.min_learning_rate) == (1e-4, 1e-5)
    width = load_recipe("qwen3-8b-width-6b-fp8").stages[0]
    assert width.kind == "prune"
    assert (width.intermediate_size, width.hidden_size) == (9216, 3584)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("stagess", [], "stagess: unknown field; allowed here: name, description, model"),
        ("stages.0.num_layer", 3, "num_layer: unknown field; allowed here: name, source, kind, num_layers"),
        ("stages.0.kind", "shrink", "'prune', 'distill', 'quantize'"),
        ("stages.0.num_layers", "many", "valid integer"),
        ("stages.0.num_layers", 0, "greater than or equal to 1 (given: 0)"),
        ("stages.0.drop_layers", [1], "give num_layers or drop_layers, not both"),
        ("stages.0.target", {"params": "6e9"}, "give target or sizes (num_layers), not both"),
        ("stages.0.target", {}, "give at least one of params, memory_gb, latency_ms, throughput"),
        ("stages.0.target", {"throughput": 500}, "throughput needs `hardware`"),
        ("stages.0.repair", ["glue"], "'fold', 'reconstruct', 'refit' or 'readout' (given: 'glue')"),
        ("stages.0.depth_importance", "luck", "'search'"),
        ("stages.0", {"kind": "prune"}, "nothing to cut"),
        ("stages.0", {"kind": "quantize", "scheme": "fp7"}, "'fp8', 'int8' or 'none' (given: 'fp7')"),
        ("stages.0", {"kind": "quantize", "scheme": "int8", "kv_cache": "fp8"}, "kv_cache fp8 goes with scheme fp8"),
        ("stages.0", {"kind": "distill", "tokens": 100}, "make no optimizer step of 768 x 4096"),
        (
            "stages.0",
            {"kind": "distill", "tokens": 10**9, "batch_size": 6, "micro_batch_size": 4},
            "micro_batch_size 4 does not divide batch_size 6",
        ),
        (
            "stages.0",
            {"kind": "distill", "tokens": 10**9, "loss": "hinge"},
            "'forward_kl', 'reverse_kl', 'skewed_kl' or 'js' (given: 'hinge')",
        ),
        (
            "stages.0",
            {"kind": "distill", "tokens": 10**9, "teacher_share": 0.5},
            "teacher_share goes with loss skewed_kl or js, not forward_kl",
        ),
        (
            "stages.0",
            {"kind": "distill", "tokens": 10**9, "ce_balance": "proportional"},
            "ce_balance proportional wants a ce_weight between 0 and 1, not 0",
        ),
        ("stages.0.source", "later", "reads 'later', which is no stage before it; allowed: dense"),
        ("stages.0.name", "dense", "stage name 'dense' is taken"),
        ("stages.0.name", "../../etc", "should match pattern"),
        ("data.train", [{"source": "teacher"}], "needs `tokens`"),
        ("data.heldout", ["a/x.txt", "b/x.txt"], "two sources are called 'x'"),
        ("bench.variants", ["distil"], "bench.variants names 'distil'; allowed: dense, prune, final"),
        ("bench.prompt_tokens", 5000, "exceed max_model_len"),
        ("gates", ["speed is good"], "is not of the form"),
        (
            "gates",
            ["speed.output_tok_s >= 1.3 * baseline:qwen"],
            "compares with 'baseline:qwen'; allowed: dense, prune",
        ),
        ("model", "", "at least 1 character"),
    ],
)
def test_a_wrong_field_is_a_one_line_error_that_says_what_is_allowed(path: str, value: Any, message: str) -> None:
    with pytest.raises(InputError) as raised:
        parse_recipe(with_field(path, value), "test.yaml")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_mixture_is_the_papers_unless_said_otherwise() -> None:
    def mixture(**fields: Any) -> float:
        return Distill(tokens=10**9, **fields).mixture

    assert (mixture(loss="skewed_kl"), mixture(loss="js"), mixture()) == (0.1, 0.5, 0.0)
    assert mixture(loss="js", teacher_share=0.9) == 0.9


def test_stages_that_repeat_are_numbered_and_can_be_read_by_name() -> None:
    stages = [
        {"kind": "prune", "num_layers": 24},
        {"kind": "prune", "num_layers": 20},
        {"kind": "quantize", "scheme": "int8", "source": "prune"},
    ]
    recipe = parse_recipe({**MINIMAL, "stages": stages}, "test.yaml")
    assert [name for name, _ in recipe.named_stages()] == ["prune", "prune-2", "quantize"]
    assert recipe.variants() == ("dense", "prune", "prune-2", "quantize")
    assert recipe.final == "quantize"


def test_yaml_may_write_parameters_as_6e9() -> None:
    recipe = parse_recipe({**MINIMAL, "stages": [{"kind": "prune", "target": {"params": "6e9"}}]}, "test.yaml")
    stage = recipe.stages[0]
    assert stage.kind == "prune"
    assert stage.target is not None
    assert stage.target.params == 6_000_000_000


def test_a_bare_list_of_repairs_is_its_kinds() -> None:
    stages = [
        {"kind": "prune", "num_layers": 20, "repair": ["fold"]},
        {"kind": "prune", "num_layers": 18, "repair": []},
    ]
    first, second = parse_recipe({**MINIMAL, "stages": stages}, "test.yaml").stages
    assert first.kind == second.kind == "prune"
    assert (first.repair.kinds, second.repair.kinds) == (("fold",), ())


def test_set_overrides_fields_and_list_entries(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"model": "smollm2-135m", "stages": MINIMAL["stages"]}))
    recipe = load_recipe(str(path), ["model=./my-model", "stages.0.num_layers=24", "evaluate.tasks=[arc_easy]"])
    assert recipe.name == "mine"
    assert recipe.model.source == "./my-model"
    stage = recipe.stages[0]
    assert stage.kind == "prune"
    assert stage.num_layers == 24
    assert recipe.evaluate is not None
    assert recipe.evaluate.tasks[0].name == "arc_easy"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.0.num_layers", "has no form a.b=value"),
        ("stages.7.num_layers=3", "stages has entries 0 to 0, no '7'"),
        ("model.revision=main", "model is 'smollm2-135m', which has no fields"),
        ("stages.0.num_layers=[", "the value is not YAML"),
        ("speed=1", "speed: unknown field"),
    ],
)
def test_a_wrong_override_says_what_is_wrong(tmp_path: Path, override: str, message: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(MINIMAL))
    with pytest.raises(InputError) as raised:
        load_recipe(str(path), [override])
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"), [("- a\n- b\n", "holds no mapping"), ("a: [", "is not YAML"), ("", "holds no mapping")]
)
def test_a_file_that_is_no_recipe_is_refused(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(content)
    with pytest.raises(InputError) as raised:
        load_recipe(str(path))
    assert message in str(raised.value)


def test_an_unknown_recipe_lists_what_ships() -> None:
    with pytest.raises(InputError, match=r"shipped: .*smollm2-135m-cpu"):
        load_recipe("smollm3")


@pytest.mark.parametrize(
    "module",
    [
        "stillroom.recipe",
        "stillroom.cli",
        "stillroom.plan",
        "stillroom.preflight",
        "stillroom.pipeline",
        "stillroom.doctor",
    ],
)
def test_planning_imports_no_torch(module: str) -> None:
    script = f"import sys, {module}; print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert answer.stdout.strip() == "[]"
