"""What a reader is told of a prune stage: on the terminal, as JSON, and by the command."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from results import artifact, finished_run, prune_details, prune_scores
from runs import stillroom, tiny_recipe
from stillroom.errors import InputError
from stillroom.inspection import explain_path
from stillroom.models.shape import ModelShape, shape_of
from stillroom.prune.cut import Cut
from stillroom.prune.explain import Explanation, explain
from stillroom.prune.explain_table import ranges, render_explanation
from stillroom.prune.importance.scores import Importance
from stillroom.prune.lost import what_went
from tiny import tiny_config

CALIBRATION = {"samples": 8, "sequence_length": 64, "batch_size": 4}
SEARCH = {"tokens": 64, "generations": 1, "offspring": 2, "finalists": 1}
DEPTH_AND_WIDTH = {
    "kind": "prune", "num_layers": 3, "intermediate_size": 128, "num_key_value_heads": 1, "search": SEARCH,
    "calibration": CALIBRATION,
}  # fmt: skip


def explained(folder: Path, **changes: Any) -> Explanation:
    details = {name: value for name, value in (prune_details() | changes).items() if value is not ...}
    return explain(artifact(folder, "prune", "prune", details=details, files={"importance.json": prune_scores()}))


def printed(explanation: Explanation, width: int = 100) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(render_explanation(explanation))
    return console.export_text()


def shape(family: str, **sizes: Any) -> ModelShape:
    return shape_of(tiny_config(family, **sizes).to_dict(), family)


def test_each_layer_says_what_it_costs_what_went_and_what_repair_gave_back(tmp_path: Path) -> None:
    told = explained(tmp_path)
    details = prune_details()
    assert told.dropped == tuple(details["dropped_layers"])
    assert [layer.kl_without for layer in told.layers] == details["layer_kl"]
    assert (told.score_method, told.layers[0].score) == ("block_influence", prune_scores()["block_influence"][0])
    gone = told.layers[told.dropped[0]]
    assert (gone.importance_lost, gone.repairs) == ({}, ())
    kept = details["kept_layers"][5]
    assert told.layers[kept].importance_lost == {"ffn": details["importance_lost"]["ffn"][5]}
    gains = [layer.gain for layer in told.layers if layer.gain is not None]
    assert len(gains) == 8
    assert gains.count(0.0) == 1  # what made it worse was undone
    assert told.kl_cut is not None
    assert told.kl == pytest.approx(told.kl_cut - sum(gains))


def test_each_size_says_what_it_saves_and_what_share_of_importance_goes(tmp_path: Path) -> None:
    layers, ffn = explained(tmp_path).sizes
    assert (layers.size, layers.before, layers.after, layers.params_saved) == ("num_layers", 30, 24, 21_240_576)
    costs, dropped = prune_details()["layer_kl"], prune_details()["dropped_layers"]
    assert layers.importance_lost == pytest.approx(sum(costs[i] for i in dropped) / sum(costs))
    shares = prune_details()["importance_lost"]["ffn"]
    assert ffn.importance_lost == pytest.approx(sum(shares) / len(shares))


def test_the_table_has_a_row_for_each_layer_a_total_and_no_empty_column(tmp_path: Path) -> None:
    text = printed(explained(tmp_path))
    rows = [line.split() for line in text.splitlines()]
    assert sum(row[1] == "goes" for row in rows if len(row) > 1 and row[0].isdigit()) == 6
    assert sum(bool(row) and row[0].isdigit() for row in rows) == 30
    assert "heads lost" not in text
    assert "6 of 30 layers went (13, 16, 21, 24, 27, 29), by search; FFN channels cut by minitron" in text
    assert "135M to 93.0M parameters (69.1%); KL to the unpruned model 0.9100 nats/token, 0.7619 repaired (-16%)" in (
        " ".join(text.split())
    )
    assert all(len(line) <= 80 for line in printed(explained(tmp_path / "again"), 80).splitlines())


def test_json_is_the_whole_explanation_even_where_a_cost_is_infinite(tmp_path: Path) -> None:
    told = explained(tmp_path, kl=float("inf"), kl_cut=float("inf"))
    assert Explanation.model_validate_json(told.model_dump_json()) == told
    assert json.loads(told.model_dump_json())["kl"] == "Infinity"
    assert "KL to the unpruned model inf nats/token, inf repaired, 7 of 8" in " ".join(printed(told).split())


def test_what_was_not_measured_is_left_out(tmp_path: Path) -> None:
    """Layers that the recipe names, without repair: nothing is measured, and the sizes are still told."""
    bare: dict[str, Any] = {"layer_kl": None, "kl": None, "kl_cut": None, "repairs": [], "importance_lost": {}}
    given_layers = artifact(
        tmp_path, "prune", "prune", details=prune_details() | bare, config={"drop_layers": [13, 16, 21, 24, 27, 29]}
    )
    told = explain(given_layers)
    assert (told.depth_method, told.score_method) == ("given", None)
    text = printed(told)
    assert "as the recipe says" in text
    assert "KL without" not in text
    assert "what the cut costs was not measured" in text
    assert "21,240,576" in text


def test_angular_scores_of_single_layers_come_from_the_table_of_blocks(tmp_path: Path) -> None:
    table = [[0.1 * (m - n) if m > n else 0.0 for m in range(31)] for n in range(31)]
    details = prune_details() | {"depth_importance": "angular", "layer_kl": None}
    told = explain(artifact(tmp_path, "prune", "prune", details=details, files={"importance.json": {"angular": table}}))
    assert [layer.score for layer in told.layers] == [pytest.approx(0.1)] * 30
    assert told.sizes[0].importance_lost == pytest.approx(6 / 30)


def test_what_megatron_cut_is_told_by_its_sizes(tmp_path: Path) -> None:
    sizes = ("sizes_before", "sizes_after", "params_before", "params_after", "params_saved_alone")
    details = {"backend": "megatron", "not_recovered": "numbers changed"}
    details |= {name: prune_details()[name] for name in sizes}
    told = explain(artifact(tmp_path, "prune", "prune", details=details))
    assert told.layers == ()
    assert "does not tell which layers and channels went: numbers changed" in " ".join(printed(told).split())
    assert "FFN channels" in printed(told)


def test_what_stayed_of_a_megatron_cut_is_told_where_it_was_recovered(tmp_path: Path) -> None:
    own = ("depth_importance", "width_importance", "block_influence", "layer_kl", "searched_shapes")
    details = {"backend": "megatron"} | {name: value for name, value in prune_details().items() if name not in own}
    told = explain(artifact(tmp_path, "prune", "prune", details=details))
    assert f"{len(told.dropped)} of {len(told.layers)} layers went" in printed(told)
    assert "does not tell" not in printed(told)
    assert "repaired" in printed(told)


@given(st.lists(st.integers(0, 60), unique=True))
def test_ranges_name_the_same_numbers(numbers: list[int]) -> None:
    found: list[int] = []
    for part in filter(None, ranges(numbers).split(", ")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    assert found == sorted(numbers)


@pytest.mark.parametrize(
    ("cut", "lost", "hidden", "units"),
    [
        (Cut((0, 2), ffn={0: (0,), 2: (0, 1, 2, 3)}), {"ffn": [0.9, 0.0]}, None, {}),
        (Cut((0, 1), hidden=(0, 1, 2)), {}, 0.4, {}),
        (
            Cut((0,), heads={0: (0, 1)}, kv_groups={0: (0,)}),
            {"heads": [0.7], "kv_groups": [0.75]},
            None,
            {"heads": [[0, 1]], "kv_groups": [[0]]},
        ),
        (Cut((0,), heads={0: (0, 2)}, kv_groups={0: (0, 1)}), {"heads": [0.6]}, None, {"heads": [[0, 2]]}),
    ],
)
def test_the_share_that_goes_is_of_the_layers_own_scores(
    cut: Cut, lost: Mapping[str, Any], hidden: float | None, units: Mapping[str, Any]
) -> None:
    small = shape("llama", hidden_size=4, intermediate_size=4, head_dim=2, num_hidden_layers=3)
    scores = Importance(
        num_windows=1,
        num_tokens=1,
        ffn=torch.tensor([[1.0, 2, 3, 4]] * 3),
        heads=torch.tensor([[1.0, 2, 3, 4]] * 3),
        kv_groups=torch.tensor([[1.0, 3.0]] * 3),
        hidden=torch.tensor([1.0, 2, 3, 4]),
    )
    told = what_went(scores, small, cut)
    assert told == {"importance_lost": lost, "hidden_importance_lost": hidden, "kept_units": units}


def test_experts_are_judged_by_the_experts_that_stay() -> None:
    moe = shape("qwen3_moe", num_hidden_layers=1, num_experts=2, moe_intermediate_size=2, num_experts_per_tok=1)
    scores = Importance(
        num_windows=1,
        num_tokens=1,
        experts=torch.tensor([[3.0, 1.0]]),
        expert_ffn=torch.tensor([[[4.0, 1.0], [9.0, 9.0]]]),
    )
    told = what_went(scores, moe, Cut((0,), experts={0: (0,)}, expert_ffn={0: {0: (0,)}}))
    assert told["importance_lost"] == {"experts": [0.25], "expert_ffn": [0.2]}
    assert told["kept_units"] == {"experts": [[0]]}


def test_a_run_is_explained_by_all_its_prune_stages_and_other_artifacts_are_refused(tmp_path: Path) -> None:
    _, inputs = finished_run(tmp_path / "run")
    names = {role: made.path.name for role, made in inputs.items() if role in ("dense", "prune", "distill")}
    (tmp_path / "run" / "run.json").write_text(json.dumps({"artifacts": names}))
    assert [told.name for told in explain_path(tmp_path / "run")] == ["prune"]
    assert explain_path(inputs["prune"].path)[0].key == inputs["prune"].key
    with pytest.raises(InputError, match="of kind distill; only the result of a prune stage"):
        explain_path(inputs["distill"].path)
    with pytest.raises(InputError, match="no run and no artifact"):
        explain_path(tmp_path)


def test_explaining_needs_no_torch() -> None:
    code = "import sys, stillroom.inspection, stillroom.prune.explain_table; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_prune_stops_at_its_stage_explains_it_and_a_later_run_goes_on_from_it(tmp_path: Path) -> None:
    recipe = tiny_recipe(tmp_path / "recipe", stages=[DEPTH_AND_WIDTH], evaluate=None, gates=[])
    home, run_dir = tmp_path / "home", tmp_path / "run"
    first = stillroom("prune", recipe, "--out", run_dir, "--explain", home=home)
    assert first.returncode == 0, first.stderr
    assert "1 of 4 layers went" in first.stdout
    assert "KV groups" in first.stdout
    made = sorted(path.name.rsplit("-", 1)[0] for path in (run_dir / "artifacts").iterdir())
    assert made == ["dense", "prune", "text-train.teacher"]
    again = stillroom("prune", run_dir, "--explain", "--json", home=home)
    (line,) = again.stdout.splitlines()
    told = Explanation.model_validate(json.loads(line)["explanation"])
    assert (len(told.layers), len(told.dropped)) == (4, 1)
    assert {size.size for size in told.sizes} == {
        "num_layers", "intermediate_size", "num_attention_heads", "num_key_value_heads"
    }  # fmt: skip
    finished = stillroom("run", recipe, "--out", run_dir, "--json", home=home)
    assert finished.returncode == 0, finished.stderr
    events = [json.loads(line) for line in finished.stdout.splitlines()]
    assert {event["step"] for event in events if event["event"] == "cached"} == {"dense", "text:train.teacher", "prune"}
    shorter = stillroom("prune", recipe, "--out", run_dir, "--json", home=home)
    assert shorter.returncode == 0, shorter.stderr
    assert "verdict" in json.loads((run_dir / "run.json").read_text())["artifacts"]  # the run stays finished


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("no-such-recipe",), "neither a file nor a shipped recipe"),
        (("finished",), "is no recipe; give --explain"),
        (("finished", "--explain", "--out", "elsewhere"), "--out and --set change nothing in it"),
        (("finished", "--explain"), "is a run without a finished prune stage"),
        (("smollm2-135m-cpu", "--set", "stages=[{kind: quantize, scheme: none}]", "--set", "gates=[]", "--set",
          "bench=null"), "has no prune stage; its stages: quantize"),
    ],
)  # fmt: skip
def test_what_prune_cannot_take_is_said_in_one_line(arguments: tuple[str, ...], message: str, tmp_path: Path) -> None:
    (tmp_path / "finished").mkdir()
    (tmp_path / "finished" / "run.json").write_text('{"artifacts": {}}')
    answer = stillroom("prune", *arguments, home=tmp_path / "home", cwd=tmp_path)
    assert (answer.returncode, len(answer.stderr.splitlines())) == (2, 1), answer.stderr
    assert message in answer.stderr
    assert not (tmp_path / "runs").exists()
