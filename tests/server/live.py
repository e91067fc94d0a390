"""A server in processes of its own, started as a user starts it."""

import http.client
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai
from forked_processes import FORKED
from published import ReplyCheck

START_S = 120
TINY_FLAGS = shlex.split(
    "--device cpu --dtype float32 --max-num-seqs 8 --max-num-batched-tokens 48 --capture-sizes 8 48 --capture-rows 8 "
    "--num-kv-blocks 257"
)
"""For the model of `tiny.py`, as its TINY_SETTINGS."""


def free_ports(count: int) -> list[int]:
    """Ports nobody listens on."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [sock.getsockname()[1] for sock in sockets]
    for sock in sockets:
        sock.close()
    return ports


@dataclass
class Reply:
    """Of one HTTP request."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


@dataclass
class LiveServer:
    """A running `stepgraph serve`."""

    process: subprocess.Popen
    port: int = 0
    output: list[str] = field(default_factory=list)
    """Lines of stdout and stderr."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self, **options) -> openai.OpenAI:
        http = openai.DefaultHttpxClient(transport=_CheckedTransport())
        return openai.OpenAI(**self._of_client(options), http_client=http)

    def async_client(self, **options) -> openai.AsyncOpenAI:
        http = openai.DefaultAsyncHttpxClient(transport=_CheckedAsyncTransport())
        return openai.AsyncOpenAI(**self._of_client(options), http_client=http)

    def _of_client(self, options: dict[str, Any]) -> dict[str, Any]:
        return {"base_url": f"{self.url}/v1", "api_key": "none", "max_retries": 0, "timeout": 120} | options

    def request(self, method: str, path: str, body: Any = None, headers: dict[str, str] | None = None) -> Reply:
        """One request on a connection of its own; `body` is sent as JSON unless it is bytes. The reply is held against the
        published schema, as all is that clients get."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
            connection.request(method, path, content, {"Content-Type": "application/json", **(headers or {})})
            reply = connection.getresponse()
            found = Reply(reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read())
            check = ReplyCheck(path, found.status, found.headers.get("content-type", ""))
            check.feed(found.body)
            check.end()
            return found
        finally:
            connection.close()

    def get(self, path: str, **options) -> Reply:
        return self.request("GET", path, **options)

    def post(self, path: str, body: Any, **options) -> Reply:
        return self.request("POST", path, body, **options)

    def metric(self, name: str, **labels: str) -> float:
        """Sum of the samples of this name (with stepgraph: in front) that have these labels."""
        total, found = 0.0, False
        for line in self.get("/metrics").body.decode().splitlines():
            match = re.fullmatch(r"stepgraph:(\w+)(?:\{(.*)\})? (\S+)(?: \S+)?", line)
            if (
                match
                and match[1] == name
                and all(f'{key}="{value}"' in (match[2] or "") for key, value in labels.items())
            ):
                total, found = total + float(match[3]), True
        assert found, f"no sample of {name} with {labels}"
        return total

    def engine_pid(self) -> int:
        """Of the engine's process, a child of the server's."""
        [pid] = self.pids("engine_process")
        return pid

    def pids(self, module: str) -> list[int]:
        """Of the server's children that run a module, the oldest first."""
        children = subprocess.run(
            ["ps", "--ppid", str(self.process.pid), "-o", "pid=,comm=,args="],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        return sorted(int(line.split()[0]) for line in children.splitlines() if module in line)

    def wait_idle(self) -> None:
        """Wait until the engine holds no request."""
        self.wait_for(lambda: self.get("/load").json == {"server_load": 0} and self.metric("num_requests_running") == 0)

    def wait_for(self, condition, timeout_s: float = 60) -> None:
        """Poll until it holds, which must happen."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline, "the condition never held; output:\n" + "".join(self.output)
            time.sleep(0.05)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End it; returns its exit code."""
        self.process.send_signal(number)
        return self.process.wait(timeout=60)


class _CheckedTransport(httpx2.HTTPTransport):
    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = super().handle_request(request)
        response.stream = _CheckedStream(response, request.url.path)
        return response


class _CheckedAsyncTransport(httpx2.AsyncHTTPTransport):
    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        response = await super().handle_async_request(request)
        response.stream = _CheckedStream(response, request.url.path)
        return response


class _CheckedStream(httpx2.SyncByteStream, httpx2.AsyncByteStream):
    def __init__(self, response: httpx2.Response, path: str):
        self._stream = response.stream
        self._check = ReplyCheck(path, response.status_code, response.headers.get("content-type", ""))

    def __iter__(self) -> Iterator[bytes]:
        for content in self._stream:
            self._check.feed(content)
            yield content
        self._check.end()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for content in self._stream:
            self._check.feed(content)
            yield content
        self._check.end()

    def close(self) -> None:
        self._stream.close()

    async def aclose(self) -> None:
        await self._stream.aclose()


@contextmanager
def running_server(
    model: str, flags: Sequence[str] = (), *, wait_ready: bool = True, **environment: str
) -> Iterator[LiveServer]:
    """Start a server on a free port; it is ended with the block. One with a PYTHONPATH of its own imports everything anew."""
    forks = FORKED is not None and "PYTHONPATH" not in environment
    process = (FORKED if forks else subprocess).Popen(
        [sys.executable, "-m", "stepgraph.server", "--model", model, "--port", "0", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "PYTHONUNBUFFERED": "1", **environment},
    )
    server = LiveServer(process)
    reader = threading.Thread(target=lambda: server.output.extend(process.stdout), daemon=True)
    reader.start()
    try:
        deadline = time.monotonic() + START_S
        while wait_ready:
            if found := re.search(r"serves .* at http://\S+:(\d+) ", "".join(server.output)):
                server.port = int(found[1])
                break
            assert process.poll() is None, "the server ended:\n" + "".join(server.output)
            assert time.monotonic() < deadline, "the server does not start:\n" + "".join(server.output)
            time.sleep(0.05)
        yield server
    finally:
        process.kill()
        process.wait()
        reader.join(timeout=10)
