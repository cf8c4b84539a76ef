"""A search for a target that is killed goes on with the scores it had, to the result of one that was not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from runs import TINY_CALIBRATION, kill_when, stillroom, tiny_recipe
from stillroom.artifact import Artifact, damaged_files, open_artifact
from stillroom.models.shape import read_config, shape_of
from stillroom.prune.frontier import Frontier, read_frontier


def recipe_of(folder: Path) -> Path:
    tiny_recipe(folder)  # makes the model
    params = shape_of(read_config(folder / "model"), "tiny").num_params
    target = {"params": params * 3 // 4, "candidates": 4, "rerank": 1, "rerank_tokens": 128}
    search = {"tokens": 128, "generations": 1, "offspring": 2, "finalists": 1}
    prune = {"kind": "prune", "target": target, "search": search, "calibration": TINY_CALIBRATION}
    data = {"train": [str(folder / "train.txt")], "heldout": [str(folder / "heldout.txt")], "decontaminate": False}
    return tiny_recipe(folder, stages=[prune], evaluate=None, gates=[], data=data)


def pruned(run_dir: Path) -> tuple[Artifact, Frontier]:
    place = json.loads((run_dir / "run.json").read_text())["artifacts"]["prune"]
    artifact = open_artifact(run_dir / place)
    assert artifact is not None
    frontier = read_frontier(artifact.path)
    assert frontier is not None
    return artifact, frontier


def without_seconds(frontier: Frontier) -> Any:
    content = frontier.model_dump()
    return content | {"candidates": [{**scored, "seconds": None} for scored in content["candidates"]]}


def scores(home: Path) -> dict[str, int]:
    """The scores on disk, with the time at which each was written."""
    return {path.name: path.stat().st_mtime_ns for path in (home / "scores").glob("*.json")}


def test_a_search_killed_twice_scores_only_what_is_missing_and_ends_the_same(tmp_path: Path) -> None:
    recipe = recipe_of(tmp_path / "recipe")
    whole = stillroom("run", recipe, "--out", tmp_path / "whole", home=tmp_path / "home-1")
    assert whole.returncode == 0, whole.stderr

    home = tmp_path / "home-2"
    kill_when(lambda line: "candidate 2 of 5" in line, recipe, tmp_path / "killed", home)
    while_scoring = scores(home)
    assert 2 <= len(while_scoring) < 5
    kill_when(lambda line: "candidate 5 of 5" in line, recipe, tmp_path / "killed", home)
    when_ranked = scores(home)
    assert len(when_ranked) == 5
    assert not list((tmp_path / "killed" / "artifacts").glob("prune-*"))
    finished = stillroom("run", recipe, "--out", tmp_path / "killed", home=home)
    assert finished.returncode == 0, finished.stderr

    assert scores(home) == when_ranked | while_scoring  # none was written again
    (made, found), (expected, frontier) = pruned(tmp_path / "killed"), pruned(tmp_path / "whole")
    assert made.key == expected.key
    assert damaged_files(made) == []
    assert without_seconds(found) == without_seconds(frontier)
    written, wanted = dict(made.manifest.files), dict(expected.manifest.files)
    assert written.pop("frontier.json")
    assert wanted.pop("frontier.json")
    assert written == wanted
    assert made.manifest.details == expected.manifest.details
    assert not (tmp_path / "killed" / "work").exists()
