"""Whatever sizes a prune stage is given: the checkpoint opens, has them, gives numbers, and repair never harms."""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from jobs import artifact_at, job_of
from stillroom.models.load import load_model
from stillroom.models.shape import read_config, shape_of
from stillroom.models.weights import check_weights
from stillroom.prune import stage
from stillroom.recipe import Calibration, Prune, Repair, SearchBudget
from tiny import tiny_checkpoint, tiny_text_file

SMALL: dict[str, Any] = {
    "calibration": Calibration(samples=6, sequence_length=24, batch_size=3),
    "search": SearchBudget(tokens=64, generations=1, offspring=2, finalists=2),
    "repair": Repair(tokens=96, heldout_tokens=64),
}

sizes = st.fixed_dictionaries(
    {"hidden_size": st.sampled_from([64, 62, 48, 34]), "intermediate_size": st.sampled_from([128, 126, 64, 2])},
    optional={"num_key_value_heads": st.integers(1, 2), "heads_in_group": st.integers(1, 2)},
)
layers = st.one_of(
    st.builds(lambda count: {"num_layers": count}, st.integers(1, 4)),
    st.builds(lambda some: {"drop_layers": tuple(some)}, st.lists(st.integers(0, 3), max_size=3, unique=True)),
)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def dense(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint beside its text."""
    folder = tmp_path_factory.mktemp(request.param)
    tiny_text_file(folder / "text.txt", 40)
    return tiny_checkpoint(folder / "dense", request.param)


@given(sizes=sizes, layers=layers)
@settings(max_examples=8, deadline=None, derandomize=True)
def test_any_sizes_give_a_whole_model_of_them_that_repair_does_not_harm(
    dense: Path, sizes: dict[str, Any], layers: dict[str, Any]
) -> None:
    wanted = dict(sizes)
    if "heads_in_group" in wanted:
        wanted["num_attention_heads"] = wanted.get("num_key_value_heads", 2) * wanted.pop("heads_in_group")
    with tempfile.TemporaryDirectory(prefix="stillroom-test-") as folder:
        config = Prune(**SMALL, **wanted, **layers)
        job = job_of(config, {"source": artifact_at(dense)}, dense.parent / "text.txt", Path(folder) / "job", seed=1)
        details = stage.run(job).details
        written = shape_of(read_config(job.out_dir), "out")
        check_weights(job.out_dir, written)
        expected = wanted | {"num_layers": layers.get("num_layers", 4 - len(layers.get("drop_layers", ())))}
        assert {size: getattr(written, size) for size in expected} == expected
        assert written.head_dim == 16
        assert sorted(details["kept_layers"] + details["dropped_layers"]) == [0, 1, 2, 3]
        with torch.inference_mode():
            assert load_model(job.out_dir)(torch.arange(3, 40)[None]).logits.isfinite().all()
        if details["kl"] is not None:
            assert math.isfinite(details["kl_cut"])
            assert details["kl"] <= details["kl_cut"]
