"""How a model of each kind is run on windows of plain text, and what its loss there is.

A decoder reads the window. An encoder-decoder reads it with its encoder, and the same tokens, shifted by one, with its
decoder. A masked language model reads it unmasked while activations are observed; for a loss, a seeded 15 % of the
tokens are replaced by random ones, which it must name: BERT's corruption (arXiv 1810.04805, section 3.1) without the
mask token, whose id the config does not tell.

    # B batch, T tokens, V vocabulary
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillroom.models.family import Family

CORRUPTED_SHARE = 0.15


def run(model: PreTrainedModel, family: Family, modules: Iterable[str], batch_BT: Tensor) -> None:
    """A forward pass for the sake of the observed `modules`: without the head where none of them is in it.

    That spares the (B, T, V) logits.
    """
    inside = f"{model.base_model_prefix}."
    whole = model.base_model is model or any(not name.startswith(inside) for name in modules)
    (model if whole else model.base_model)(**_arguments(model, family, batch_BT))


def summed_loss(model: PreTrainedModel, family: Family, window_T: Tensor, seed: int) -> tuple[Tensor, int]:
    """Cross-entropy of one window, summed (a mean's small gradients would underflow in float16), and its tokens."""
    if family.task == "causal_lm":
        logits_TV = model(**_arguments(model, family, window_T[None])).logits[0, :-1]
        labels = window_T[1:]
    elif family.task == "seq2seq_lm":
        logits_TV, labels = model(**_arguments(model, family, window_T[None])).logits[0], window_T
    else:
        generator = torch.Generator().manual_seed(seed)
        corrupted = (torch.rand(len(window_T), generator=generator) < CORRUPTED_SHARE).to(window_T.device)
        corrupted[0] |= ~corrupted.any()
        noise = torch.randint(model.config.vocab_size, window_T.shape, generator=generator).to(window_T)
        given = torch.where(corrupted, noise, window_T)
        logits_TV = model(**_arguments(model, family, given[None])).logits[0, corrupted]
        labels = window_T[corrupted]
    precise_TV = logits_TV.to(torch.promote_types(logits_TV.dtype, torch.float32))
    return nn.functional.cross_entropy(precise_TV, labels, reduction="sum"), len(labels)


def _arguments(model: PreTrainedModel, family: Family, batch_BT: Tensor) -> dict[str, Any]:
    arguments: dict[str, Any] = {"input_ids": batch_BT, "use_cache": False}
    if family.task == "seq2seq_lm":
        seq2seq: Any = model
        arguments["decoder_input_ids"] = seq2seq.prepare_decoder_input_ids_from_labels(labels=batch_BT)
    return arguments
