"""Which modules a scheme takes, and what it refuses, from a config alone."""

from __future__ import annotations

from typing import Any

import pytest

from stillroom.errors import InputError
from stillroom.models.shape import ModelShape, shape_of
from stillroom.quantize.scheme import linear_modules, matches, select_modules
from stillroom.recipe import Quantize
from tiny import FAMILIES, tiny_config


def shape(family: str = "llama", **overrides: Any) -> ModelShape:
    return shape_of(tiny_config(family, **overrides).to_dict(), "the model")


def int8(**fields: Any) -> Quantize:
    return Quantize(scheme="int8", **fields)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_matrix_of_the_layers_is_quantized_and_the_head_is_not(family: str) -> None:
    selection = select_modules(shape(family), int8(), "m")
    assert len(selection.quantized) == 4 * 7
    assert all(name.endswith("_proj") for name in selection.quantized)
    assert selection.ignored == ("lm_head",)


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("model.layers.1.*", 7),
        ("model.layers.1", 7),
        ("*.self_attn", 12 * 4),
        ("*.down_proj", 12),
        ("model.layers.[01].mlp.*", 6),
        ("model.layers.3.mlp.down_proj", 1),
    ],
)
def test_ignore_takes_names_holders_and_wildcards(pattern: str, expected: int) -> None:
    selection = select_modules(shape(num_hidden_layers=12), int8(ignore=("lm_head", pattern)), "m")
    assert len(selection.ignored) == expected + 1
    assert len(selection.quantized) + len(selection.ignored) == len(linear_modules(shape(num_hidden_layers=12)))


def test_a_layer_is_not_taken_for_those_whose_number_starts_alike() -> None:
    assert matches("model.layers.1.mlp.up_proj", "model.layers.1")
    assert not matches("model.layers.11.mlp.up_proj", "model.layers.1")


def test_an_ignore_pattern_that_matches_nothing_is_refused_with_examples() -> None:
    with pytest.raises(
        InputError, match=r"'model.layer.0.\*' matches no linear module; .*model.layers.0.self_attn.q_proj"
    ):
        select_modules(shape(), int8(ignore=("lm_head", "model.layer.0.*")), "m")


def test_a_quantized_head_is_refused() -> None:
    with pytest.raises(InputError, match="add lm_head to `ignore`"):
        select_modules(shape(), int8(ignore=()), "m")


def test_a_part_of_what_engines_fuse_is_refused() -> None:
    with pytest.raises(InputError, match=r"leaves out .*k_proj, but engines load .*q_proj.* as one matrix"):
        select_modules(shape(), int8(ignore=("lm_head", "*.k_proj")), "m")
    with pytest.raises(InputError, match="one matrix"):
        select_modules(shape(), int8(ignore=("lm_head", "model.layers.2.mlp.gate_proj")), "m")


def test_ignoring_everything_is_refused() -> None:
    with pytest.raises(InputError, match="use scheme none"):
        select_modules(shape(), int8(ignore=("*",)), "m")


def test_fp8_wants_multiples_of_16_and_int8_does_not() -> None:
    odd = shape(intermediate_size=120)
    with pytest.raises(InputError, match=r"gate_proj is 120 x 64.*multiples of 16"):
        select_modules(odd, Quantize(scheme="fp8"), "m")
    assert select_modules(odd, Quantize(scheme="fp8", ignore=("lm_head", "*.mlp")), "m").quantized
    assert select_modules(odd, int8(), "m").quantized
