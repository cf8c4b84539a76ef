"""The one place where stillroom reads its environment, and where it keeps what outlives a run."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """`$STILLROOM_HOME`, else `~/.cache/stillroom`: engines' virtualenvs and cached hashes."""
    given = os.environ.get("STILLROOM_HOME")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "stillroom"


def offline() -> bool:
    """The user has said that no hub may be asked (`HF_HUB_OFFLINE=1`)."""
    return os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on")


def vllm_python() -> Path | None:
    """`$STILLROOM_VLLM_PYTHON`: the interpreter of a vLLM that is already on the machine."""
    given = os.environ.get("STILLROOM_VLLM_PYTHON")
    return Path(given).expanduser() if given else None
