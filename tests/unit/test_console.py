"""What a run shows: throttled lines, JSON events, and the file of events beside."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from stillroom.console import JsonReporter, Reporter, StepProgress, TerminalReporter, make_reporter


def test_plain_progress_shows_the_end_once_and_nothing_in_between() -> None:
    shown = io.StringIO()
    progress = Reporter(shown).progress("distill")
    for done in (1, 2, 3, 3, 3):
        progress.update(done, 3, "step", loss=0.5)
    assert shown.getvalue() == "    distill: 3/3 step, loss 0.5\n"


def test_progress_without_a_throttle_shows_every_update() -> None:
    shown = io.StringIO()
    progress = StepProgress(Reporter(shown), "distill", interval_s=0.0)
    for done in (1, 2):
        progress.update(done, 3, "step")
    assert shown.getvalue().splitlines() == ["    distill: 1/3 step", "    distill: 2/3 step"]


def test_json_events_go_to_standard_output_and_to_the_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    reporter = JsonReporter()
    reporter.events_file = tmp_path / "events.jsonl"
    reporter.started("prune", "prune", "1/2")
    reporter.progress("prune").log("measuring")
    printed = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    written = [json.loads(line) for line in reporter.events_file.read_text().splitlines()]
    assert [event["event"] for event in printed] == ["started", "log"]
    assert [{k: v for k, v in event.items() if k != "time"} for event in written] == printed


def test_the_reporter_fits_where_standard_error_goes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(make_reporter(False)) is Reporter
    assert type(make_reporter(True)) is JsonReporter
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert type(make_reporter(False)) is TerminalReporter
