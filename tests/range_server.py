"""A web server for one folder that answers range requests, and misbehaves as it is told."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from onefold.data.remote_files import HTTP_CONNECTIONS

Fault = Callable[[str, int], str]  # (path, number of the request) -> "", "503", "slow", "short", "corrupt", "404"


class RangeServer(ThreadingHTTPServer):
    """Counts requests by path; `fault` says what is wrong with each answer."""

    daemon_threads = False  # closing waits for them, so that no socket is left

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.requests, self.fault = folder, Counter[str](), _none
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news."""


def _none(path: str, number: int) -> str:
    return ""


def seldom(share: float, kinds: tuple[str, ...], seed: int = 0) -> Fault:
    """Each of the faults in turn, at random, in `share` of the answers."""
    rng = random.Random(seed)
    return lambda path, number: rng.choice(kinds) if rng.random() < share else ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: RangeServer
    timeout = 2

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        with self.server.lock:
            self.server.requests[self.path] += 1
            fault = self.server.fault(self.path, sum(self.server.requests.values()))
        path = self.server.folder / self.path.lstrip("/")
        if fault in ("503", "404") or not path.is_file():
            return self.send_error(int(fault or 404))
        whole = path.read_bytes()
        first, last = (int(n) for n in self.headers["Range"].removeprefix("bytes=").split("-"))
        body = bytearray(whole[first : last + 1])
        if fault == "corrupt" and body:
            body[len(body) // 2] ^= 0x10
        self.send_response(206)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{len(whole)}")
        self.end_headers()
        if fault == "short":
            self.wfile.write(body[: len(body) // 2])
            self.close_connection = True
            return None
        if fault == "slow":
            time.sleep(0.6)
        self.wfile.write(body)
        return None


@contextmanager
def serving(folder: Path) -> Iterator[RangeServer]:
    server = RangeServer(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        HTTP_CONNECTIONS.close()
        server.shutdown()
        server.server_close()
        thread.join()
