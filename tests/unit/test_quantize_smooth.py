"""SmoothQuant's folding changes no bit of an unquantized model, and moves outliers where it says."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from stillroom.models.shape import shape_of
from stillroom.quantize.scheme import select_modules
from stillroom.quantize.smooth import smooth, smoothing_scales
from stillroom.recipe import Quantize
from tiny import FAMILIES, tiny_model

IDS = torch.arange(3 * 40).view(3, 40) * 7 % 384


def seen_amax(model: nn.Module, names: tuple[str, ...]) -> dict[str, Tensor]:
    """max|x| of each input channel on IDS, by plain hooks."""
    seen: dict[str, Tensor] = {}

    def watch(name: str) -> RemovableHandle:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            seen[name] = arguments[0].detach().abs().flatten(0, -2).amax(dim=0).float()

        return model.get_submodule(name).register_forward_pre_hook(hook)

    handles = [watch(name) for name in names]
    model(IDS)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_folding_changes_no_bit_of_the_logits(family: str, dtype: torch.dtype) -> None:
    model = tiny_model(family, dtype=dtype)
    shape = shape_of(model.config.to_dict(), family)
    names = select_modules(shape, Quantize(scheme="int8"), family).quantized
    with torch.no_grad():
        before = model(IDS).logits
        amax = seen_amax(model, names)
        weights = {name: model.get_submodule(name).weight.clone() for name in names}
        smoothed = smooth(model, shape, names, amax)
        after = model(IDS).logits
    changed = [name for name in names if not torch.equal(weights[name], model.get_submodule(name).weight)]
    assert torch.equal(before, after)
    # Gemma's norms scale by 1 + weight, which bfloat16 cannot divide: v, o, up and down change, o and down are smooth
    assert (smoothed, len(changed)) == ((8, 16) if family == "gemma3_text" else (28, 28))


def test_biases_of_divided_rows_are_divided_too() -> None:
    model = tiny_model("llama", attention_bias=True, mlp_bias=True)
    shape = shape_of(model.config.to_dict(), "m")
    names = select_modules(shape, Quantize(scheme="int8"), "m").quantized
    with torch.no_grad():
        before = model(IDS).logits
        smooth(model, shape, names, seen_amax(model, names))
        assert torch.equal(before, model(IDS).logits)


def test_an_outlier_channel_is_drawn_toward_the_others() -> None:
    model = tiny_model("llama")
    shape = shape_of(model.config.to_dict(), "m")
    names = select_modules(shape, Quantize(scheme="int8"), "m").quantized
    norm = model.get_submodule("model.layers.1.post_attention_layernorm")
    with torch.no_grad():
        norm.weight[5] = 100.0
        amax = seen_amax(model, names)
        smooth(model, shape, names, amax)
        after = seen_amax(model, names)
    gate = "model.layers.1.mlp.gate_proj"
    assert amax[gate][5] / amax[gate].median() > 4 * after[gate][5] / after[gate].median()


def test_a_group_that_is_not_wholly_quantized_is_left_alone() -> None:
    model = tiny_model("llama")
    shape = shape_of(model.config.to_dict(), "m")
    names = select_modules(shape, Quantize(scheme="int8", ignore=("lm_head", "*.mlp")), "m").quantized
    with torch.no_grad():
        before, amax = model(IDS).logits, seen_amax(model, names)
        norm = model.get_submodule("model.layers.0.post_attention_layernorm").weight.clone()
        assert smooth(model, shape, names, amax) == 4 * 4
        assert torch.equal(before, model(IDS).logits)
    assert torch.equal(norm, model.get_submodule("model.layers.0.post_attention_layernorm").weight)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.floats(0, 1e4), min_size=1, max_size=8),
    st.floats(0, 100),
    st.floats(0, 1),
)
def test_scales_are_powers_of_two_within_sqrt_2_of_equation_4(inputs: list[float], weight: float, alpha: float) -> None:
    weights = torch.full((len(inputs),), weight)
    scales = smoothing_scales(torch.tensor(inputs), weights, alpha)
    mantissa, _ = torch.frexp(scales)
    assert bool((mantissa == 0.5).all())
    for x, scale in zip(inputs, scales.tolist(), strict=True):
        exact = max(x, 1e-5) ** alpha / max(weight, 1e-5) ** (1 - alpha)
        bounded = min(max(exact, 2**-10), 2**10)
        assert bounded / 1.4143 <= scale <= bounded * 1.4143
