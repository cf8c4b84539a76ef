"""What every engine says of itself, and the settings that a server is started with.

An engine is a process, never an import: vLLM, TensorRT-LLM and Model Optimizer pin different versions of the same
libraries, so each engine may live in a virtualenv or image of its own. What stillroom needs of one is here: is it on
this machine, does it take this checkpoint, which command serves it, where does it answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field

Device = Literal["cpu", "cuda"]


class ServeConfig(BaseModel):
    """Settings of a server, the same for every engine."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    host: str = "127.0.0.1"
    """Loopback: engines' own keys leave endpoints open, so what faces a network is a front door before them."""
    port: int = Field(default=0, ge=0, le=65535)
    """0 chooses a free one."""
    max_model_len: int = Field(default=4096, ge=16)
    """Context in tokens."""
    served_model_name: str | None = None
    """What requests call the model, where the engine has aliases. Default: the directory."""
    tensor_parallel: int = Field(default=1, ge=1)
    """GPUs that share the model."""
    gpu_memory_share: float = Field(default=0.9, gt=0, le=1)
    """Of each GPU, for weights and KV cache together."""
    kv_cache_gib: int = Field(default=1, ge=1)
    """On CPU: memory for the KV cache; `kv_cache_gib_for` computes it."""


@dataclass(frozen=True)
class Installation:
    """An engine on this machine."""

    engine: str
    python: Path
    """The interpreter that runs it, or the program itself where that is what is started."""
    version: str
    device: Device
    """What this build computes on."""


class Engine(Protocol):
    """One serving engine."""

    @property
    def name(self) -> str: ...

    @property
    def health_path(self) -> str: ...

    @property
    def metrics_path(self) -> str | None:
        """Prometheus metrics, where the engine has them."""

    @property
    def lists_models(self) -> bool:
        """GET /v1/models names the served model once it is ready."""

    @property
    def how_to_install(self) -> str: ...

    def find(self) -> Installation | None:
        """The engine on this machine, or None."""

    def refuses(self, model_dir: Path, installation: Installation) -> str | None:
        """Why this checkpoint cannot be served here, known without trying; None when nothing speaks against it."""

    def command(self, model_dir: Path, config: ServeConfig, installation: Installation) -> list[str]:
        """The command line of the server."""

    def environment(self, config: ServeConfig, installation: Installation) -> dict[str, str]:
        """What is added to the environment."""

    def model_name(self, model_dir: Path, config: ServeConfig) -> str:
        """What requests must call the model."""

    def exactly(self, output_tokens: int) -> dict[str, Any]:
        """Request fields beside `max_tokens` with which an answer has exactly so many tokens, chosen greedily."""
