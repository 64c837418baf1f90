"""A Hub on loopback that speaks to the unmodified huggingface_hub client, with faults on request.

Transfers are LFS's: clients set HF_HUB_DISABLE_XET=1.
"""

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

from tests.hub_routes import TOKENS, Answer, Request, Routes
from tests.hub_store import Store

# huggingface_hub 1.x gives up at once on much of what 2.x tries again
_OLD = version("huggingface_hub").startswith("1.")
patient_client = pytest.mark.skipif(_OLD, reason="the client retries less")
client_validates_anywhere = pytest.mark.skipif(_OLD, reason="the client validates at huggingface.co only")


@dataclass(kw_only=True)
class Fault:
    """What goes wrong at the next requests that match.

    `before` runs first; then the answer is delayed; then `status` replaces it. Otherwise the request
    is served, and its answer is corrupted (one byte, same size), cut (a shorter, consistent body) or
    dropped (the connection closes after so many bytes of the body; -1: before any answer).
    """

    method: str = ".*"
    path: str = ".*"
    times: int = 1
    before: Callable[["Hub"], None] | None = None
    delay: float = 0.0  # seconds
    status: int | None = None
    code: str = ""
    message: str = "injected"
    headers: dict[str, str] = field(default_factory=dict)
    corrupt: bool = False
    cut: int | None = None
    drop: int | None = None
    refuse_effect: bool = False  # drop the connection before the request takes effect
    seen: int = 0

    def spoil(self, answer: Answer) -> None:
        answer.headers |= self.headers
        if self.corrupt and answer.body:
            middle = len(answer.body) // 2
            changed = bytes([answer.body[middle] ^ 0xFF])
            answer.body = answer.body[:middle] + changed + answer.body[middle + 1 :]
        if self.cut is not None:
            answer.body = answer.body[: self.cut]


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # closing waits for them, so that no socket is left open
    request_queue_size = 128  # clients connect eight at a time


class Hub(Routes):
    """A running server; `url` is what a client takes for HF_ENDPOINT."""

    def __init__(self, folder: Path, tokens: dict[str, dict[str, Any]] | None = None) -> None:
        self.store = Store(folder)
        self.tokens = tokens or TOKENS
        self.faults: list[Fault] = []
        self.log: list[tuple[str, str, int]] = []  # method, path, status (0: dropped)
        self.stopping = threading.Event()
        self.server = _Server(("127.0.0.1", 0), _handler(self))
        self.port = self.server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.cdn = f"http://localhost:{self.port}/cdn"  # another origin

    def fault(self, **what: Any) -> Fault:
        self.faults.append(Fault(**what))
        return self.faults[-1]

    def take_fault(self, method: str, path: str) -> Fault | None:
        with self.store.lock:
            for fault in self.faults:
                if fault.times and re.fullmatch(fault.method, method) and re.search(fault.path, path):
                    fault.times -= 1
                    fault.seen += 1
                    return fault
        return None

    def writes(self) -> list[tuple[str, str]]:
        """Requests that changed something, since the log was last cleared."""
        reading = re.compile(r"/(validate-yaml|preupload/)")
        return [
            (method, path)
            for method, path, status in self.log
            if method not in ("GET", "HEAD") and 0 < status < 300 and not reading.search(path)
        ]


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def _read(self) -> bytes:
            if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
                chunks = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    chunks.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(chunks)
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))

        def _serve(self) -> None:
            self.close_connection = True  # one request a connection, so that no idle thread outlives a test
            parts = urlsplit(self.path)
            request = Request(
                self.command, parts.path, parse_qs(parts.query, True), self.headers, self._read()
            )
            fault = hub.take_fault(request.method, unquote(parts.path)) or Fault(times=0)
            if fault.before:
                fault.before(hub)
            if fault.delay:
                hub.stopping.wait(fault.delay)
            if fault.status:
                answer = Answer(fault.status, json.dumps({"error": fault.message}).encode())
                answer.headers["X-Error-Message"] = fault.message
                if fault.code:
                    answer.headers["X-Error-Code"] = fault.code
            else:
                answer = Answer(0) if fault.refuse_effect else hub.answer(request)
            fault.spoil(answer)
            dropped = fault.refuse_effect or fault.drop == -1
            hub.log.append((request.method, unquote(parts.path), 0 if dropped else answer.status))
            if not dropped:
                self._send(answer, fault.drop)

        def _send(self, answer: Answer, drop: int | None) -> None:
            try:
                self.send_response(answer.status)
                for name, value in answer.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.body)))
                self.send_header("Connection", "close")
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(answer.body[:drop] if drop is not None else answer.body)
            except OSError:  # the client has gone, which is its right
                pass

        do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    return Handler


@contextmanager
def running_hub(folder: Path) -> Iterator[Hub]:
    """A Hub on a free port, its state in `folder`."""
    hub = Hub(folder)
    thread = threading.Thread(target=hub.server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.stopping.set()
        hub.server.shutdown()
        thread.join()
        hub.server.server_close()


@contextmanager
def loopback(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A running Hub that is this process's HF_ENDPOINT, and a client without token, xet or long waits."""
    clock = time.sleep
    with running_hub(folder / "hub") as hub:
        constants = "huggingface_hub.constants."
        for name, value in {
            "ENDPOINT": hub.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": hub.url + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(folder / "cache"),
            "HF_HUB_DISABLE_XET": True,
            "HF_HUB_DOWNLOAD_TIMEOUT": 0.3,
            "HF_TOKEN_PATH": str(folder / "no-token"),
        }.items():
            monkeypatch.setattr(constants + name, value)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("time.sleep", lambda seconds: clock(min(seconds, 0.01)))  # between retries
        yield hub
