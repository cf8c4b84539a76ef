"""A model that does not fit in memory is cut from disk: as well as one can without running all of it, and said so."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from jobs import Kept, artifact_at, job_of
from stillroom.errors import EnvironmentCannot
from stillroom.prune import pruner, stage
from stillroom.recipe import Calibration, Prune, Repair, Target
from stillroom.stage import Job
from tiny import tiny_checkpoint, tiny_text_file

CALIBRATION = Calibration(samples=6, sequence_length=32, batch_size=4)


def prune_job(folder: Path, dense: Path, **fields: Any) -> Job:
    folder.mkdir()
    config = Prune(calibration=CALIBRATION, **fields)
    return job_of(config, {"source": artifact_at(dense)}, tiny_text_file(folder / "text.txt"), folder / "job", seed=3)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    return tiny_checkpoint(tmp_path / "dense", "qwen3")


@pytest.fixture
def too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pruner, "too_large", lambda model_dir: True)


def test_it_is_cut_as_one_in_memory_that_is_neither_searched_nor_repaired(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {"num_layers": 3, "intermediate_size": 96, "hidden_size": 48}
    plain = prune_job(tmp_path / "a", dense, depth_importance="block_influence", repair=Repair(kinds=()), **sizes)
    stage.run(plain)
    monkeypatch.setattr(pruner, "too_large", lambda model_dir: True)
    monkeypatch.setattr(pruner, "load_model", None)  # never opened whole
    job = prune_job(tmp_path / "b", dense, **sizes)
    details = stage.run(job).details
    assert isinstance(job.progress, Kept)
    said = [line for line in job.progress.lines if "does not fit in memory" in line]
    assert said == [
        "the model does not fit in memory: importance runs layer by layer from disk, layers are ranked by "
        "block_influence instead of searched, and nothing is repaired"
    ]
    assert (details["kl"], details["repairs"]) == (None, [])
    assert (job.out_dir / "model.safetensors").read_bytes() == (plain.out_dir / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("fields", "what"),
    [
        ({"num_layers": 3, "depth_importance": "search"}, "depth_importance search"),
        ({"num_layers": 3, "repair": Repair(kinds=("fold", "refit"))}, "repair fold, refit"),
        ({"target": Target(params=100_000, rerank=0)}, "target"),
    ],
)
def test_what_was_asked_for_by_name_and_needs_memory_is_refused(
    fields: dict[str, Any], what: str, dense: Path, tmp_path: Path, too_large: None
) -> None:
    job = prune_job(tmp_path / "a", dense, **fields)
    with pytest.raises(EnvironmentCannot, match=f"does not fit in memory, and {what} runs all of it; give sizes"):
        stage.run(job)
    assert list(job.out_dir.iterdir()) == []
