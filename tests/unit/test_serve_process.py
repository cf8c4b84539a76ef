"""Engines as processes: ready, dying, stuck, stopped, nothing left behind. The engine is a real process, without a
model."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import textwrap
from contextlib import AbstractContextManager
from pathlib import Path

import httpx
import psutil
import pytest

from fake_engine import FakeEngine
from stillroom.engines.contract import ServeConfig
from stillroom.engines.engine import ENGINES
from stillroom.engines.process import RunningServer, last_lines, pick_port, print_command, serve
from stillroom.errors import EnvironmentCannot, InputError

LIMIT_S = 20.0


@pytest.fixture
def model_dir(tmp_path: Path) -> Path:
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"num_attention_heads": 2, "max_position_embeddings": 4096}))
    (path / "model.safetensors").touch()
    (path / "tokenizer.json").touch()
    return path


def served(
    engine: FakeEngine, model_dir: Path, config: ServeConfig | None = None, timeout_s: float = LIMIT_S
) -> AbstractContextManager[RunningServer]:
    log_path = model_dir.parent / "engine.log"
    config = config or ServeConfig()
    return serve(engine, engine.find(), model_dir, config, log_path=log_path, startup_timeout_s=timeout_s)


def enter(serving: AbstractContextManager[RunningServer]) -> None:
    """Start and stop, so that nothing is left where the start was meant to fail and does not."""
    with serving:
        pass


def gone(pids: list[int]) -> bool:
    """All of these processes end within the limit."""
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)], timeout=LIMIT_S)
    return all(process.status() == psutil.STATUS_ZOMBIE for process in alive)


def test_a_slow_server_is_waited_for_and_answers_under_its_name(model_dir: Path) -> None:
    with served(FakeEngine(("--start-delay-s", "0.5")), model_dir, ServeConfig(served_model_name="rose")) as server:
        assert server.started_s > 0.5
        body = {"model": server.model_name, "prompt": "a", "max_tokens": 3}
        answer = httpx.post(f"{server.base_url}/v1/completions", json=body, trust_env=False)
        assert answer.json()["usage"]["completion_tokens"] == 3
        assert server.is_alive()
    assert not server.is_alive()


def test_an_engine_that_dies_at_start_is_shown_with_its_last_lines(model_dir: Path) -> None:
    with pytest.raises(EnvironmentCannot, match=r"died at start with exit code 1.*\n(.*\n)*ValueError: head size 16"):
        enter(served(FakeEngine(("--die-at-start",)), model_dir))


def test_an_engine_that_does_not_answer_in_time_is_stopped(model_dir: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with pytest.raises(EnvironmentCannot, match=r"did not answer in time.*\nfake engine starting"):
        enter(served(FakeEngine(("--start-delay-s", "60", "--pids", str(pids))), model_dir, timeout_s=1.0))
    assert gone([int(pid) for pid in pids.read_text().split()])


def test_a_port_in_use_is_said_before_anything_starts(model_dir: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port} on 127.0.0.1 cannot be opened"):
            enter(served(FakeEngine(), model_dir, ServeConfig(port=port)))
    assert not (model_dir.parent / "engine.log").exists()


def test_a_free_port_is_chosen_for_zero_and_a_free_one_is_kept() -> None:
    port = pick_port("127.0.0.1", 0)
    assert pick_port("127.0.0.1", port) == port


def test_stopping_ends_children_that_ignore_sigterm(model_dir: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with served(FakeEngine(("--child", "--pids", str(pids))), model_dir):
        started = [int(pid) for pid in pids.read_text().split()]
        assert len(started) == 2
        assert all(psutil.pid_exists(pid) for pid in started)
    assert gone(started)


def test_an_error_in_the_with_block_stops_the_engine(model_dir: Path) -> None:
    started = []

    def fail() -> None:
        with served(FakeEngine(), model_dir) as server:
            started.append(server)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert not started[0].is_alive()


def test_the_cause_above_a_long_traceback_is_shown_too(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(
        "\n".join(["ok", "ValueError: the cause", *(f"frame {i}" for i in range(40)), "RuntimeError: see above"])
    )
    shown = last_lines(log, 3).splitlines()
    assert shown == ["ValueError: the cause", "frame 38", "frame 39", "RuntimeError: see above"]


SERVE_SCRIPT = textwrap.dedent("""
    import sys
    from pathlib import Path
    from fake_engine import FakeEngine
    from stillroom.engines.engine import ENGINES
    from stillroom.engines.process import serve_foreground
    ENGINES["fake"] = FakeEngine(tuple(sys.argv[2:]))
    sys.exit(serve_foreground(Path(sys.argv[1]), "fake", {"port": 0, "max_model_len": 64}))
""")


def foreground(model_dir: Path, *flags: str) -> subprocess.Popen[str]:
    """`serve_foreground` in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-c", SERVE_SCRIPT, str(model_dir), *flags],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_served_model_says_where_it_is_and_ends_in_order(
    model_dir: Path, tmp_path: Path, number: signal.Signals
) -> None:
    pids = tmp_path / "pids"
    process = foreground(model_dir, "--pids", str(pids))
    assert process.stdout is not None
    ready = process.stdout.readline()
    assert "ready after" in ready
    url = ready.split()[4]
    assert httpx.get(f"{url}/models", trust_env=False).status_code == 200
    process.send_signal(number)
    _, errors = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0
    assert "fake engine ready" in errors
    assert "fake engine stopped by SIGTERM" in errors
    assert gone([int(pid) for pid in pids.read_text().split()])


def test_an_engine_does_not_outlive_a_killed_stillroom(model_dir: Path, tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    process = foreground(model_dir, "--pids", str(pids))
    assert process.stdout is not None
    process.stdout.readline()
    process.kill()
    process.communicate(timeout=LIMIT_S)
    assert gone([int(pid) for pid in pids.read_text().split()])


def test_a_dry_run_prints_a_command_that_a_shell_takes(model_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ENGINES:
        print_command(model_dir, name, {"port": 8000, "max_model_len": 64})
        printed = capsys.readouterr().out
        assert str(model_dir) in printed
        assert "HF_HUB_OFFLINE=1" in printed
        assert "8000" in printed
