"""What is installed in another Python's environment, asked without importing it: engines import slowly."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

_ASK = """\
import importlib.metadata as m, json, sys
print(json.dumps({d.name.lower(): d.version for d in m.distributions() if d.name and d.name.lower() in sys.argv[1:]}))
"""


def versions_in(python: Path, packages: tuple[str, ...]) -> dict[str, str] | None:
    """Versions of those of `packages` that are installed, by lower-case name; None where `python` is no Python."""
    command = [str(python), "-c", _ASK, *packages]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        found: dict[str, str] = json.loads(answer.stdout)
    except (OSError, subprocess.SubprocessError, json.JSONDecodeError):
        return None
    return found


def interpreter_of(script: Path) -> Path:
    """The interpreter in the first line of a console script; /dev/null where there is none."""
    with script.open("rb") as file:
        first = file.readline().decode(errors="replace").strip()
    return Path(first.removeprefix("#!")) if first.startswith("#!") else Path(os.devnull)
