"""Open a checkpoint directory with transformers, and refuse what transformers would silently get wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from stillroom.errors import InputError
from stillroom.models.family import family_of
from stillroom.models.shape import read_config
from stillroom.models.source import require_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

AUTO_CLASSES: dict[str, Any] = {
    "causal_lm": AutoModelForCausalLM,
    "masked_lm": AutoModelForMaskedLM,
    "seq2seq_lm": AutoModelForSeq2SeqLM,
}
"""What opens a model, by its family's task."""


def pick_device() -> torch.device:
    """The first CUDA device, or the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_model(
    model_dir: Path, *, dtype: torch.dtype | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The model in eval mode on `pick_device()`, in the checkpoint's dtype unless another is asked for.

    Raises InputError for a family without a description, and for a quantized checkpoint: transformers opens ModelOpt's
    FP8 without an error and computes wrong. Use `stillroom.export.dequantize.load_dequantized` for those.
    """
    config = read_config(model_dir)
    if "quantization_config" in config or (model_dir / "hf_quant_config.json").exists():
        raise InputError(
            f"{model_dir} is a quantized checkpoint; it must be dequantized to be opened with transformers"
        )
    auto_class = AUTO_CLASSES[family_of(config, str(model_dir)).task]
    model: Any = auto_class.from_pretrained(
        model_dir,
        dtype=dtype or "auto",
        trust_remote_code=trust_remote_code,
        local_files_only=True,
        use_safetensors=True,
    )
    return model.to(pick_device()).eval()


def load_tokenizer(model_dir: Path, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer in the checkpoint directory. Raises InputError where there is none, or a damaged one."""
    require_tokenizer(model_dir)
    try:
        return AutoTokenizer.from_pretrained(model_dir, trust_remote_code=trust_remote_code, local_files_only=True)
    except Exception as error:  # tokenizers raises Exception itself
        raise InputError(
            f"the tokenizer files in {model_dir} cannot be read ({error}); fetch them again, from where the model came"
        ) from error
