"""Write a plain Hugging Face checkpoint directory that stock engines load, with everything that belongs beside weights.

TensorRT-LLM up to 1.2 reads `rope_theta` and `torch_dtype` at the top level of config.json; transformers 5 writes only
`rope_parameters` and `dtype`, and TensorRT-LLM would silently fall back to theta 10000. So both are written.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from stillroom.artifact import write_atomically

COMPANIONS = (
    "tokenizer*", "vocab*", "spiece.model", "merges.txt", "special_tokens_map.json", "added_tokens.json",
    "chat_template*", "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""What comes along from the source: tokenizer, chat template, generation config, licence."""


def save_checkpoint(model: PreTrainedModel, source_dir: Path, out_dir: Path) -> None:
    """Write `model` as sharded safetensors with its config, and the companions of `source_dir`."""
    model.save_pretrained(out_dir, safe_serialization=True, max_shard_size="5GB")
    copy_companions(source_dir, out_dir)
    finish_config(out_dir)


def copy_companions(source_dir: Path, out_dir: Path) -> None:
    """Copy tokenizer, chat template, generation config and licence, replacing what is there."""
    for pattern in COMPANIONS:
        for path in source_dir.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, out_dir / path.name)


def finish_config(model_dir: Path) -> None:
    """Add the top-level fields that engines before transformers 5 look for."""
    path = model_dir / "config.json"
    write_atomically(path, json.dumps(with_engine_fields(json.loads(path.read_text())), indent=2) + "\n")


def with_engine_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The config with `torch_dtype` and, where rope has one theta for all layers, `rope_theta` at the top level."""
    added = dict(config)
    if "dtype" in config:
        added.setdefault("torch_dtype", config["dtype"])
    rope = config.get("rope_parameters") or {}
    if "rope_theta" in rope:
        added.setdefault("rope_theta", rope["rope_theta"])
    elif isinstance(rope.get("full_attention"), dict):  # Gemma 3 has one for each kind of layer
        added.setdefault("rope_theta", rope["full_attention"]["rope_theta"])
        added.setdefault("rope_local_base_freq", rope["sliding_attention"]["rope_theta"])
    return added
