"""How much each layer, FFN channel, head and hidden channel matters, from one pass over calibration text.

Layers: block influence, 1 - cosine(layer in, layer out), mean over tokens (ShortGPT, arXiv 2403.03853, section 3).
Channels: Minitron's activation magnitudes (arXiv 2407.14679, section 2.2): mean |activation| over a sequence, then
the L2 norm over sequences. FFN channels are read where down_proj takes them, heads where o_proj takes them (L2 over
the channels of a head, and over the heads of a group for a KV group), hidden channels at the outputs of the norms,
summed over norms.

ModelOpt's `L2NormHook` does that accumulation and is reused; it wants Megatron's [seq, batch, channels], hence the
transposes. Its other hooks are not: `LayerNormContributionHook` and `IndependentChannelContributionHook` add up means
of batches, so a short last batch would count too much and no L2 is taken; `IndependentKvHeadContributionHook`
materialises (batch, tokens, heads, hidden); `IterativeChannelContributionHook` needs a pass for each step of its
schedule. Block influence exists there for Megatron layers only.

Multiplying by the norms of the output weights, as `IndependentChannelContributionHook` does, was tried and is left out
for want of a clear gain. SmolLM2-135M-Instruct (dequantized), perplexity without and with, nothing retrained: FFN
1536 -> 1152, 35.3 and 37.3; 3 -> 2 KV groups, 46.1 and 62.5; 3 -> 2 heads in each group, 170 and 99 (4,096 tokens of
mixed text, dense 21.8).

Hidden cuts also need what each norm's input is made of: each channel's mean share of the sum of squares (see
surgery.py).

    # B batch, T tokens, D hidden, N windows
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from modelopt.torch.prune.importance_hooks import L2NormHook
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillroom.errors import InputError
from stillroom.models.shape import ModelShape

Wanted = Literal["layers", "ffn", "heads", "hidden"]


@dataclass(frozen=True)
class Importance:
    """Scores on the CPU; higher matters more. What was not asked for is None."""

    num_windows: int
    num_tokens: int
    block_influence: Tensor | None = None
    """(layers,), 0 to 2."""
    ffn: Tensor | None = None
    """(layers, FFN channels)."""
    heads: Tensor | None = None
    """(layers, query heads)."""
    kv_groups: Tensor | None = None
    """(layers, KV groups)."""
    hidden: Tensor | None = None
    """(hidden,)."""
    norm_shares: dict[str, Tensor] = field(default_factory=dict)
    """By hidden norm: each channel's mean share of the sum of squares of the norm's input, (hidden,)."""


class _BlockInfluence:
    """Mean over tokens of 1 - cosine(input, output) of one layer."""

    def __init__(self) -> None:
        self.total, self.num_tokens = 0.0, 0

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        before_BTD = args[0] if args else kwargs["hidden_states"]
        after_BTD = output[0] if isinstance(output, tuple) else output
        cosine_BT = torch.cosine_similarity(before_BTD.float(), after_BTD.float(), dim=-1)
        self.total += (1 - cosine_BT.double()).sum().item()
        self.num_tokens += cosine_BT.numel()

    def result(self) -> Tensor:
        return torch.tensor(self.total / self.num_tokens, dtype=torch.float64)


class _InputMagnitude:
    """Minitron's score of each channel of a module's input."""

    def __init__(self) -> None:
        self.hook = L2NormHook()

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.hook(module, (args[0].transpose(0, 1),), output)

    def result(self) -> Tensor:
        scores: Tensor = self.hook.accumulate()
        return scores.double().cpu()


class _OutputMagnitude(_InputMagnitude):
    """The same of a module's output."""

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        self.hook(module, (output.transpose(0, 1),), output)


class _InputShare:
    """Mean over tokens of each channel's share of the sum of squares of a module's input; zero tokens have none."""

    def __init__(self) -> None:
        self.total: Tensor | None = None
        self.num_tokens = 0

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        squares_ND = args[0].detach().float().flatten(0, -2).square()
        shares_ND = squares_ND / squares_ND.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
        batch = shares_ND.sum(0, dtype=torch.float64)
        self.total = batch if self.total is None else self.total + batch
        self.num_tokens += len(shares_ND)

    def result(self) -> Tensor:
        assert self.total is not None
        return (self.total / self.num_tokens).cpu()


