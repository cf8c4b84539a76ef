"""The prune stage from a checkpoint directory and a text file to a checkpoint directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from stillroom.artifact import Artifact, Manifest
from stillroom.errors import InputError
from stillroom.models.load import load_model
from stillroom.models.shape import read_config, shape_of
from stillroom.models.weights import check_weights
from stillroom.prune import pruner, stage
from stillroom.prune.frontier import read_frontier
from stillroom.recipe import Calibration, Prune, Repair, SearchBudget, Target, TextSource
from stillroom.stage import Job
from tiny import ALL_FAMILIES, FAMILIES, edited_checkpoint, tiny_checkpoint, tiny_text_file


class Notes:
    """A Progress that remembers."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.units: set[str] = set()

    def update(self, done: int, total: int, unit: str, **facts: float | str) -> None:
        assert 0 < done <= total
        self.units.add(unit)

    def log(self, message: str) -> None:
        self.lines.append(message)


def job_for(tmp_path: Path, model_dir: Path, num_documents: int = 200, **sizes: Any) -> Job:
    manifest = Manifest(
        kind="import", name="dense", key="0" * 16, stage_version=1, config={}, parents={}, files={}, environment={},
        seed=0, seconds=0.0, location=str(model_dir),
    )  # fmt: skip
    text = tiny_text_file(tmp_path / "text.txt", num_documents)
    calibration = Calibration(samples=6, sequence_length=32, batch_size=4)
    search = SearchBudget(tokens=64, generations=1, offspring=2, finalists=2)
    return Job(
        name="prune",
        config=Prune(**({"calibration": calibration, "search": search} | sizes)),
        inputs={"source": Artifact(tmp_path / "dense-artifact", manifest)},
        text=(TextSource(source=str(text)),),
        out_dir=tmp_path / "out",
        scratch_dir=tmp_path / "scratch",
        seed=3,
        progress=Notes(),
    )


def logits(model_dir: Path) -> torch.Tensor:
    ids = torch.arange(3, 27)[None]
    with torch.inference_mode():
        result: torch.Tensor = AutoModelForCausalLM.from_pretrained(model_dir).eval()(ids).logits
    return result


