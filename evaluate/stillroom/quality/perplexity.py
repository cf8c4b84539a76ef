"""How well a model predicts a text: mean loss, perplexity, bits per byte, each with its standard error.

The text is cut into windows of `sequence_length` tokens that do not overlap, the last one as short as it comes; no
window sees the one before. A window's first token has no context and is not scored, as in the GPTQ and SparseGPT
papers' protocol, so numbers compare with theirs. A model whose tokenizer puts a token in front of every text (Gemma is
lost without its <bos>) gets that token in front of each window, and then every token of the text is scored.

Standard error: tokens of one window share a subject and an author, so their losses are correlated and the spread over
tokens would promise too much. Windows are the samples here: the loss is a ratio estimate sum(nll) / sum(tokens) over
windows, its variance W/(W-1) * sum((nll_w - loss * tokens_w)^2) / tokens^2 (Cochran, Sampling Techniques, section 6.4).
Perplexity is exp(loss), so by the delta method its error is perplexity * stderr(loss). With fewer than two windows
there is no spread to see, and the error is unknown. Two variants on the same text err together: their ratio is known
much better than either number.

Logits exist in float32 for a chunk of tokens at a time: windows go through the body of the model once, and the head is
applied chunk by chunk. Full float32 logits of a batch of 8 x 2048 tokens over 152k entries would take 10 GB.

    W windows   B windows in a batch   T tokens in a window   N tokens   D hidden   V vocabulary
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from stillroom.artifact import Measurement
from stillroom.errors import InputError

MIN_TOKENS = 8
"""Below this a perplexity says nothing about a model."""

CHUNK_ELEMENTS = 2**26
"""Float32 logits that exist at one time: 256 MiB."""


@dataclass(frozen=True)
class WindowLosses:
    """Summed loss and scored tokens of each window."""

    nll_W: tuple[float, ...]
    """Nats."""
    tokens_W: tuple[int, ...]

    @property
    def tokens(self) -> int:
        return sum(self.tokens_W)

    @property
    def loss(self) -> float:
        """Nats per token."""
        return math.fsum(self.nll_W) / self.tokens

    @property
    def stderr(self) -> float | None:
        """Of the loss, in nats per token, with windows as the samples; None with fewer than two."""
        count = len(self.nll_W)
        if count < 2:
            return None
        loss = self.loss
        squares = math.fsum((nll - loss * n) ** 2 for nll, n in zip(self.nll_W, self.tokens_W, strict=True))
        return math.sqrt(count / (count - 1) * squares) / self.tokens


def score_windows(
    model: PreTrainedModel,
    ids_N: torch.Tensor,
    *,
    sequence_length: int,
    batch_size: int,
    prefix: int | None = None,
    on_tokens: Callable[[int], None] = lambda done: None,
) -> WindowLosses:
    """The losses of a text `ids_N` (int64), window by window; `on_tokens` hears how many tokens are done.

    Raises InputError for a text shorter than MIN_TOKENS, for windows longer than the model's context, for a head that
    is not understood, and for a model whose loss is not a finite number.
    """
    if len(ids_N) < MIN_TOKENS:
        raise InputError(f"the text has {len(ids_N)} tokens; at least {MIN_TOKENS} are needed to measure a perplexity")
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and sequence_length > context:
        raise InputError(
            f"evaluate.sequence_length {sequence_length} exceeds the model's context of {context} tokens; "
            f"use at most {context}"
        )
    nll_W: list[float] = []
    tokens_W: list[int] = []
    with torch.inference_mode():
        _check_head(model, ids_N[:MIN_TOKENS].to(model.device)[None])
        for ids_BT in _batches(ids_N, sequence_length, batch_size, prefix):
            nll_B = _batch_nll(model, ids_BT.to(model.device))
            if not bool(nll_B.isfinite().all()):
                raise InputError(
                    "the model's loss is not a finite number (NaN or infinite logits): its weights are broken"
                )
            nll_W += nll_B.tolist()
            tokens_W += [ids_BT.shape[1] - 1] * len(nll_B)
            on_tokens(sum(tokens_W))
    return WindowLosses(tuple(nll_W), tuple(tokens_W))


def text_measurements(label: str, losses: WindowLosses, *, num_tokens: int, num_bytes: int) -> tuple[Measurement, ...]:
    """Perplexity, bits per byte and loss on the text called `label`, which has `num_tokens` in `num_bytes` of UTF-8.

    Bits per byte does not depend on the tokenizer, so it is what compares models that do not share one.
    """
    per_byte = num_tokens / num_bytes / math.log(2)
    loss, stderr = losses.loss, losses.stderr
    scaled = {
        "perplexity": (math.exp(loss), math.exp(loss), "ppl"),
        "bits_per_byte": (loss * per_byte, per_byte, "bits/byte"),
        "loss": (loss, 1.0, "nats/token"),
    }
    return tuple(
        Measurement(
            name=f"quality.{label}.{metric}",
            value=value,
            unit=unit,
            n=losses.tokens,
            stderr=None if stderr is None else slope * stderr,
            higher_is_better=False,
        )
        for metric, (value, slope, unit) in scaled.items()
    )


def _batches(ids_N: torch.Tensor, sequence_length: int, batch_size: int, prefix: int | None) -> Iterator[torch.Tensor]:
    """Windows in batches of (B, T), the last partial one by itself; one token without a prefix has nothing to score."""
    width = sequence_length if prefix is None else sequence_length - 1
    num_full = len(ids_N) // width
    full_WT = ids_N[: num_full * width].view(num_full, width)
    rest_1T = ids_N[num_full * width :][None]
    for ids_BT in (*torch.split(full_WT, batch_size), rest_1T):
        if prefix is not None:
            ids_BT = torch.nn.functional.pad(ids_BT, (1, 0), value=prefix)
        if ids_BT.numel() and ids_BT.shape[1] > 1:
            yield ids_BT


def _batch_nll(model: PreTrainedModel, ids_BT: torch.Tensor) -> torch.Tensor:
    """Loss of each window, summed over its tokens after the first, shape (B,), float64."""
    hidden_ND = _hidden(model, ids_BT)[:, :-1].flatten(0, 1)
    targets_N = ids_BT[:, 1:].flatten()
    chunk = max(1, CHUNK_ELEMENTS // model.config.vocab_size)
    nll_N = torch.cat(
        [
            torch.nn.functional.cross_entropy(_head(model, hidden).float(), targets, reduction="none")
            for hidden, targets in zip(torch.split(hidden_ND, chunk), torch.split(targets_N, chunk), strict=True)
        ]
    )
    return nll_N.double().view(ids_BT.shape[0], -1).sum(dim=1)


def _hidden(model: PreTrainedModel, ids_BT: torch.Tensor) -> torch.Tensor:
    """What the head reads, shape (B, T, D)."""
    hidden_BTD: torch.Tensor = model.base_model(input_ids=ids_BT, use_cache=False).last_hidden_state
    return hidden_BTD


def _head(model: PreTrainedModel, hidden_ND: torch.Tensor) -> torch.Tensor:
    """Logits (N, V) of hidden states, with the soft cap that Gemma may have."""
    logits_NV: torch.Tensor = model.get_output_embeddings()(hidden_ND)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits_NV if cap is None else cap * torch.tanh(logits_NV / cap)


def _check_head(model: PreTrainedModel, ids_1T: torch.Tensor) -> None:
    """Some families scale their logits outside the head; measured without that, they would silently look wrong."""
    expected = model(input_ids=ids_1T, use_cache=False).logits.float()
    applied = _head(model, _hidden(model, ids_1T)).float()
    if float((applied - expected).abs().max()) > 0.02 * float(expected.abs().max()):
        raise InputError(
            f"model family {model.config.model_type!r} changes its logits after the head in a way that is not known "
            "here; its perplexity cannot be measured"
        )
