"""What verification asks of a model that does not generate: that stock transformers opens it whole, and that it runs.

An encoder's or an encoder-decoder's own class, with its own head, must find every tensor that it has in the checkpoint,
and give finite logits on text. There is no perplexity and no continuation to judge, so gates judge the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stillroom.export.checks import Fact
from stillroom.models.family import Family
from stillroom.models.load import AUTO_CLASSES, pick_device


@torch.inference_mode()
def opening_facts(
    model_dir: Path, family: Family, windows: Iterable[Tensor], on_window: Callable[[int], None] = lambda done: None
) -> list[Fact]:
    """Open the checkpoint and run it over windows (T,) of token ids; an encoder-decoder reads each on both sides."""
    model, info = AUTO_CLASSES[family.task].from_pretrained(
        model_dir, dtype="auto", local_files_only=True, use_safetensors=True, output_loading_info=True
    )
    absent = sorted(info["missing_keys"])
    facts = [
        Fact("transformers finds every tensor", not absent, f"lacks {', '.join(absent[:3])}" if absent else "yes"),
        Fact("transformers opens its own class", type(model).__name__ == family.architecture, type(model).__name__),
    ]
    model = model.to(pick_device()).eval()
    finite = True
    for done, ids_T in enumerate(windows, 1):
        inputs: dict[str, Any] = {"input_ids": ids_T[None].to(model.device)}
        if family.decoder is not None:
            inputs["decoder_input_ids"] = inputs["input_ids"]
        finite &= bool(model(**inputs).logits.isfinite().all())
        on_window(done)
    return [*facts, Fact("the model runs, logits finite", finite, "yes" if finite else "NaN or infinite logits")]
