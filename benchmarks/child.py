"""A piece of a benchmark in a process of its own, whose peak memory is then its own too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from typing import Any


def run_child(arguments: Sequence[str], called: str) -> tuple[Any, int]:
    """The JSON that Python prints for these arguments, and the process's peak resident bytes by the kernel's count.

    Ends the benchmark where the child fails; `called` says which one it was.
    """
    child = subprocess.Popen([sys.executable, *arguments], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    answer = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise SystemExit(f"{called} failed with {child.returncode}")
    return json.loads(answer), usage.ru_maxrss * 1024
