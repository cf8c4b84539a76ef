from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stillroom.errors import InputError
from stillroom.models.shape import shape_of
from stillroom.prune.correction import Correction, MeasuredPoint, MeasuredTable, fit_points, fit_table, load_table
from stillroom.prune.cost import Hardware, Load, decode_ms
from stillroom.prune.measure_cpu import kept_cpu

CPU = Hardware(memory_gb=24, bandwidth_gb_s=35, tflops={"bf16": 0.45, "int8": 0.9})
CONFIG = {"model_type": "llama", "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
          "hidden_size": 576, "intermediate_size": 1536, "vocab_size": 49152, "tie_word_embeddings": True}  # fmt: skip
DENSE = shape_of(CONFIG, "SmolLM2-135M")
SIZES = [(30, 1536), (24, 1536), (20, 1536), (30, 1024), (24, 1152), (30, 768)]


def point(
    layers: int, ffn: int, *, scale: float, layer_ms: float, fixed_ms: float, batch: int = 1, noise: float = 1.0
) -> MeasuredPoint:
    """A shape whose step costs exactly what the formula says, times `noise`."""
    config = CONFIG | {"num_hidden_layers": layers, "intermediate_size": ffn}
    roofline = decode_ms(shape_of(config, "x"), Load(batch, 96), CPU)
    step_ms = noise * (scale * roofline + layer_ms * layers + fixed_ms)
    return MeasuredPoint(label=f"{layers}x{ffn}", config=config, batch=batch, context=96, step_ms=step_ms)


overheads = st.tuples(st.floats(0.5, 3), st.floats(0, 1), st.floats(0, 20))


@given(overheads)
def test_what_the_engine_adds_is_found_again(true: tuple[float, float, float]) -> None:
    scale, layer_ms, fixed_ms = true
    points = [point(n, f, scale=scale, layer_ms=layer_ms, fixed_ms=fixed_ms) for n, f in SIZES]
    (fit,) = fit_points(points, CPU).fits
    for given_point in points:
        predicted = fit.step_ms(decode_ms(given_point.shape, given_point.load, CPU), given_point.shape.num_layers)
        assert predicted == pytest.approx(given_point.step_ms, rel=1e-6)


@given(overheads, st.lists(st.floats(0.8, 1.25), min_size=len(SIZES), max_size=len(SIZES)))
def test_noise_never_makes_a_larger_shape_faster(true: tuple[float, float, float], noise: list[float]) -> None:
    scale, layer_ms, fixed_ms = true
    points = [
        point(n, f, scale=scale, layer_ms=layer_ms, fixed_ms=fixed_ms, noise=x)
        for (n, f), x in zip(SIZES, noise, strict=True)
    ]
    correction = fit_points(points, CPU)
    (fit,) = correction.fits
    assert min(fit.scale, fit.layer_ms, fit.fixed_ms) >= 0
    smaller = dataclasses.replace(DENSE, num_layers=20, intermediate_size=1024)
    assert correction.decode_ms(smaller, Load(1, 96), CPU) <= correction.decode_ms(DENSE, Load(1, 96), CPU)


def test_one_measured_shape_scales_the_roofline() -> None:
    correction = fit_points([point(30, 1536, scale=1.7, layer_ms=0, fixed_ms=0)], CPU)
    other = dataclasses.replace(DENSE, num_layers=12)
    assert correction.decode_ms(other, Load(1, 96), CPU) == pytest.approx(1.7 * decode_ms(other, Load(1, 96), CPU))


def test_between_measured_batches_the_correction_is_between_and_beyond_them_the_nearest() -> None:
    points = [point(n, f, scale=s, layer_ms=0, fixed_ms=0, batch=b) for n, f in SIZES for b, s in ((2, 1.0), (8, 4.0))]
    correction = fit_points(points, CPU)
    for batch, scale in ((1, 1.0), (2, 1.0), (4, 2.0), (8, 4.0), (64, 4.0)):
        load = Load(batch, 96)
        assert correction.decode_ms(DENSE, load, CPU) == pytest.approx(scale * decode_ms(DENSE, load, CPU))


def test_a_corrected_cost_changes_the_speeds_alone() -> None:
    load = Load(1, 96)
    plain = Correction().costs(DENSE, load, CPU)
    corrected = fit_points([point(30, 1536, scale=2, layer_ms=0, fixed_ms=0)], CPU).costs(DENSE, load, CPU)
    assert plain.latency_ms is not None
    assert plain.throughput is not None
    assert corrected.latency_ms == pytest.approx(2 * plain.latency_ms)
    assert corrected.throughput == pytest.approx(plain.throughput / 2)
    assert (corrected.params, corrected.memory_gb) == (plain.params, plain.memory_gb)
    assert Correction().costs(DENSE, load, None).latency_ms is None


def test_a_table_is_read_back_and_refused_for_what_it_does_not_hold(tmp_path: Path) -> None:
    points = tuple(point(n, f, scale=1, layer_ms=0, fixed_ms=1) for n, f in SIZES)
    table = MeasuredTable(hardware="cpu", engine="vllm 0.32", figures=CPU, points=points)
    path = tmp_path / "table.json"
    path.write_text(table.model_dump_json(), encoding="utf-8")
    assert load_table(path) == table
    with pytest.raises(InputError, match="the table is of cpu, and the target's hardware is H200"):
        fit_table(table, Load(), "H200", CPU)
    with pytest.raises(InputError, match=r"no point of scheme int8.*the table has none, kv_cache none, 1 GPUs"):
        fit_table(table, Load(scheme="int8"), "cpu", CPU)


@pytest.mark.parametrize(
    ("content", "words"), [("{", "is not JSON"), (json.dumps({"hardware": "cpu"}), "is no table of speeds")]
)
def test_what_is_no_table_is_refused(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "table.json"
    with pytest.raises(InputError, match="is no file"):
        load_table(path)
    path.write_text(content, encoding="utf-8")
    with pytest.raises(InputError, match=words):
        load_table(path)


def test_the_cpu_is_measured_once_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "home" / "cpu.json"
    measured = kept_cpu(path)
    assert measured.bandwidth_gb_s > 0.5
    assert set(measured.tflops) == {"bf16", "int8"}
    assert kept_cpu(path) == measured
