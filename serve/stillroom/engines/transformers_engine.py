"""`transformers serve`: the engine that is there wherever stillroom compresses, for checkpoints with plain weights.

It opens ModelOpt's FP8 without an error and computes wrong (it drops the scales), so every quantized checkpoint is
refused. It has no key, no metrics and no alias: requests call the model by its directory. It answers 422 to fields
that it does not know, such as `ignore_eos`; answers of an exact length come through its own field `generation_config`
instead. Its /v1/models lists the hub's cache, not the served model, and fails without a cache, so only /health says it
is ready; the model is loaded before the port is opened.
"""

from __future__ import annotations

import importlib.metadata
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.engines.contract import Installation, ServeConfig
from stillroom.engines.scheme import GIB, kv_bytes_per_token, read_quantization
from stillroom.machine import nvidia_gpus

NEEDED = ("transformers", "torch", "accelerate", "fastapi", "uvicorn", "openai")
"""What `transformers serve` imports."""

BLOCK_TOKENS = 256
"""In one block of the paged KV cache."""
MAX_BATCH_TOKENS = 1024
"""In one forward pass."""
MAX_BLOCKS = 128
"""On CPU a mask of MAX_BATCH_TOKENS x cached tokens is held, 2 GiB at a quarter of a million."""


@dataclass(frozen=True)
class Transformers:
    name: str = "transformers"
    health_path: str = "/health"
    metrics_path: str | None = None
    lists_models: bool = False
    how_to_install: str = "`pip install 'stillroom[all]'`"

    def find(self) -> Installation | None:
        """In the interpreter that runs stillroom."""
        try:
            versions = {package: importlib.metadata.version(package) for package in NEEDED}
        except importlib.metadata.PackageNotFoundError:
            return None
        on_gpu = bool(nvidia_gpus()) and "+cpu" not in versions["torch"]
        return Installation(self.name, Path(sys.executable), versions["transformers"], "cuda" if on_gpu else "cpu")

    def refuses(self, model_dir: Path, installation: Installation) -> str | None:
        if (quantized := read_quantization(model_dir)) is not None:
            return f"transformers computes wrong on {quantized} without saying so; it serves plain weights only"
        return None

    def command(self, model_dir: Path, config: ServeConfig, installation: Installation) -> list[str]:
        return [
            str(installation.python), "-m", "transformers.cli.transformers", "serve", str(model_dir),
            "--device", installation.device, "--host", config.host, "--port", str(config.port),
            "--continuous-batching", "--cb-block-size", str(BLOCK_TOKENS),
            "--cb-num-blocks", str(_num_blocks(model_dir, config)), "--cb-max-batch-tokens", str(MAX_BATCH_TOKENS),
        ]  # fmt: skip

    def environment(self, config: ServeConfig, installation: Installation) -> dict[str, str]:
        return {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}

    def model_name(self, model_dir: Path, config: ServeConfig) -> str:
        """The directory, whatever alias was wanted."""
        return str(model_dir)

    def exactly(self, output_tokens: int) -> dict[str, Any]:
        """No token has the id -1, so nothing ends the answer before `max_tokens`."""
        return {"generation_config": json.dumps({"eos_token_id": -1, "do_sample": False})}


def _num_blocks(model_dir: Path, config: ServeConfig) -> int:
    """Blocks that fill `kv_cache_gib`, and hold one whole context at least."""
    per_block = BLOCK_TOKENS * max(1, kv_bytes_per_token(model_dir))
    return max(-(-config.max_model_len // BLOCK_TOKENS), min(MAX_BLOCKS, config.kv_cache_gib * GIB // per_block))
