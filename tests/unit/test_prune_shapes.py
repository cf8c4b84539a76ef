from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from stillroom.errors import InputError
from stillroom.models.family import families
from stillroom.models.shape import ModelShape, shape_of
from stillroom.prune.correction import MeasuredPoint, MeasuredTable
from stillroom.prune.cost import Hardware, known_hardware
from stillroom.prune.shapes import Candidate, candidates, cut_axes, cut_of, price_target, sizes_of
from stillroom.prune.targets import check_sizes
from stillroom.recipe import Target

SMOL = shape_of(
    {"model_type": "llama", "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
     "hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True}, "SmolLM2-135M"
)  # fmt: skip
QWEN = shape_of(
    {"model_type": "qwen3", "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8,
     "head_dim": 128, "hidden_size": 4096, "intermediate_size": 12288, "vocab_size": 151936}, "Qwen3-8B"
)  # fmt: skip
TINY = shape_of(
    {"model_type": "qwen3", "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
     "head_dim": 16, "hidden_size": 64, "intermediate_size": 128, "vocab_size": 384}, "tiny"
)  # fmt: skip
MOE = shape_of(
    {"model_type": "qwen3_moe", "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
     "head_dim": 64, "hidden_size": 1024, "num_experts": 64, "num_experts_per_tok": 8, "moe_intermediate_size": 512,
     "vocab_size": 32000}, "MoE"
)  # fmt: skip


def find(dense: ModelShape, **target: Any) -> list[Candidate]:
    given_target = Target(**target)
    hardware = None if given_target.hardware is None else known_hardware()[given_target.hardware]
    return candidates(dense, price_target(given_target, dense, hardware))


@settings(max_examples=25, deadline=None)
@given(st.sampled_from([SMOL, TINY, MOE]), st.floats(0.55, 0.97), st.integers(2, 16))
def test_every_candidate_fits_is_allowed_and_is_close_to_the_budget(
    dense: ModelShape, share: float, count: int
) -> None:
    budget = int(share * dense.num_params)
    try:
        found = find(dense, params=budget, candidates=count, rerank=0)
    except InputError:
        if dense is TINY:  # its sizes are few, and some budgets lie below all of them
            return
        raise
    assert 1 <= len(found) <= count
    assert len({tuple(sizes_of(c.shape).values()) for c in found}) == len(found)
    for candidate in found:
        shape = candidate.shape
        assert shape.num_params == candidate.costs.params <= budget
        check_sizes(dense, shape)
        assert all(size >= 0.5 * getattr(dense, axis) for axis, size in sizes_of(shape).items())
        assert all(w % 16 == 0 for w in (shape.hidden_size, shape.intermediate_size, shape.moe_intermediate_size))
        assert candidate.cut == cut_of(dense, shape)
        larger = dataclasses.replace(shape, num_layers=shape.num_layers + 1)
        assert larger.num_layers > dense.num_layers or larger.num_params > budget
    assert found == find(dense, params=budget, candidates=count, rerank=0)


@settings(max_examples=15, deadline=None)
@given(st.floats(0.6, 0.97))
def test_the_edge_is_what_a_slow_search_over_all_shapes_finds(share: float) -> None:
    """Every allowed tiny shape, one by one: maximal among those that fit."""
    budget = int(share * TINY.num_params)
    everything = [
        dataclasses.replace(TINY, num_layers=n, hidden_size=h, intermediate_size=f, num_attention_heads=a,
                            num_key_value_heads=g)
        for n, h, f in itertools.product((2, 3, 4), (32, 48, 64), (64, 80, 96, 112, 128))
        for a, g in ((4, 2), (2, 2), (2, 1))
    ]  # fmt: skip
    fitting = [s for s in everything if s.num_params <= budget]
    maximal = {
        tuple(sizes_of(s).values())
        for s in fitting
        if not any(s is not t and all(b <= c for b, c in zip(sizes_of(s).values(), sizes_of(t).values(), strict=True))
                   for t in fitting)
    }  # fmt: skip
    found = {tuple(sizes_of(c.shape).values()) for c in find(TINY, params=budget, candidates=200)}
    assert found == maximal


def test_the_best_of_depth_alone_and_of_width_alone_lead() -> None:
    found = find(SMOL, params=int(0.75 * SMOL.num_params))
    assert [c.cut for c in found[:2]] == ["depth", "width"]
    assert found[0].shape.num_layers == 20  # 21 layers are above the budget
    assert cut_axes(SMOL, found[2].shape) == ("intermediate_size",)
    assert {c.cut for c in found[3:]} == {"both", "width"}


def test_widths_are_multiples_of_128_for_each_gpu_where_the_model_is_large_enough() -> None:
    for gpus in (1, 2, 4):
        for c in find(QWEN, params="6e9", tensor_parallel=gpus):
            assert c.shape.hidden_size % (128 * gpus) == c.shape.intermediate_size % (128 * gpus) == 0
            assert c.shape.num_key_value_heads % gpus == c.shape.num_attention_heads % gpus == 0
    assert {c.shape.intermediate_size % 512 for c in find(QWEN, params=6e9, multiple_of=512)} == {0}


def test_experts_are_an_axis_of_their_own() -> None:
    found = find(MOE, params=int(0.7 * MOE.num_params), candidates=40)
    assert {"num_experts", "moe_intermediate_size"} <= {axis for c in found for axis in cut_axes(MOE, c.shape)}
    assert min(c.shape.num_experts for c in found) >= 32
    assert "intermediate_size" not in sizes_of(MOE)


@pytest.mark.parametrize("family", sorted(families()))
def test_every_family_can_be_searched(family: str) -> None:
    from tiny import tiny_config

    dense = shape_of(tiny_config(family).to_dict(), family)
    found = find(dense, params=int(0.75 * dense.num_params))
    assert found
    for candidate in found:
        check_sizes(dense, candidate.shape)
        assert 0.3 * dense.num_params < candidate.costs.params <= 0.75 * dense.num_params


def test_several_targets_hold_at_once() -> None:
    target: dict[str, Any] = {"params": 6.5e9, "latency_ms": 1.3, "memory_gb": 9.0, "throughput": 780}
    found = find(QWEN, **target, hardware="H200", scheme="fp8", context=8192)
    for c in found:
        assert c.costs.params <= 6.5e9
        assert (c.costs.latency_ms or 9) <= 1.3
        assert c.costs.memory_gb <= 9.0
        assert (c.costs.throughput or 0) >= 780


def test_what_cannot_be_reached_is_refused_with_the_nearest_that_can() -> None:
    with pytest.raises(InputError, match=r"params 1e\+06 \(nearest (\d+)\)") as refused:
        find(SMOL, params=1e6)
    nearest = int(str(refused.value).split("nearest ")[1].split(")")[0])
    assert [c.costs.params for c in find(SMOL, params=nearest)] == [nearest]
    with pytest.raises(InputError, match="cannot be reached"):
        find(SMOL, params=nearest - 1)


def test_of_several_targets_the_one_that_conflicts_is_named() -> None:
    with pytest.raises(InputError, match=r"latency_ms 0\.2 \(nearest .*\); params can be reached"):
        find(QWEN, params=6e9, latency_ms=0.2, hardware="H200", scheme="fp8")
    with pytest.raises(InputError, match=r"latency_ms 0\.2 \(nearest .*\), throughput 1e\+06 \(nearest \d+"):
        find(QWEN, throughput=1e6, latency_ms=0.2, hardware="H200", scheme="fp8")


def test_the_nearest_value_of_a_speed_can_be_reached() -> None:
    for name, wanted in (("latency_ms", 1e-3), ("throughput", 1e9), ("memory_gb", 0.01)):
        with pytest.raises(InputError) as refused:
            find(SMOL, **{name: wanted}, hardware="H200", scheme="fp8")
        nearest = float(str(refused.value).split("nearest ")[1].split(")")[0])
        assert find(SMOL, **{name: nearest}, hardware="H200", scheme="fp8")


def test_a_load_that_the_gpu_cannot_hold_is_refused() -> None:
    with pytest.raises(InputError, match="even with the smallest shape, and L40S has 48; lower batch or context"):
        find(QWEN, throughput=100, hardware="L40S", batch=512, context=32768)


def test_a_target_that_the_model_meets_is_refused() -> None:
    with pytest.raises(InputError, match=r"params 9e\+09 is already met by the model itself: params 8190735360"):
        find(QWEN, params=9e9)


def test_gpus_that_divide_no_heads_are_refused() -> None:
    with pytest.raises(InputError, match=r"tensor_parallel 7 divides no number of heads.*use one of \[1, 3, 9\]"):
        find(SMOL, params=1e8, tensor_parallel=7)


def test_a_machine_may_be_given_by_its_figures() -> None:
    cpu = Hardware(memory_gb=24, bandwidth_gb_s=35, tflops={"bf16": 0.45})
    target = Target(latency_ms=6, hardware="cpu", context=512)
    found = candidates(SMOL, price_target(target, SMOL, cpu))
    assert all((c.costs.latency_ms or 9) <= 6 for c in found)


def test_speeds_measured_on_the_engine_at_hand_correct_the_roofline(tmp_path: Path) -> None:
    quiet = Hardware(memory_gb=24, bandwidth_gb_s=35, tflops={"bf16": 0.45})
    busy = Hardware(memory_gb=24, bandwidth_gb_s=12, tflops={"bf16": 0.2})
    point = MeasuredPoint(label="dense", config=SMOL.config, batch=1, context=100, step_ms=16.0)
    table = MeasuredTable(hardware="cpu", engine="vllm", figures=quiet, points=(point,))
    (tmp_path / "table.json").write_text(table.model_dump_json(), encoding="utf-8")
    target = Target(latency_ms=12, hardware="cpu", context=100, measured=tmp_path / "table.json")
    pricing = price_target(target, SMOL, busy)
    assert pricing.hardware == quiet  # the table knows the machine's speed better than a measurement beside other work
    assert pricing.costs(SMOL).latency_ms == pytest.approx(16.0)
    assert all((c.costs.latency_ms or 99) <= 12 for c in candidates(SMOL, pricing))


def test_yaml_numbers_are_taken() -> None:
    assert Target(params="6e9").params == Target(params=6.0e9).params == 6_000_000_000


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "give at least one of params, memory_gb, latency_ms, throughput"),
        ({"latency_ms": 5}, "latency_ms needs `hardware`: one of H100"),
        ({"params": 1e9, "measured": "table.json"}, "corrects the speed of a `hardware`"),
        ({"params": 1e9, "rerank": 20}, "rerank 20 is more than the 12 candidates"),
        ({"params": 0}, "greater than or equal to 1"),
        ({"params": "six"}, "valid integer"),
        ({"throughput": 10, "hardware": "TPU"}, "'H100', 'H200'"),
    ],
)
def test_a_target_without_sense_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        Target.model_validate(fields)
