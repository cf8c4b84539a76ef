"""How far a model is from the one it came from: KL divergence and top-1 agreement on text, and what both write.

KL(reference || this) is in nats per token, over all positions of the windows; zero means that the same distributions
come out, which perplexity cannot say: it looks at one token's probability only and errors cancel. Windows are the
samples of the standard error, as for perplexity.

The two models are never in memory together: the reference's logits wait on disk, in the dtype that it computed them in,
2 bytes x vocabulary for each token (0.4 GB for 4,096 tokens of a 49k vocabulary in bfloat16).

    B prompts   T tokens   V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from stillroom.quality.perplexity import WindowLosses

NEW_TOKENS = 48
"""A loop shows within these."""

LONGEST_LOOP = 8
"""Tokens in a cycle that counts as degenerate."""

MIN_JUDGED = 16
"""A text that ended before is short, not degenerate."""


@dataclass(frozen=True)
class Drift:
    """Distance between two models on the same windows."""

    kl: WindowLosses
    """Nats, summed over each window."""
    top1: WindowLosses
    """Positions at which both put the same token first, counted in each window."""


@torch.inference_mode()
def save_logits(
    model: PreTrainedModel, windows: Sequence[Tensor], folder: Path, on_window: Callable[[int], None]
) -> None:
    """Write the logits (T, V) of each window (T,) to `folder`."""
    for i, ids_T in enumerate(windows):
        save_file({"logits": _logits(model, ids_T).cpu().contiguous()}, _logits_path(folder, i))
        on_window(i + 1)


@torch.inference_mode()
def measure_drift(
    model: PreTrainedModel, windows: Sequence[Tensor], folder: Path, on_window: Callable[[int], None]
) -> Drift:
    """Compare with the logits that `save_logits` wrote for the same windows; each file is removed when it was read."""
    kl_W, same_W = [], []
    for i, ids_T in enumerate(windows):
        path = _logits_path(folder, i)
        reference_TV = load_file(path)["logits"].to(model.device)
        path.unlink()
        kl, same = compare_logits(reference_TV, _logits(model, ids_T))
        kl_W.append(kl)
        same_W.append(float(same))
        on_window(i + 1)
    tokens_W = tuple(len(ids_T) for ids_T in windows)
    return Drift(WindowLosses(tuple(kl_W), tokens_W), WindowLosses(tuple(same_W), tokens_W))


def compare_logits(reference_TV: Tensor, logits_TV: Tensor) -> tuple[float, int]:
    """Summed KL(reference || this) in nats, and the positions with the same first token, in float32."""
    p_TV = reference_TV.float().log_softmax(dim=-1)
    q_TV = logits_TV.float().log_softmax(dim=-1)
    kl_T = (p_TV.exp() * (p_TV - q_TV)).sum(dim=-1)
    same_T = reference_TV.argmax(dim=-1) == logits_TV.argmax(dim=-1)
    return float(kl_T.double().sum()), int(same_T.sum())


@torch.inference_mode()
def greedy(model: PreTrainedModel, prompts_BT: Tensor, num_tokens: int = NEW_TOKENS) -> Tensor:
    """The most likely continuation of each prompt, (B, num_tokens), an end token not stopping it."""
    output = model(prompts_BT.to(model.device), use_cache=True, logits_to_keep=1)
    written = []
    for _ in range(num_tokens):
        next_B1 = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        written.append(next_B1)
        if len(written) < num_tokens:
            output = model(next_B1, past_key_values=output.past_key_values, use_cache=True)
    return torch.cat(written, dim=1).cpu()


def until_end(tokens: Sequence[int], end_tokens: Iterable[int]) -> list[int]:
    """The tokens before the first end token."""
    ends = set(end_tokens)
    for i, token in enumerate(tokens):
        if token in ends:
            return list(tokens[:i])
    return list(tokens)


def is_degenerate(tokens: Sequence[int]) -> bool:
    """Whether the second half of a text does nothing but repeat a cycle of at most LONGEST_LOOP tokens."""
    if len(tokens) < MIN_JUDGED:
        return False
    tail = list(tokens[len(tokens) // 2 :])
    return any(tail[period:] == tail[:-period] for period in range(1, min(LONGEST_LOOP, len(tail) // 2) + 1))


def _logits(model: PreTrainedModel, ids_T: Tensor) -> Tensor:
    logits: Tensor = model(ids_T[None].to(model.device), use_cache=False).logits[0]
    return logits


def _logits_path(folder: Path, window: int) -> Path:
    return folder / f"reference-logits-{window}.safetensors"
