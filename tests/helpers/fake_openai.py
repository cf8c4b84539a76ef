"""A real HTTP server with the OpenAI endpoints and no model: what a load generator meets, made to order.

It answers every completion with `max_tokens` words, streamed or not, and can be told to be slow to start, to die at
start, to answer with 500 from some request on, to end early, to hang, or to die in the middle. Standard library only,
so that it stands in for an engine as a process: `python fake_openai.py --port 8000 --model m`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import FrameType
from typing import Any


@dataclass
class Behaviour:
    """How the server answers."""

    model: str = "m"
    tokens_per_second: float = 2000.0
    """Of one request; requests do not slow each other down."""
    fail_from_request: int | None = None
    """500 from this request on, counted from 1."""
    die_at_request: int | None = None
    """The process ends at this request, without an answer."""
    short_by: int = 0
    """Tokens fewer than were asked for."""
    refuse_fields: tuple[str, ...] = ()
    """422 where the request has one of these, as `transformers serve` answers what it does not know."""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    """Every completion request, in order of arrival."""
    bodies_file: Path | None = None
    """They are appended there too, one JSON object a line."""
    lock: threading.Lock = field(default_factory=threading.Lock)


class Handler(BaseHTTPRequestHandler):
    """One request; `behaviour` is set on the subclass that `make_server` makes."""

    protocol_version = "HTTP/1.1"
    behaviour: Behaviour

    def do_GET(self) -> None:
        if self.path == "/health":
            self.reply(200, {"status": "ok"})
        elif self.path == "/v1/models":
            self.reply(200, {"object": "list", "data": [{"id": self.behaviour.model, "object": "model"}]})
        else:
            self.reply(404, {"error": self.path})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.behaviour.lock:
            self.behaviour.bodies.append(body)
            number = len(self.behaviour.bodies)
            if self.behaviour.bodies_file is not None:
                with self.behaviour.bodies_file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(body) + "\n")
        if self.behaviour.die_at_request is not None and number >= self.behaviour.die_at_request:
            print("RuntimeError: the engine core died", flush=True)
            os._exit(1)
        if self.behaviour.fail_from_request is not None and number >= self.behaviour.fail_from_request:
            self.reply(500, {"error": "out of memory"})
        elif self.path != "/v1/completions":
            self.reply(404, {"error": self.path})
        elif unknown := sorted(set(body) & set(self.behaviour.refuse_fields)):
            self.reply(422, {"detail": f"Unexpected fields in the request: {unknown}"})
        elif body["model"] != self.behaviour.model:
            self.reply(404, {"error": f"no model {body['model']}"})
        else:
            self.complete(body)

    def complete(self, body: dict[str, Any]) -> None:
        num_tokens = max(1, body.get("max_tokens", 16) - self.behaviour.short_by)
        usage = {"prompt_tokens": len(body["prompt"].split()), "completion_tokens": num_tokens}
        usage["total_tokens"] = sum(usage.values())
        if not body.get("stream"):
            time.sleep(num_tokens / self.behaviour.tokens_per_second)
            self.reply(200, {"id": "c", "choices": [self.choice("rose " * num_tokens, "length")], "usage": usage})
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for _ in range(num_tokens):
            time.sleep(1 / self.behaviour.tokens_per_second)
            self.event({"id": "c", "choices": [self.choice("rose ", None)]})
        self.event({"id": "c", "choices": [self.choice("", "length")], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")
        self.close_connection = True

    @staticmethod
    def choice(text: str, finish_reason: str | None) -> dict[str, Any]:
        return {"index": 0, "text": text, "finish_reason": finish_reason}

    def event(self, content: dict[str, Any]) -> None:
        self.wfile.write(f"data: {json.dumps(content)}\n\n".encode())
        self.wfile.flush()

    def reply(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: requests are kept in `bodies`."""


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: a client that goes away is no error here."""


def make_server(behaviour: Behaviour, host: str = "127.0.0.1", port: int = 0) -> Server:
    """A bound server; run `serve_forever` on it in a thread."""
    return Server((host, port), type("BoundHandler", (Handler,), {"behaviour": behaviour}))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--model", default="m")
    parser.add_argument("--start-delay-s", type=float, default=0.0)
    parser.add_argument("--die-at-start", action="store_true")
    parser.add_argument("--ignore-sigterm", action="store_true")
    parser.add_argument("--child", action="store_true", help="start a child that outlives a careless stop")
    parser.add_argument("--pids", type=Path, help="write the process ids there, own and child's")
    parser.add_argument("--tokens-per-second", type=float, default=2000.0)
    parser.add_argument("--fail-from-request", type=int)
    parser.add_argument("--die-at-request", type=int)
    parser.add_argument("--short-by", type=int, default=0)
    parser.add_argument("--refuse-fields", default="")
    parser.add_argument("--bodies", type=Path, help="append every completion request there")
    given = parser.parse_args()
    pids = [os.getpid()]
    print("fake engine starting", flush=True)
    if given.ignore_sigterm:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    else:
        signal.signal(signal.SIGTERM, _leave)
    if given.child:
        pids.append(_fork_child())
    if given.pids:
        given.pids.write_text(" ".join(map(str, pids)))
    if given.die_at_start:
        print("ValueError: head size 16 is not supported", flush=True)
        print("RuntimeError: engine initialization failed, see root cause above", flush=True)
        sys.exit(1)
    time.sleep(given.start_delay_s)
    behaviour = Behaviour(
        model=given.model,
        tokens_per_second=given.tokens_per_second,
        fail_from_request=given.fail_from_request,
        die_at_request=given.die_at_request,
        short_by=given.short_by,
        refuse_fields=tuple(filter(None, given.refuse_fields.split(","))),
        bodies_file=given.bodies,
    )
    print("fake engine ready", flush=True)
    make_server(behaviour, given.host, given.port).serve_forever()


def _leave(number: int, frame: FrameType | None) -> None:
    print("fake engine stopped by SIGTERM", flush=True)
    os._exit(0)


def _fork_child() -> int:
    """A child that ignores SIGTERM, as a worker stuck in a kernel does."""
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            signal.pause()
    return pid


if __name__ == "__main__":
    main()
