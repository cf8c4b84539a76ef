"""An engine whose server is fake_openai.py, as a real process: for testing what starts, loads and stops engines."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import fake_openai
from stillroom.engines.contract import Installation, ServeConfig


@dataclass(frozen=True)
class FakeEngine:
    """`flags` are handed to fake_openai.py."""

    flags: tuple[str, ...] = ()
    refuses_dirs_called: str = "refused"
    name: str = "fake"
    health_path: str = "/health"
    metrics_path: str | None = None
    lists_models: bool = True
    how_to_install: str = "it comes with the tests"

    def find(self) -> Installation:
        return Installation(self.name, Path(sys.executable), "1.0", "cpu")

    def refuses(self, model_dir: Path, installation: Installation) -> str | None:
        return "no kernel for it" if model_dir.name == self.refuses_dirs_called else None

    def command(self, model_dir: Path, config: ServeConfig, installation: Installation) -> list[str]:
        program = str(fake_openai.__file__)
        where = ["--host", config.host, "--port", str(config.port), "--model", self.model_name(model_dir, config)]
        return [str(installation.python), program, *where, *self.flags]

    def environment(self, config: ServeConfig, installation: Installation) -> dict[str, str]:
        return {}

    def model_name(self, model_dir: Path, config: ServeConfig) -> str:
        return config.served_model_name or "m"

    def exactly(self, output_tokens: int) -> dict[str, Any]:
        return {"ignore_eos": True, "temperature": 0}
