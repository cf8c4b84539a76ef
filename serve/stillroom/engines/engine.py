"""The engines, as a table, and the choice among them. A new engine is one file and one line here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from stillroom.engines.contract import Engine, Installation
from stillroom.engines.tensorrt_llm_engine import TensorRTLLM
from stillroom.engines.transformers_engine import Transformers
from stillroom.engines.vllm_engine import Vllm
from stillroom.errors import EnvironmentCannot, InputError

ENGINES: dict[str, Engine] = {
    "vllm": Vllm(),
    "transformers": Transformers(),
    "tensorrt-llm": TensorRTLLM(),
}

AUTO = ("vllm", "transformers")
"""What `auto` tries, in order."""


def find_engines() -> dict[str, Installation]:
    """The engines on this machine, by name."""
    found = {name: engine.find() for name, engine in ENGINES.items()}
    return {name: installation for name, installation in found.items() if installation is not None}


def engine_called(name: str) -> Engine:
    """Raises InputError for a name that is in no row of the table."""
    if name not in ENGINES:
        raise InputError(f"engine {name!r} is not known; allowed: auto, {', '.join(ENGINES)}")
    return ENGINES[name]


def choose_engine(name: str, model_dirs: Sequence[Path]) -> tuple[Engine, Installation]:
    """The engine of that name, or for `auto` the first of AUTO that is here; it must accept one of the models at least.

    Raises EnvironmentCannot with each tried engine's reason and what to do.
    """
    reasons = []
    for candidate in AUTO if name == "auto" else (name,):
        engine = engine_called(candidate)
        installation = engine.find()
        if installation is None:
            reasons.append(f"{candidate} is not on this machine ({engine.how_to_install})")
            continue
        refusals = [engine.refuses(model_dir, installation) for model_dir in model_dirs]
        if None in refusals:
            return engine, installation
        reasons.append(f"{candidate}: {refusals[0]}")
    where = ", ".join(str(model_dir) for model_dir in model_dirs)
    raise EnvironmentCannot(f"no engine serves {where}: {'; '.join(reasons)}")
