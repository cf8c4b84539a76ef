"""What a person or a machine sees of a run: bars on a terminal, plain lines in CI, JSON events with --json.

Every event also goes to events.jsonl in the run directory, whatever is shown.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from stillroom.artifact import Artifact

PLAIN_INTERVAL_S = 15.0
"""Plain progress lines come at most this often."""


class Reporter:
    """Writes events to a file and shows them; the base shows plain lines on `stream`."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.events_file: Path | None = None

    def started(self, step: str, kind: str, number: str) -> None:
        self.event("started", step=step, kind=kind, number=number)
        self.show(f"[{number}] {step}")

    def cached(self, step: str, artifact: Artifact) -> None:
        self.event("cached", step=step, key=artifact.key)

    def finished(self, step: str, artifact: Artifact) -> None:
        manifest = artifact.manifest
        self.event("finished", step=step, key=artifact.key, seconds=manifest.seconds, path=str(artifact.path))
        facts = "".join(f", {m.name} {m.value:.6g} {m.unit}" for m in manifest.measurements[:3])
        self.show(f"    {step} done in {manifest.seconds:.1f} s{facts} -> {artifact.path}")

    def stopped(self, step: str) -> None:
        self.event("stopped", step=step)

    def progress(self, step: str) -> StepProgress:
        return StepProgress(self, step)

    def updated(self, step: str, done: int, total: int, unit: str, facts: dict[str, float | str]) -> None:
        self.event("progress", step=step, done=done, total=total, unit=unit, **facts)
        shown = "".join(f", {name} {_number(value)}" for name, value in facts.items())
        self.show(f"    {step}: {done}/{total} {unit}{shown}")

    def logged(self, step: str, message: str) -> None:
        self.event("log", step=step, message=message)
        self.show(f"    {step}: {message}")

    def show(self, line: str) -> None:
        print(line, file=self.stream, flush=True)

    def event(self, event: str, **fields: Any) -> None:
        if self.events_file is not None and self.events_file.parent.is_dir():
            with self.events_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"time": round(time.time(), 3), "event": event, **fields}) + "\n")


class StepProgress:
    """One step's Progress, throttled for plain output."""

    def __init__(self, reporter: Reporter, step: str, interval_s: float = PLAIN_INTERVAL_S) -> None:
        self.reporter, self.step, self.interval_s = reporter, step, interval_s
        self.last_shown = time.monotonic()
        self.last_done: int | None = None

    def update(self, done: int, total: int, unit: str, **facts: float | str) -> None:
        now = time.monotonic()
        is_end = done == total and done != self.last_done
        if now - self.last_shown >= self.interval_s or is_end:
            self.last_shown, self.last_done = now, done
            self.reporter.updated(self.step, done, total, unit, facts)

    def log(self, message: str) -> None:
        self.reporter.logged(self.step, message)


class JsonReporter(Reporter):
    """Each event as a JSON line on standard output."""

    def __init__(self) -> None:
        super().__init__(sys.stdout)

    def show(self, line: str) -> None:
        """Nothing beside the events."""

    def progress(self, step: str) -> StepProgress:
        return StepProgress(self, step, interval_s=0.0)

    def event(self, event: str, **fields: Any) -> None:
        super().event(event, **fields)
        print(json.dumps({"event": event, **fields}), flush=True)


class TerminalReporter(Reporter):
    """A bar for the step at work, and a line for each that is done."""

    def __init__(self) -> None:
        super().__init__()
        self.console = Console(stderr=True)
        self.bars: Progress | None = None

    def show(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def started(self, step: str, kind: str, number: str) -> None:
        self.event("started", step=step, kind=kind, number=number)
        self.bars = Progress(
            SpinnerColumn(),
            TextColumn(f"[{number}] {{task.description}}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[facts]}", markup=False),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
        )
        self.bars.add_task(step, total=None, facts="")
        self.bars.start()

    def updated(self, step: str, done: int, total: int, unit: str, facts: dict[str, float | str]) -> None:
        self.event("progress", step=step, done=done, total=total, unit=unit, **facts)
        if self.bars is not None:
            shown = " ".join([unit, *(f"{name} {_number(value)}" for name, value in facts.items())])
            self.bars.update(self.bars.task_ids[0], completed=done, total=total, facts=shown)

    def finished(self, step: str, artifact: Artifact) -> None:
        self.close()
        super().finished(step, artifact)

    def stopped(self, step: str) -> None:
        self.close()
        super().stopped(step)

    def progress(self, step: str) -> StepProgress:
        return StepProgress(self, step, interval_s=0.2)

    def close(self) -> None:
        if self.bars is not None:
            self.bars.stop()
            self.bars = None


def quiet_libraries() -> None:
    """Keep the libraries' own bars and notes off the screen; their errors still come through.

    Call it before a library is imported (tqdm reads its variable then) and again after.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    if "transformers" in sys.modules:
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()
        transformers_logging.set_verbosity_error()
    logging.getLogger("modelopt").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module=r"modelopt\..*")


def make_reporter(as_json: bool) -> Reporter:
    """What fits where standard error goes."""
    if as_json:
        return JsonReporter()
    return TerminalReporter() if sys.stderr.isatty() else Reporter()


def _number(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
