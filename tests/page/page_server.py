"""A server that says what a test wants: the page's own files, and scripted steps and answers."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import Queue
from typing import Any

UI = Path(__file__).parents[2] / "stepgraph" / "server" / "ui"
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
POLICY = "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; object-src 'none'"
ENGINE = {
    "model": "fake",
    "version": "1.2.3",
    "device": "cpu",
    "backend": "cpu",
    "max_num_seqs": 8,
    "max_num_batched_tokens": 256,
    "num_kv_blocks": 100,
    "block_size": 16,
}
GRAPHS = {
    "steps": 7,
    "eager_steps": 1,
    "eager_reasons": {"memory_budget": 1},
    "real_tokens": 300,
    "padding_tokens": 20,
    "bytes": 3 << 20,
    "graphs": [
        {
            "num_tokens": tokens,
            "num_rows": rows,
            "num_drafts": 0,
            "variant": "plain",
            "capture_ms": 1.5,
            "bytes": 1 << 20,
        }
        | {"uses": uses, "real_tokens": uses * tokens, "padding_tokens": uses}
        for tokens, rows, uses in ((1, 1, 5), (256, 4, 1), (8, 8, 0))
    ],
}


def step(n: int, **changed: Any) -> dict[str, Any]:
    """A step as the server tells of it: a decode of one token, the n-th of steps that take 8 of 10 ms."""
    start = n / 100
    return {
        "n": n,
        "engine": 0,
        "start": start,
        "plan_start": start - 0.001,
        "plan_us": 400,
        "read_us": 200,
        "host_us": 600,
        "device_us": 8000,
        "kind": "decode",
        "graph": "1x1",
        "reason": None,
        "tokens": 1,
        "rows": 1,
        "padding": 0,
        "proposed": 0,
        "accepted": 0,
        "prompts": 0,
        "requests": [[1, 1]],
    } | changed


def request(number: int, **changed: Any) -> dict[str, Any]:
    """A request that was answered."""
    return {
        "id": number,
        "name": f"chatcmpl-{number:08x}{0:024x}",
        "engine": 0,
        "arrived": number / 10,
        "scheduled": number / 10 + 0.02,
        "first_token": number / 10 + 0.1,
        "finished": number / 10 + 0.5,
        "prompt_tokens": 80,
        "cached_tokens": 16,
        "output_tokens": 41,
        "state": "finished",
        "finish_reason": "stop",
    } | changed


def chunks(*deltas: dict[str, Any], reason: str = "stop") -> list[dict[str, Any]]:
    """An answer of the chat, as it is streamed."""
    head = {"id": "chatcmpl-0a1b2c3d4e5f60718293a4b5c6d7e8f9", "usage": None}
    texts = [head | {"choices": [{"index": 0, "delta": delta, "finish_reason": None}]} for delta in deltas]
    end = head | {"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]}
    usage = head | {"choices": [], "usage": {"prompt_tokens": 12, "completion_tokens": len(deltas)}}
    return [*texts, end, usage]


class FakeServer:
    """What the page talks to in tests that need no model.

    Attributes:
        api_key: what opens it, if anything does.
        answer: what it streams for a chat; after the last chunk it goes on if `ends`, else it waits until the client leaves.
        chats: the bodies of the chats that it was sent.
        num_engines: whose steps it tells of.
        left: has something in it for each client that left before its answer ended.
    """

    def __init__(self, port: int = 0):
        self.api_key: str | None = None
        self.answer: Sequence[dict[str, Any]] = chunks({"content": "Hello."})
        self.ends = True
        self.chats: list[dict[str, Any]] = []
        self.left: Queue[bool] = Queue()
        self.said: list[dict[str, Any]] = []
        self.num_engines = 1
        self._readers: list[Queue[bytes | None]] = []
        self._lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", port), type("Handler", (_Handler,), {"fake": self}))
        self._http.daemon_threads = True
        self.port = self._http.server_address[1]
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def say(self, *messages: dict[str, Any]) -> None:
        """Tell all who read the events, and all who will."""
        with self._lock:
            self.said += messages
            for reader in self._readers:
                for message in messages:
                    reader.put(_event(message))

    def read_events(self) -> Iterator[bytes]:
        """The stream of one reader."""
        queue: Queue[bytes | None] = Queue()
        with self._lock:
            for message in (
                {"type": "hello", "clock": 1.8e9, "engine": ENGINE, "engines": [ENGINE] * self.num_engines},
                *self.said,
            ):
                queue.put(_event(message))
            self._readers.append(queue)
        while (content := queue.get()) is not None:
            yield content

    def close(self) -> None:
        """Stop, and leave all clients."""
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()
        with self._lock:
            for reader in self._readers:
                reader.put(None)


def _event(message: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(message).encode() + b"\n\n"


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer

    def log_message(self, *_: Any) -> None:
        """Nothing to stderr."""

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        file = UI / ("index.html" if path == "/" else path.removeprefix("/ui/"))
        if path == "/" or (path.startswith("/ui/") and file.is_file()):
            self._send(200, file.read_bytes(), TYPES[file.suffix])
        elif not self._is_open():
            self._send_json({"error": {"message": "the API key is missing or wrong"}}, 401)
        elif path == "/ui/events":
            self._stream(self.fake.read_events())
        elif path == "/v1/models":
            self._send_json({"data": [{"id": "fake"}]})
        elif path == "/graphs":
            each = [GRAPHS | {"graphs": GRAPHS["graphs"][:number]} for number in range(self.fake.num_engines)]
            self._send_json(GRAPHS | ({"engines": each} if len(each) > 1 else {}))
        elif path == "/ui/trace":
            self._send_json({"traceEvents": [{"name": "step", "ph": "X", "ts": 0, "dur": 1, "pid": 1, "tid": 1}]})
        else:
            self._send_json({"error": {"message": "not found"}}, 404)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_open():
            self._send_json({"error": {"message": "the API key is missing or wrong"}}, 401)
            return
        self.fake.chats.append(body)
        self._stream(self._answer())

    def _answer(self) -> Iterator[bytes]:
        try:
            yield from map(_event, self.fake.answer)
            while not self.fake.ends:
                yield b": nothing new\n\n"
                threading.Event().wait(0.02)  # until the client is found to have left
            yield b"data: [DONE]\n\n"
        except GeneratorExit:
            self.fake.left.put(True)
            raise

    def _is_open(self) -> bool:
        key = self.fake.api_key
        return key is None or self.headers.get("Authorization") == f"Bearer {key}"

    def _send_json(self, content: Any, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), "application/json")

    def _send(self, status: int, content: bytes, media_type: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", media_type)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Content-Security-Policy", POLICY)
        self.end_headers()
        self.wfile.write(content)

    def _stream(self, contents: Iterator[bytes]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        try:
            for content in contents:
                self.wfile.write(content)
                self.wfile.flush()
        except OSError:  # the client has left
            contents.close()


@contextmanager
def running_fake(port: int = 0) -> Iterator[FakeServer]:
    """A fake that ends with the block."""
    fake = FakeServer(port)
    try:
        yield fake
    finally:
        fake.close()