SIZES = {
    "llama": {"num_layers": 3, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 2},
    "mistral": {"num_layers": 3, "hidden_size": 48, "intermediate_size": 96, "num_key_value_heads": 1},
    "qwen2": {"num_layers": 3, "hidden_size": 32, "intermediate_size": 96, "num_key_value_heads": 1},
    "qwen3": {"num_layers": 3, "hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 2},
    "gemma3_text": {"num_layers": 3, "hidden_size": 48, "intermediate_size": 96, "num_key_value_heads": 1},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_depth_and_width_at_once_write_what_the_plan_promised(family: str, tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", family, dtype=torch.bfloat16)
    job = job_for(tmp_path, dense, **SIZES[family])
    result = stage.run(job)
    written = shape_of(read_config(job.out_dir), "out")
    check_weights(job.out_dir, written)
    assert {size: getattr(written, size) for size in SIZES[family]} == SIZES[family]
    details = result.details
    assert details["params_after"] == written.num_params < details["params_before"]
    assert details["sizes_after"]["head_dim"] == details["sizes_before"]["head_dim"] == 16
    assert sorted(details["kept_layers"] + details["dropped_layers"]) == [0, 1, 2, 3]
    assert len(details["layer_kl"]) == len(details["block_influence"]) == 4
    assert (details["calibration_samples"], details["calibration_tokens"], result.tokens) == (6, 192, 192)
    tables = json.loads((job.out_dir / "importance.json").read_text())
    assert (len(tables["ffn"]), len(tables["ffn"][0])) == (4, 128)
    assert (len(tables["heads"][0]), len(tables["hidden"])) == (4, 64)
    assert isinstance(job.progress, Notes)
    assert job.progress.units >= {"windows", "choices", "tensors"}
    assert details["kl"] <= details["kl_cut"]
    assert torch.isfinite(logits(job.out_dir)).all()
    assert json.loads(json.dumps(details)) == details


def test_importance_finds_the_units_that_do_nothing(tmp_path: Path) -> None:
    """Layers, FFN channels, heads and hidden channels that are silent are what goes, and no logit changes."""

    def silence(model: Any) -> None:
        hidden = list(range(0, 64, 4))
        model.model.embed_tokens.weight[:, hidden] = 0
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight[:16] = 0  # the first KV group's heads put out nothing
            layer.mlp.up_proj.weight[96:] = 0
            layer.self_attn.o_proj.weight[hidden] = 0
            layer.mlp.down_proj.weight[hidden] = 0
        model.model.layers[2].self_attn.o_proj.weight.zero_()
        model.model.layers[2].mlp.down_proj.weight.zero_()

    dense = edited_checkpoint(tmp_path / "dense", "qwen3", silence, rms_norm_eps=1e-12)
    sizes = {"num_layers": 3, "hidden_size": 48, "intermediate_size": 96, "num_key_value_heads": 1}
    job = job_for(tmp_path, dense, **sizes)
    assert stage.run(job).details["dropped_layers"] == [2]
    torch.testing.assert_close(logits(job.out_dir), logits(dense), rtol=1e-4, atol=1e-4)


def test_given_layers_need_neither_text_nor_the_model_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pruner, "load_model", None)
    monkeypatch.setattr(stage, "calibration_windows", None)
    job = job_for(tmp_path, tiny_checkpoint(tmp_path / "dense"), drop_layers=(1, 2), repair=Repair(kinds=()))
    result = stage.run(job)
    assert (result.details["kept_layers"], result.tokens) == ([0, 3], None)
    assert not (job.out_dir / "importance.json").exists()


def test_a_target_size_is_kept_and_everything_scored_is_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", "mistral")
    params = shape_of(read_config(dense), "dense").num_params
    monkeypatch.setenv("STILLROOM_HOME", str(tmp_path / "home"))
    target = Target(params=params * 3 // 4, multiple_of=16, candidates=3, rerank=2, rerank_tokens=64)
    job = job_for(tmp_path, dense, target=target)
    details = stage.run(job).details
    assert params // 2 < details["params_after"] <= params * 3 // 4
    frontier = read_frontier(job.out_dir)
    assert frontier is not None
    assert frontier.winner.params == details["params_after"]
    assert min(c.reranked for c in frontier.candidates if c.reranked is not None) == frontier.winner.reranked


def test_the_same_job_writes_the_same_bytes(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", "llama")
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    files = []
    for name in ("a", "b"):
        job = job_for(tmp_path / name, dense, num_layers=2, intermediate_size=64)
        stage.run(job)
        files.append({path.name: path.read_bytes() for path in job.out_dir.iterdir()})
    assert files[0] == files[1]


@pytest.mark.parametrize(
    ("sizes", "num_documents", "message"),
    [
        ({"num_layers": 9}, 200, "num_layers 9 is above the model's 4"),
        (
            {"num_layers": 2, "calibration": Calibration(samples=1, sequence_length=4096)},
            200,
            "beyond the model's 2048",
        ),
        ({"num_layers": 2, "calibration": Calibration(samples=2, sequence_length=2000)}, 1, "a window needs 2000"),
    ],
)
def test_bad_input_leaves_nothing_behind(
    sizes: dict[str, Any], num_documents: int, message: str, tmp_path: Path
) -> None:
    job = job_for(tmp_path, tiny_checkpoint(tmp_path / "dense"), num_documents, **sizes)
    with pytest.raises(InputError, match=message):
        stage.run(job)
    assert not job.out_dir.exists()


def test_a_text_that_gives_fewer_windows_is_said_so(tmp_path: Path) -> None:
    calibration = Calibration(samples=1000, sequence_length=64, batch_size=8)
    job = job_for(tmp_path, tiny_checkpoint(tmp_path / "dense"), 5, num_layers=2, calibration=calibration)
    stage.run(job)
    assert isinstance(job.progress, Notes)
    assert "all that the text gives of the 1000 asked for" in job.progress.lines[0]


@pytest.mark.parametrize("family", [name for name in ALL_FAMILIES if name not in SIZES])
def test_every_other_family_is_cut_in_depth_and_width(family: str, tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", family)
    shape = shape_of(read_config(dense), "dense")
    sizes: dict[str, Any] = {"num_layers": shape.num_layers - 1}
    if shape.family.has_axis("ffn"):
        sizes["intermediate_size"] = 96
    else:
        sizes |= {"num_experts": shape.num_experts - 1, "moe_intermediate_size": 16}
    if shape.num_decoder_layers:
        sizes["num_decoder_layers"] = shape.num_decoder_layers - 1
    job = job_for(tmp_path, dense, **sizes)
    stage.run(job)
    written = shape_of(read_config(job.out_dir), "out")
    assert {size: getattr(written, size) for size in sizes} == sizes
    check_weights(job.out_dir, written)
    assert load_model(job.out_dir).num_parameters() < load_model(dense).num_parameters()


@pytest.mark.parametrize(
    ("family", "sizes", "message"),
    [
        ("llama", {"num_layers": 3, "repair": Repair(kinds=("readout",))}, "readout: no hidden channel is cut"),
        ("llama", {"intermediate_size": 96, "repair": Repair(kinds=("fold",))}, "no layer is cut"),
        ("gemma3_text", {"num_layers": 3, "repair": Repair(kinds=("fold",))}, "a norm stands between"),
        ("bert", {"num_layers": 3, "repair": Repair(kinds=("refit",))}, "bert is none"),
        ("bert", {"num_layers": 3, "depth_importance": "search"}, "bert is none; use block_influence"),
    ],
)
def test_what_a_family_forbids_is_refused_with_the_reason(
    family: str, sizes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    job = job_for(tmp_path, tiny_checkpoint(tmp_path / "dense", family), **sizes)
    with pytest.raises(InputError, match=message):
        stage.run(job)
    assert not job.out_dir.exists()
