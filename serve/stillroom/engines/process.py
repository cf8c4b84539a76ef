"""Run an engine as a process: start it, wait until it answers, show why it died, and leave nothing of it behind.

An engine runs in a session of its own, so that Ctrl-C reaches stillroom alone and stillroom stops the engine in order:
SIGTERM to the engine, time to end its workers, SIGKILL to what is left of them. Where stillroom itself is killed the
kernel sends the engine SIGTERM (Linux, PR_SET_PDEATHSIG).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import httpx
import psutil

from stillroom.engines.contract import Engine, Installation, ServeConfig
from stillroom.engines.engine import choose_engine, engine_called
from stillroom.engines.scheme import check_served, kv_cache_gib_for
from stillroom.errors import EnvironmentCannot, InputError

POLL_S = 0.2
STOP_GRACE_S = 20.0
"""Time for an engine to end its workers after SIGTERM."""
SHOWN_LOG_LINES = 15
FOREGROUND_STARTUP_TIMEOUT_S = 1800.0
"""`stillroom serve` waits this long; a large model compiles for minutes, and Ctrl-C is at hand."""
FOREGROUND_CONTEXTS = 8
"""On CPU, `stillroom serve` makes the KV cache as large as this many full contexts."""
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class RunningServer:
    """An engine that answers."""

    base_url: str
    model_name: str
    """What requests must call the model."""
    pid: int
    started_s: float
    """From the start of the process to the first sign of readiness."""
    log_path: Path

    def is_alive(self) -> bool:
        return psutil.pid_exists(self.pid) and psutil.Process(self.pid).status() != psutil.STATUS_ZOMBIE


@contextlib.contextmanager
def serve(
    engine: Engine,
    installation: Installation,
    model_dir: Path,
    config: ServeConfig,
    *,
    log_path: Path,
    startup_timeout_s: float,
) -> Iterator[RunningServer]:
    """The model behind an OpenAI-compatible endpoint for the time of the `with` block; the engine writes to `log_path`.

    Raises InputError for what the engine would refuse after a minute and for a port in use, EnvironmentCannot with the
    engine's last words where it dies or does not answer in time.
    """
    check_served(model_dir, config)
    config = config.model_copy(update={"port": pick_port(config.host, config.port)})
    started = time.monotonic()
    process = spawn(
        engine.command(model_dir, config, installation), engine.environment(config, installation), log_path=log_path
    )
    try:
        base_url = f"http://{_in_url(config.host)}:{config.port}"
        model_name = engine.model_name(model_dir, config)
        _wait_until_ready(engine, process, base_url, model_name, log_path, started + startup_timeout_s)
        yield RunningServer(base_url, model_name, process.pid, time.monotonic() - started, log_path)
    finally:
        stop(process)


def serve_foreground(model_dir: Path, engine_name: str, config: Mapping[str, Any]) -> int:
    """Serve until Ctrl-C or SIGTERM, showing the engine's log on standard error; the exit code for the command line."""
    settings = _settings(model_dir, config)
    check_served(model_dir, settings)
    engine, installation = choose_engine(engine_name, [model_dir])
    print(f"{engine.name} {installation.version} ({installation.device}) starts with {model_dir}", file=sys.stderr)
    with tempfile.TemporaryDirectory(prefix="stillroom-serve-") as folder:
        log_path = Path(folder) / "engine.log"
        with _follow(log_path, sys.stderr), _sigterm_as_interrupt():
            try:
                with serve(
                    engine,
                    installation,
                    model_dir,
                    settings,
                    log_path=log_path,
                    startup_timeout_s=FOREGROUND_STARTUP_TIMEOUT_S,
                ) as server:
                    print(
                        f"ready after {server.started_s:.0f} s: {server.base_url}/v1 model {server.model_name}",
                        flush=True,
                    )
                    while server.is_alive():
                        time.sleep(POLL_S)
            except KeyboardInterrupt:
                print("stopped", file=sys.stderr)
                return 0
        raise EnvironmentCannot(f"{engine.name} ended by itself; its last lines:\n{last_lines(log_path)}")


def print_command(model_dir: Path, engine_name: str, config: Mapping[str, Any]) -> None:
    """Print the environment and the command that `serve_foreground` would start, for a shell; nothing is started.

    An engine that is not on this machine is shown with its usual program in place of a path.
    """
    settings = _settings(model_dir, config)
    if engine_name == "auto":
        engine, installation = choose_engine(engine_name, [model_dir])
    else:
        engine = engine_called(engine_name)
        found = engine.find()
        program = "trtllm-serve" if engine.name == "tensorrt-llm" else "python"
        installation = found or Installation(engine.name, Path(program), "unknown", "cuda")
    words = [f"{name}={value}" for name, value in engine.environment(settings, installation).items()]
    print(shlex.join([*words, *engine.command(model_dir, settings, installation)]))