def measure(
    model: PreTrainedModel,
    shape: ModelShape,
    windows: Tensor,
    *,
    batch_size: int,
    wanted: frozenset[Wanted],
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Importance:
    """Scores of everything in `wanted` from one pass over `windows` (N, T) of token ids; `progress` gets windows done.

    Raises InputError, after the first batch already, naming the first module whose activations are NaN or infinite.
    """
    observers = _observers(shape, wanted)
    with torch.inference_mode(), _observed(model, observers):
        for start in range(0, len(windows), batch_size):
            batch_BT = windows[start : start + batch_size].to(model.device)
            model.base_model(input_ids=batch_BT, use_cache=False)  # without the head: no (B, T, vocabulary) of logits
            if start == 0:
                _check_finite(observers)
            progress(min(start + batch_size, len(windows)), len(windows))
    _check_finite(observers)
    return _collect(observers, shape, windows)


Observer = _BlockInfluence | _InputMagnitude | _InputShare
Observers = dict[tuple[str, str], Observer]
"""By what is observed and the module's name, in about the order of the forward pass."""


def _observers(shape: ModelShape, wanted: frozenset[Wanted]) -> Observers:
    family = shape.family
    found: Observers = {}
    for layer in range(shape.num_layers):
        if "hidden" in wanted:
            found |= _norm_observers(n.format(layer=layer) for n in family.hidden_norms if "{layer}" in n)
        if "heads" in wanted:
            found["heads", family.attention_output.format(layer=layer)] = _InputMagnitude()
        if "ffn" in wanted:
            found["ffn", family.ffn_output.format(layer=layer)] = _InputMagnitude()
        if "layers" in wanted:
            found["layers", f"{family.layers}.{layer}"] = _BlockInfluence()
    if "hidden" in wanted:
        found |= _norm_observers(n for n in family.hidden_norms if "{layer}" not in n)
    return found


def _norm_observers(modules: Iterable[str]) -> Observers:
    found: Observers = {}
    for module in modules:
        found["shares", module] = _InputShare()
        found["hidden", module] = _OutputMagnitude()
    return found


@contextmanager
def _observed(model: PreTrainedModel, observers: Observers) -> Iterator[None]:
    with ExitStack() as stack:
        for (_, name), observer in observers.items():
            with_kwargs = isinstance(observer, _BlockInfluence)
            handle = model.get_submodule(name).register_forward_hook(observer, with_kwargs=with_kwargs)
            stack.callback(handle.remove)
        yield


def _check_finite(observers: Observers) -> None:
    for (_, module), observer in observers.items():
        if not observer.result().isfinite().all():
            raise InputError(
                f"activations at {module} are NaN or infinite on the calibration text: the weights are damaged, "
                "or the activations overflow float16 (then use dtype: bfloat16)"
            )


def _collect(observers: Observers, shape: ModelShape, windows: Tensor) -> Importance:
    results: dict[str, list[Tensor]] = {}
    for (what, _), observer in observers.items():
        results.setdefault(what, []).append(observer.result())
    stacked = {what: torch.stack(tensors) for what, tensors in results.items()}
    heads = groups = None
    if "heads" in stacked:
        heads = stacked["heads"].reshape(shape.num_layers, shape.num_attention_heads, shape.head_dim).norm(dim=-1)
        groups = heads.reshape(shape.num_layers, shape.num_key_value_heads, -1).norm(dim=-1)
    return Importance(
        num_windows=len(windows),
        num_tokens=windows.numel(),
        block_influence=stacked.get("layers"),
        ffn=stacked.get("ffn"),
        heads=heads,
        kv_groups=groups,
        hidden=stacked["hidden"].sum(0) if "hidden" in stacked else None,
        norm_shares={module: o.result() for (what, module), o in observers.items() if what == "shares"},
    )
