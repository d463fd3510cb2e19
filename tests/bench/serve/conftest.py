"""What tests of load share: records made by hand, and a server over HTTP."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from sparserve.bench.serve.arrivals import Arrivals
from sparserve.bench.serve.load import Load
from sparserve.bench.serve.records import Record


def a_load(
    rate: float = float("inf"),
    *,
    users: int | None = None,
    count: int | None = None,
    seconds: float | None = None,
    burstiness: float = 1.0,
) -> Load:
    return Load(Arrivals(rate, burstiness), users, count, seconds)


@pytest.fixture(scope="session")
def make_load() -> Callable[..., Load]:
    return a_load


def a_record(
    scheduled: float, times: list[float], *, sent: float | None = None, **fields: object
) -> Record:
    sent = scheduled if sent is None else sent
    ended = times[-1] if times else sent
    return Record(scheduled, sent=sent, ended=ended, times=times, tokens=[1] * len(times), **fields)


@pytest.fixture(scope="session")
def make_record() -> Callable[..., Record]:
    return a_record


@dataclass
class HttpServer:
    """Streams of /v1/completions with as many tokens as asked for, from a thread for each connection."""

    url: str
    usage: bool = True  # send the usage at the end
    status: int = 200
    tail: str = "data: [DONE]\n\n"
    stall: tuple[int, float] = (
        -1,
        0.0,
    )  # of this request, counted from 0, nobody is served for so many seconds
    seconds_per_token: float = 0.0
    bodies: list[dict] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self._answer(json.dumps({"data": [{"id": "a model"}]}).encode(), "application/json")

    def do_POST(self) -> None:
        own: HttpServer = self.server.own
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with own.lock:
            number = len(own.bodies)
            own.bodies.append(body)
            if number == own.stall[0]:
                time.sleep(own.stall[1])
        if own.status != 200:
            self._answer(b'{"error": "too much"}', "application/json", own.status)
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        for place in range(body["max_tokens"]):
            time.sleep(own.seconds_per_token)
            # U+2028 ends a line for Python, and none of an event stream.
            self._send({"choices": [{"text": f" {place}\u2028", "finish_reason": None}]})
        self._send({"choices": [{"text": "", "finish_reason": "length"}]})
        if own.usage:
            used = {"prompt_tokens": len(body["prompt"]), "completion_tokens": body["max_tokens"]}
            self._send({"choices": [], "usage": used})
        self.wfile.write(own.tail.encode())
        self.close_connection = True

    def _send(self, chunk: dict) -> None:
        self.wfile.write(f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n".encode())
        self.wfile.flush()

    def _answer(self, content: bytes, kind: str, status: int = 200) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments: object) -> None:
        pass


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *arguments: object) -> None:
        """Clients that leave are part of the tests."""


@contextmanager
def running() -> Iterator[HttpServer]:
    server = Server(("127.0.0.1", 0), Handler)
    server.own = HttpServer(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server.own
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture
def http_server() -> Iterator[HttpServer]:
    with running() as server:
        yield server