def spawn(
    argv: list[str], environment: Mapping[str, str], *, log_path: Path, cwd: Path | None = None
) -> subprocess.Popen[bytes]:
    """Start a process in its own session with both outputs in `log_path`; it gets SIGTERM when this process dies.

    Raises EnvironmentCannot where the program is not there.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("wb") as log:
        try:
            return subprocess.Popen(
                argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
                start_new_session=True,
                preexec_fn=_end_with_parent(),
            )
        except OSError as error:
            raise EnvironmentCannot(f"{argv[0]} cannot be started: {error.strerror}") from error


def stop(process: subprocess.Popen[bytes], grace_s: float = STOP_GRACE_S) -> None:
    """End a spawned process and all that it started. A second Ctrl-C in between kills at once."""
    family = _family(process.pid)
    try:
        if process.poll() is None:
            process.terminate()
            process.wait(grace_s)
    except subprocess.TimeoutExpired:
        pass
    finally:
        family |= _family(process.pid)
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):
                member.kill()
        process.wait()
        psutil.wait_procs(list(family), timeout=5)


def last_lines(log_path: Path, count: int = SHOWN_LOG_LINES) -> str:
    """The end of a log, after the errors named further above: engines print the cause before many a traceback's end."""
    lines = [line for line in log_path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    causes = [line for line in lines[:-count] if "Error: " in line]
    return "\n".join([*dict.fromkeys(causes[:3]), *lines[-count:]])


def pick_port(host: str, port: int) -> int:
    """`port` if it is free, a free one for 0. Raises InputError where it is in use or the host is another machine's."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise InputError(
                f"port {port} on {host} cannot be opened ({error.strerror}); choose another with --port, or 0 for a "
                "free one"
            ) from error
        chosen: int = probe.getsockname()[1]
        return chosen


def _wait_until_ready(
    engine: Engine, process: subprocess.Popen[bytes], base_url: str, model_name: str, log_path: Path, deadline: float
) -> None:
    with httpx.Client(base_url=base_url, timeout=5.0, trust_env=False) as client:
        while not _is_ready(engine, client, model_name):
            if process.poll() is not None:
                raise EnvironmentCannot(
                    f"{engine.name} died at start with exit code {process.returncode}; its last lines:\n"
                    f"{last_lines(log_path)}"
                )
            if time.monotonic() > deadline:
                raise EnvironmentCannot(
                    f"{engine.name} did not answer in time (startup_timeout_s); its last lines:\n{last_lines(log_path)}"
                )
            time.sleep(POLL_S)


def _is_ready(engine: Engine, client: httpx.Client, model_name: str) -> bool:
    """Healthy, and the model is listed where the engine lists models."""
    try:
        if client.get(engine.health_path).status_code != 200:
            return False
        if not engine.lists_models:
            return True
        answer = client.get("/v1/models")
        return answer.status_code == 200 and model_name in [model["id"] for model in answer.json()["data"]]
    except (httpx.TransportError, json.JSONDecodeError):
        return False


def _settings(model_dir: Path, config: Mapping[str, Any]) -> ServeConfig:
    settings = ServeConfig.model_validate(config)
    gib = kv_cache_gib_for(model_dir, FOREGROUND_CONTEXTS * settings.max_model_len)
    return settings.model_copy(update={"kv_cache_gib": gib})


def _end_with_parent() -> Callable[[], None] | None:
    """What the child does before the engine's program starts: ask for SIGTERM at the parent's death. Linux only."""
    if sys.platform != "linux":
        return None
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    parent = os.getpid()

    def ask() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died in between
            os._exit(1)

    return ask


def _family(pid: int) -> set[psutil.Process]:
    """The descendants that live."""
    try:
        return set(psutil.Process(pid).children(recursive=True))
    except psutil.NoSuchProcess:
        return set()


def _in_url(host: str) -> str:
    """A host to connect to: `0.0.0.0` and `::` listen everywhere, and are asked on loopback."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]" if ":" in host else host


@contextlib.contextmanager
def _follow(log_path: Path, stream: TextIO) -> Iterator[None]:
    """Copy what is written to `log_path` to `stream` as it comes."""
    ended = threading.Event()

    def copy() -> None:
        shown = 0
        while True:
            last_round = ended.is_set()
            if log_path.exists():
                with log_path.open("rb") as file:
                    file.seek(shown)
                    new = file.read()
                shown += len(new)
                stream.write(new.decode(errors="replace"))
                stream.flush()
            if last_round:
                return
            ended.wait(POLL_S)

    thread = threading.Thread(target=copy, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@contextlib.contextmanager
def _sigterm_as_interrupt() -> Iterator[None]:
    """SIGTERM ends a served model as Ctrl-C does."""

    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
