"""A model that is brought from disk layer by layer scores as it does in memory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor

from stillroom.errors import InputError
from stillroom.models.load import load_model
from stillroom.models.shape import read_config, shape_of
from stillroom.prune.importance.from_disk import measure_from_disk
from stillroom.prune.importance.measure import measure
from stillroom.prune.importance.names import DepthMethod, Wanted, WidthMethod
from tiny import tiny_checkpoint

DEPTH: tuple[DepthMethod, ...] = ("block_influence", "angular", "magnitude", "random", "reversed")


def same(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
@pytest.mark.parametrize("width", ["contribution", "magnitude", "reversed"])
def test_scores_equal_those_of_the_model_in_memory(family: str, width: WidthMethod, tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense", family)
    shape = shape_of(read_config(dense), "dense")
    inside: frozenset[Wanted] = frozenset({"experts", "expert_ffn"} if shape.num_experts else {"ffn"})
    wanted = inside | frozenset[Wanted]({"layers", "heads", "hidden"})
    ids = torch.randint(3, 384, (5, 12), generator=torch.Generator().manual_seed(7))
    whole = measure(load_model(dense), shape, ids, batch_size=2, wanted=wanted, width=width, depth=DEPTH)
    parts = measure_from_disk(
        dense, shape, ids, batch_size=2, wanted=wanted, width=width, depth=DEPTH, scratch_dir=tmp_path
    )
    same(parts.tables(), whole.tables())
    same({str(m): t for m, t in parts.layers.items()}, {str(m): t for m, t in whole.layers.items()})
    same(parts.norm_shares, whole.norm_shares)
    assert (parts.num_windows, parts.num_tokens) == (whole.num_windows, whole.num_tokens)


def test_taylor_is_refused_and_weights_alone_need_no_layers(tmp_path: Path) -> None:
    dense = tiny_checkpoint(tmp_path / "dense")
    shape = shape_of(read_config(dense), "dense")
    ids = torch.zeros(1, 8, dtype=torch.long)
    with pytest.raises(InputError, match="taylor needs all of it"):
        measure_from_disk(
            dense, shape, ids, batch_size=1, wanted=frozenset({"layers"}), depth=("taylor",), scratch_dir=tmp_path
        )
    told: list[int] = []
    scores = measure_from_disk(
        dense,
        shape,
        ids,
        batch_size=1,
        wanted=frozenset({"layers", "ffn"}),
        width="magnitude",
        depth=("magnitude",),
        scratch_dir=tmp_path,
        progress=lambda done, total: told.append(done),
    )
    assert scores.ffn is not None
    assert told == []
