"""TensorRT-LLM: its command is composed here, and run where `trtllm-serve` is, which is in NVIDIA's container image.

Its PyPI packages are stubs, so there is nothing to install. It reads a checkpoint's config with the field names of
before transformers 5; a checkpoint that it would misread is refused (see export/tensorrt_llm.py). Not run by
stillroom's own tests.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stillroom.engines.contract import Installation, ServeConfig
from stillroom.engines.interpreters import interpreter_of, versions_in
from stillroom.export.tensorrt_llm import TensorRTOptions, problems, serve_command
from stillroom.machine import nvidia_gpus

PROGRAM = "trtllm-serve"


@dataclass(frozen=True)
class TensorRTLLM:
    name: str = "tensorrt-llm"
    health_path: str = "/health"
    metrics_path: str | None = "/metrics"
    lists_models: bool = True
    how_to_install: str = f"run stillroom in NVIDIA's TensorRT-LLM image, where `{PROGRAM}` is on PATH"

    def find(self) -> Installation | None:
        program = shutil.which(PROGRAM)
        if program is None:
            return None
        versions = versions_in(interpreter_of(Path(program)), ("tensorrt-llm", "tensorrt_llm")) or {}
        return Installation(self.name, Path(program), next(iter(versions.values()), "unknown"), "cuda")

    def refuses(self, model_dir: Path, installation: Installation) -> str | None:
        if not nvidia_gpus():
            return "TensorRT-LLM needs an NVIDIA GPU, and none is seen"
        return "; ".join(problems(model_dir)) or None

    def command(self, model_dir: Path, config: ServeConfig, installation: Installation) -> list[str]:
        options = TensorRTOptions(
            max_seq_len=config.max_model_len, tensor_parallel=config.tensor_parallel, host=config.host, port=config.port
        )
        return [str(installation.python), *serve_command(model_dir, options)[1:]]

    def environment(self, config: ServeConfig, installation: Installation) -> dict[str, str]:
        return {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}

    def model_name(self, model_dir: Path, config: ServeConfig) -> str:
        """`trtllm-serve` calls the model by its directory's name."""
        return model_dir.name

    def exactly(self, output_tokens: int) -> dict[str, Any]:
        return {"ignore_eos": True, "temperature": 0}
