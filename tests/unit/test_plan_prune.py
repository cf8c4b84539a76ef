"""What the plan says of a prune stage before it runs, and what determines the stage's key."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from runs import stillroom, tiny_recipe
from stillroom import preflight
from stillroom.errors import EnvironmentCannot, InputError
from stillroom.machine import GIB, Gpu, Machine
from stillroom.models.shape import ModelShape, shape_of
from stillroom.plan import Plan, make_plan
from stillroom.preflight import outlook, require_runnable
from stillroom.prune.allowed import reads_text
from stillroom.prune.preview import Preview, preview
from stillroom.recipe import Prune, load_recipe
from tiny import tiny_config

LAPTOP = Machine(num_cores=2, memory_bytes=16 * GIB, gpus=())
TWO_GPUS = dataclasses.replace(LAPTOP, gpus=(Gpu("H200", 141 * GIB, "570"),) * 2)
QWEN3_8B = shape_of(
    {"model_type": "qwen3", "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
     "head_dim": 128, "hidden_size": 4096, "intermediate_size": 12288, "vocab_size": 151936,
     "tie_word_embeddings": False}, "Qwen3-8B"
)  # fmt: skip


def seen(shape: ModelShape, machine: Machine = LAPTOP, **config: Any) -> Preview:
    return preview(Prune.model_validate(config), shape, Path("SOURCE"), Path("OUT"), machine, "bfloat16")


def tiny_shape(family: str) -> ModelShape:
    return shape_of(tiny_config(family).to_dict(), family)


def planned(folder: Path, **prune: Any) -> Plan:
    recipe = tiny_recipe(folder, stages=[{"kind": "prune", **prune}], gates=[])
    return make_plan(load_recipe(str(recipe)))


def test_depth_is_searched_and_folded_where_a_decoder_fits_in_memory() -> None:
    told = seen(QWEN3_8B, TWO_GPUS, num_layers=24)
    assert told.lines() == ["cut: num_layers 36 -> 24", "layers: by search", "repair: fold, refit"]
    assert told.as_json()["depth"] == "search"


def test_width_and_hidden_channels_are_reconstructed_and_read_out() -> None:
    told = seen(QWEN3_8B, TWO_GPUS, intermediate_size=8192, hidden_size=3584)
    assert (told.depth, told.width, told.repair) == (None, "l2", ("reconstruct", "readout"))
    assert told.sizes == {"hidden_size": (4096, 3584), "intermediate_size": (12288, 8192)}


def test_a_model_beyond_memory_is_ranked_by_block_influence_and_the_reason_is_said() -> None:
    told = seen(QWEN3_8B, LAPTOP, num_layers=24)
    assert (told.depth, told.repair) == ("block_influence", ())
    assert all("does not fit in this machine's memory" in line for line in told.lines()[1:])


def test_encoders_and_norms_in_the_way_are_named_as_reasons() -> None:
    bert = seen(tiny_shape("bert"), num_layers=3)
    assert (bert.depth, bert.repair) == ("block_influence", ())
    assert "runs decoders layer by layer, and bert is none" in bert.lines()[1]
    gemma = seen(tiny_shape("gemma3_text"), num_layers=3)
    assert (gemma.depth, gemma.repair) == ("search", ())
    assert "fold: in gemma3_text a norm stands between" in gemma.lines()[2]


def test_given_layers_and_no_repair_are_what_the_recipe_says() -> None:
    assert seen(QWEN3_8B, drop_layers=(20, 21), repair=[]).lines() == [
        "cut: num_layers 36 -> 34",
        "layers: by the recipe, 20, 21 go",
        "repair: none",
    ]


def test_a_target_says_what_must_hold_and_how_many_shapes_are_tried() -> None:
    told = seen(QWEN3_8B, TWO_GPUS, target={"params": "6e9"})
    assert told.search == (
        "at most 6,000,000,000 parameters; 12 candidates, the best 3 again after 1,000,000 tokens of distillation"
    )
    assert told.repair is None
    loaded = {"latency_ms": 9, "hardware": "H200", "scheme": "fp8", "batch": 8, "tensor_parallel": 2, "rerank": 0}
    assert seen(QWEN3_8B, TWO_GPUS, target=loaded).search == (
        "at most 9 ms between tokens on H200 (8 x 4,096 tokens, fp8 weights, 2 GPUs); 12 candidates"
    )


def test_the_megatron_command_is_shown_and_checked() -> None:
    told = seen(QWEN3_8B, TWO_GPUS, num_layers=24, backend="megatron")
    assert told.command[:3] == ("torchrun", "--nproc_per_node", "2")
    assert '{"num_layers": 24}' in told.command
    assert told.lines()[-1].startswith("command: torchrun --nproc_per_node 2 ")
    assert told.as_json()["command"] == list(told.command)
    with pytest.raises(InputError, match="chooses the layers itself"):
        seen(QWEN3_8B, TWO_GPUS, drop_layers=(1,), backend="megatron")


def test_the_plan_says_what_of_a_megatron_cut_is_repaired() -> None:
    told = seen(QWEN3_8B, TWO_GPUS, num_layers=24, backend="megatron")
    assert told.repair == ("fold", "refit")
    assert told.lines()[-2] == "repair: fold, refit, where the result tells what stayed"
    assert seen(QWEN3_8B, TWO_GPUS, num_layers=24, backend="megatron", repair=["fold"]).repair == ("fold",)
    assert seen(QWEN3_8B, TWO_GPUS, num_layers=24, backend="megatron", repair=[]).lines()[-2] == "repair: none"
    assert seen(QWEN3_8B, LAPTOP, num_layers=24, backend="megatron").lines()[-2] == (
        "repair: none (all: the model does not fit in this machine's memory)"
    )
    searched = seen(QWEN3_8B, TWO_GPUS, target={"params": "6e9"}, backend="megatron")
    assert (searched.repair, searched.lines()[-2]) == (
        None, "repair: what the cut allows, where the result tells what stayed"
    )  # fmt: skip
    with pytest.raises(InputError, match="repair readout: no hidden channel is cut"):
        seen(QWEN3_8B, TWO_GPUS, num_layers=24, backend="megatron", repair=["readout"])


@pytest.mark.parametrize(
    ("fields", "reads"),
    [
        ({"num_layers": 24}, True),
        ({"num_layers": 24, "repair": []}, False),
        ({"target": {"params": "6e9"}}, True),
        ({"target": {"params": "6e9"}, "repair": []}, False),
    ],
)
def test_windows_of_text_are_read_for_a_megatron_cut_where_it_is_repaired(fields: dict[str, Any], reads: bool) -> None:
    assert reads_text(Prune.model_validate({"backend": "megatron"} | fields), QWEN3_8B) == reads
    assert reads_text(Prune.model_validate(fields), QWEN3_8B)


def test_a_repair_that_cannot_be_done_is_refused_by_the_plan(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="stage 'prune': repair fold: no layer is cut"):
        outlook(planned(tmp_path, intermediate_size=128, repair=["fold"]), None)


def test_the_plan_command_shows_it_as_text_and_as_json(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "recipe", stages=[{"kind": "prune", "num_layers": 3}], gates=[])
    text = stillroom("plan", recipe, home=tmp_path / "home")
    assert "layers: by search" in text.stdout
    assert "repair: fold, refit" in text.stdout
    answer = stillroom("plan", recipe, "--json", home=tmp_path / "home")
    steps = {step["name"]: step for step in json.loads(answer.stdout)["steps"]}
    assert steps["prune"]["prune"]["repair"] == ["fold", "refit"]
    assert "prune" not in steps["verify:prune"]


def test_previewing_needs_no_torch() -> None:
    code = "import sys, stillroom.preflight, stillroom.prune.preview; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_beyond_memory_may_be_pruned_but_not_taught_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "this_machine", lambda: dataclasses.replace(LAPTOP, memory_bytes=1 << 20))
    recipe = tiny_recipe(tmp_path, stages=[{"kind": "prune", "num_layers": 3}], gates=[])
    raw = yaml.safe_load(recipe.read_text())
    raw["data"]["train"] = raw["data"]["train"][:1]  # without what the teacher writes
    recipe.write_text(yaml.safe_dump(raw))
    plan = make_plan(load_recipe(str(recipe)))
    require_runnable(plan.up_to("prune"), tmp_path)
    with pytest.raises(EnvironmentCannot, match="'evaluate:dense' needs at least"):
        require_runnable(plan, tmp_path)
    searched = make_plan(load_recipe(str(recipe), ["stages.0.depth_importance=greedy"]))
    with pytest.raises(EnvironmentCannot, match="'prune' needs at least"):
        require_runnable(searched.up_to("prune"), tmp_path)


def test_megatron_without_its_image_is_refused_before_anything_runs(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentCannot, match="needs megatron-bridge"):
        require_runnable(planned(tmp_path, num_layers=3, backend="megatron"), tmp_path)


def test_only_what_a_step_needs_is_planned_up_to_it(tmp_path: Path) -> None:
    plan = planned(tmp_path, num_layers=3)
    assert [step.name for step in plan.up_to("prune").steps] == ["dense", "text:train.teacher", "prune"]
    assert plan.up_to("verdict").steps == plan.steps


def measured(path: Path, step_ms: float) -> Path:
    path.parent.mkdir(exist_ok=True)
    config = tiny_config("llama").to_dict()
    point = {"label": "dense", "config": config, "batch": 1, "context": 64, "step_ms": step_ms}
    path.write_text(json.dumps({"hardware": "cpu", "engine": "vllm 0.32", "points": [point]}))
    return path


def test_measured_speeds_determine_a_prune_stage_by_their_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def key(table: Path | str) -> str:
        target = {"latency_ms": 5, "hardware": "cpu", "measured": str(table)}
        return planned(tmp_path / "recipe", target=target).step("prune").key

    first = key(measured(tmp_path / "here.json", 7.0))
    assert key(measured(tmp_path / "elsewhere" / "there.json", 7.0)) == first
    assert key("here.json") == first  # a relative path is a way to the same table
    assert key(measured(tmp_path / "here.json", 7.5)) != first
    with pytest.raises(InputError, match=r"nowhere\.json is no file"):
        key("nowhere.json")
