"""SmoothQuant: move activation outliers into the weights before INT8 (Xiao et al., arXiv 2211.10438, section 4).

A linear y = W x equals (W diag(s)) (x / s). With s_j = max|x_j|^a / max|W_j|^(1-a) (equation 4) the activations lose
their outlier channels, which one scale per token would otherwise drown the rest with. The division is folded into
whatever makes x, so that the exported model has no extra operation:

    q, k, v        into the norm before them, one s for all three
    gate, up       into the norm before them, one s for both
    o              into v's rows; within a KV group all heads read the same v, so s is shared by the group's heads
    down           into up's rows: down(act(gate) * up) is linear in up

s is rounded to a power of two. Multiplying a float by one changes its exponent only, so the folded model computes the
same bits as before it is quantized, in bfloat16 too, and what verification measures is quantization alone; rounding
costs at most a factor sqrt(2) of smoothing.

Gemma's norms scale by 1 + weight and store the weight, and (1 + weight) / 64 - 1 in bfloat16 is off by up to 12%. So
what its norms feed is left as it is, and only o and down are smoothed.

ModelOpt has the same method, but one s for each linear, averaged over q, k, v when exporting, and fused for Llama and
Qwen3 names only, so the maxima come from its calibration and the folding is ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from stillroom.models.shape import ModelShape
from stillroom.quantize.folds import folds

ALPHA = 0.5
"""How much of the difficulty moves: 0 none, 1 all. The paper's default."""

SMALLEST = 1e-5
"""Maxima below this are taken for it: a channel that never fires keeps a finite scale."""

LARGEST_EXPONENT = 10
"""Scales stay within 2^-10 and 2^10, so that float16 weights neither overflow nor vanish."""

# D hidden channels, H query heads, G KV groups, K head_dim, F FFN channels


@torch.no_grad()
def smooth(model: nn.Module, shape: ModelShape, quantized: Sequence[str], input_amax: Mapping[str, Tensor]) -> int:
    """Fold smoothing scales into the model in place and return how many linears were smoothed.

    `input_amax` holds max|x| over the calibration text for each input channel, by module, shape (in,). A linear whose
    input is made for modules that are not quantized as well is left alone: they would see the scaled input too.
    """
    found = folds(shape, quantized)
    for fold in found:
        if fold.kind == "norm":
            _into_norm(model, fold.maker, fold.readers, input_amax)
        elif fold.kind == "values":
            _into_values(model, fold.maker, fold.readers[0], input_amax, shape)
        else:
            _into_rows(model, fold.maker, fold.readers[0], input_amax)
    return sum(len(fold.readers) for fold in found)


def smoothing_scales(input_amax: Tensor, weight_amax: Tensor, alpha: float = ALPHA) -> Tensor:
    """Equation 4 for each input channel, rounded to a power of two; both maxima and the result have shape (in,)."""
    exact = input_amax.float().clamp(min=SMALLEST) ** alpha / weight_amax.float().clamp(min=SMALLEST) ** (1 - alpha)
    return torch.exp2(exact.log2().round().clamp(-LARGEST_EXPONENT, LARGEST_EXPONENT))


def _weight(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight
    assert isinstance(weight, Tensor)
    return weight


def _column_amax(model: nn.Module, names: Sequence[str]) -> Tensor:
    """max|W_j| over the rows of all the named weights, shape (in,)."""
    return torch.stack([_weight(model, name).abs().amax(dim=0) for name in names]).amax(dim=0)


def _into_norm(model: nn.Module, norm: str, readers: Sequence[str], input_amax: Mapping[str, Tensor]) -> None:
    scales_D = smoothing_scales(input_amax[readers[0]], _column_amax(model, readers))
    for reader in readers:
        _scale_columns(model, reader, scales_D)
    _divide_rows(model, norm, scales_D)


def _into_values(
    model: nn.Module, values: str, output: str, input_amax: Mapping[str, Tensor], shape: ModelShape
) -> None:
    groups, head_dim = shape.num_key_value_heads, shape.head_dim

    def over_heads(amax_HK: Tensor) -> Tensor:
        return amax_HK.view(groups, -1, head_dim).amax(dim=1).flatten()

    scales_GK = smoothing_scales(over_heads(input_amax[output]), over_heads(_column_amax(model, [output])))
    scales_HK = (
        scales_GK.view(groups, 1, head_dim).expand(groups, shape.num_attention_heads // groups, head_dim).flatten()
    )
    _scale_columns(model, output, scales_HK)
    _divide_rows(model, values, scales_GK)


def _into_rows(model: nn.Module, before: str, after: str, input_amax: Mapping[str, Tensor]) -> None:
    scales_F = smoothing_scales(input_amax[after], _column_amax(model, [after]))
    _scale_columns(model, after, scales_F)
    _divide_rows(model, before, scales_F)


def _scale_columns(model: nn.Module, name: str, scales: Tensor) -> None:
    weight = _weight(model, name)
    weight.mul_(scales.to(weight.dtype))


def _divide_rows(model: nn.Module, name: str, scales: Tensor) -> None:
    """Divide what a linear or a norm puts out: rows of the weight, and the bias where there is one."""
    weight, bias = _weight(model, name), getattr(model.get_submodule(name), "bias", None)
    scales_rows = scales.to(weight.dtype)
    weight.div_(scales_rows[:, None] if weight.ndim == 2 else scales_rows)
    if isinstance(bias, Tensor):
        bias.div_(scales.to(bias.dtype))
