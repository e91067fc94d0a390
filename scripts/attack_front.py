"""What can one client do to the HTTP front? Attacks it beside a steady stream, one attack after the other.

    python scripts/attack_front.py [--only NAME ...] [--json FILE] [-- FLAGS of stepgraph serve]

Starts `stepgraph serve smollm2`, and prints for each attack the statuses that came back, how long the first and the last reply
took, the front's largest resident memory meanwhile, and the longest time that the stream stood still. That holds the steps of the
attacks' own prompts too, where their requests run. With --only descriptors: how a server that is granted 256 descriptors stands
280 silent connections, and a death of its engine meanwhile.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from typing import Any, NamedTuple

SHORT_LIMITS = ["--header-timeout", "3", "--body-timeout", "3", "--keep-alive-timeout", "3"]
CHAT, COMPLETIONS, RESPONSES = "/v1/chat/completions", "/v1/completions", "/v1/responses"
Attack = tuple[str, int, Callable[[], Any]]
"""A path, how many requests are sent at once, and their body: bytes, or what becomes JSON."""


def messages(number: int, content: str = "x") -> dict[str, Any]:
    """A conversation."""
    return {"messages": [{"role": "user", "content": content}] * number, "max_tokens": 1}


def with_messages(**fields: Any) -> dict[str, Any]:
    """A short conversation, and further fields."""
    return messages(1) | fields


def tools(number: int) -> list[dict[str, Any]]:
    """Functions with some parameters."""
    schema = {"type": "object", "properties": {"a": {"type": "string"}}}
    return [{"type": "function", "function": {"name": f"f{i}", "parameters": schema}} for i in range(number)]


def called(arguments: str) -> dict[str, Any]:
    """A conversation whose last turn called a function."""
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "tool_calls": [call]}],
        "max_tokens": 1,
    }


PARTS = [{"type": "text", "text": "x"}] * 60_000
LISTS = "[" + "[]," * 1_000_000 + "[]]"
ATTACKS: dict[str, Attack] = {
    "16 x 200,000 messages": (CHAT, 16, lambda: messages(200_000)),
    "500,000 unknown fields": (CHAT, 1, lambda: with_messages(**{f"f{i}": 1 for i in range(500_000)})),
    "16 x 6,000 messages": (CHAT, 16, lambda: messages(6000)),
    "16 x 6 MB of text": (CHAT, 16, lambda: messages(1, "word " * 1_200_000)),
    "16 x 6 MB of escapes": (COMPLETIONS, 16, lambda: {"prompt": "\u00e9\n" * 750_000}),
    "16 x 6 MB with an emoji": (RESPONSES, 16, lambda: '{"input": "\U0001f600'.encode() + b"a " * 3_000_000 + b'"}'),
    "16 x 6 MB of token ids": (COMPLETIONS, 16, lambda: {"prompt": [i % 40000 for i in range(1_000_000)]}),
    "16 x 250,000 token ids": (COMPLETIONS, 16, lambda: {"prompt": [i % 40000 for i in range(250_000)]}),
    "16 x 32,000 prompts": (COMPLETIONS, 16, lambda: {"prompt": ["x"] * 32_000}),
    "4,000,000 in each other": (CHAT, 4, lambda: b'{"messages": ' + b"[" * 4_000_000),
    "8 x 1,500 tools": (CHAT, 8, lambda: with_messages(tools=tools(1500))),
    "8 x 1,500 tools, forced": (CHAT, 8, lambda: with_messages(tools=tools(1500), tool_choice="required")),
    "8 x 30,000 stop strings": (CHAT, 8, lambda: with_messages(stop=["x" * 100] * 30_000)),
    "8 x 15,000 logit biases": (CHAT, 8, lambda: with_messages(logit_bias={str(i): 1 for i in range(15_000)})),
    "8 x 250,000 allowed ids": (CHAT, 8, lambda: with_messages(allowed_token_ids=list(range(250_000)))),
    "8 x 30,000 bad words": (CHAT, 8, lambda: with_messages(bad_words=["x" * 100] * 30_000)),
    "8 x 16 stop strings of 1,024": (CHAT, 8, lambda: with_messages(stop=["a" * 1023 + chr(98 + i) for i in range(16)])),
    "8 x 1,000,000 values as arguments": (CHAT, 8, lambda: called(LISTS)),
    "8 x 1,000,000 values as a schema": (CHAT, 8, lambda: with_messages(guided_json=LISTS)),
    "8 x 60,000 content parts": (CHAT, 8, lambda: {"messages": [{"role": "user", "content": PARTS}]}),
    "8 x 6,000 input items": (RESPONSES, 8, lambda: {"input": [{"role": "user", "content": "x"}] * 6000}),
    "8 x /tokenize 100 kB": ("/tokenize", 8, lambda: {"prompt": "some words " * 9_000, "return_token_strs": True}),
    "8 x /tokenize one word": ("/tokenize", 8, lambda: {"prompt": "a" * 100_000}),
    "8 x /tokenize spaces": ("/tokenize", 8, lambda: {"prompt": " " * 100_000}),
    "8 x /detokenize 250,000": ("/detokenize", 8, lambda: {"tokens": [i % 40000 for i in range(250_000)]}),
    "prompt_logprobs of 2,000 tokens": (
        COMPLETIONS,
        1,
        lambda: {"prompt": [5 + i % 40000 for i in range(2000)], "max_tokens": 1, "prompt_logprobs": 20},
    ),
    "numbers of 30 and of 5,000 digits": (CHAT, 8, lambda: b'{"messages": [], "max_tokens": 1' + b"0" * 5000 + b"}"),
}  # fmt: skip
HALVES = {
    "200 silent connections": b"",
    "200 half headers": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-A",
    "200 half bodies": b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 999\r\n\r\n{",
}
"""What connections send that then send nothing more."""


class Outcome(NamedTuple):
    """Of one attack."""

    attack: str
    statuses: dict[str, int]
    first_s: float
    last_s: float
    peak_mib: float
    gap_s: float


class Server:
    """`stepgraph serve`, until `stop`."""

    def __init__(self, flags: list[str], *, max_descriptors: int | None = None):
        def limit() -> None:
            if max_descriptors is not None:
                resource.setrlimit(resource.RLIMIT_NOFILE, (max_descriptors, max_descriptors))

        self.process = subprocess.Popen(
            [sys.executable, "-m", "stepgraph.server", "--model", "smollm2", "--port", "0", *flags],
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=limit,
        )
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if found := re.search(r"at http://\S+:(\d+) ", line):
                self.port = int(found[1])
                break
        else:
            raise SystemExit("the server did not start")

    def mib(self, name: str = "VmRSS") -> float:
        """The front's memory."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        found = re.search(rf"{name}:\s+(\d+)", status)
        return int(found[1]) / 1024 if found else 0.0

    def engine_pid(self) -> int:
        """Of the engine's process."""
        for pid in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            if b"engine_process" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
        raise SystemExit("there is no engine")

    def request(self, path: str, body: bytes | None = None, timeout_s: float = 300) -> str:
        """The status of a reply, or how it failed."""
        connection = HTTPConnection("127.0.0.1", self.port, timeout=timeout_s)
        try:
            method = "GET" if body is None else "POST"
            connection.request(method, path, body, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            reply.read()
            return str(reply.status)
        except ConnectionError:  # refused while the body was sent; clients that read first see the status
            return "cut off"
        except (OSError, HTTPException) as error:
            return type(error).__name__
        finally:
            connection.close()

    def stop(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait(timeout=60)


def listen(port: int) -> None:
    """In a process of its own: read a stream until standard input ends, then print the longest time between two events."""
    done = threading.Event()
    threading.Thread(target=lambda: (sys.stdin.read(), done.set()), daemon=True).start()
    connection = HTTPConnection("127.0.0.1", port, timeout=600)
    body = {"prompt": "Once upon a time", "max_tokens": 7000, "ignore_eos": True, "stream": True}
    connection.request("POST", COMPLETIONS, json.dumps(body), {"Content-Type": "application/json"})
    reply, last, gap = connection.getresponse(), 0.0, 0.0
    while not done.is_set():
        if not reply.readline().startswith(b"data: "):
            continue
        now = time.monotonic()
        if not last:
            print("begun", flush=True)
        gap, last = max(gap, now - last if last else 0.0), now
    print(gap, flush=True)


@contextmanager
def neighbour(server: Server) -> Iterator[list[float]]:
    """A steady stream meanwhile; at the end the list has its longest gap."""
    process = subprocess.Popen(
        [sys.executable, __file__, "--listen", str(server.port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdout.readline()
    gaps: list[float] = []
    time.sleep(1)
    yield gaps
    time.sleep(1)
    process.stdin.close()
    gaps.append(float(process.stdout.readline()))
    process.wait()


def attack(server: Server, name: str, send: Callable[[], list[tuple[str, float]]]) -> Outcome:
    """Do it beside a stream. `send` returns what came back, and after how long."""
    peak, over = server.mib(), threading.Event()

    def watch() -> None:
        nonlocal peak
        while not over.wait(0.02):
            peak = max(peak, server.mib())

    with neighbour(server) as gaps:
        watching = threading.Thread(target=watch)
        watching.start()
        replies = send()
        over.set()
        watching.join()
    times = [seconds for _, seconds in replies]
    outcome = Outcome(name, dict(Counter(status for status, _ in replies)), min(times), max(times), peak, gaps[0])
    statuses = ", ".join(f"{count} x {status}" for status, count in outcome.statuses.items())
    print(
        f"| {name} | {statuses} | {outcome.first_s:.2f} | {outcome.last_s:.2f} | {peak:.0f} | {outcome.gap_s:.3f} |",
        flush=True,
    )
    return outcome


def requests(server: Server, path: str, number: int, body: Any) -> list[tuple[str, float]]:
    """Send so many at once."""
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    def one(_: int) -> tuple[str, float]:
        began = time.monotonic()
        return server.request(path, content), time.monotonic() - began

    with ThreadPoolExecutor(number) as threads:
        return list(threads.map(one, range(number)))


def halves(server: Server, content: bytes) -> list[tuple[str, float]]:
    """Open 200 connections that send no whole request, and see how long they are kept."""
    began = time.monotonic()
    clients = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(200)]
    for client in clients:
        client.sendall(content)
    found = []
    for client in clients:
        try:
            reply = client.recv(4096)
            found.append((reply.split()[1].decode() if reply else "closed", time.monotonic() - began))
        except TimeoutError:
            found.append(("still open", time.monotonic() - began))
        client.close()
    return found


def descriptors(flags: list[str]) -> None:
    """280 silent connections to a server that is granted 256 descriptors, whose engine is killed."""
    server = Server(flags, max_descriptors=256)
    try:
        silent = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(280)]
        time.sleep(1)
        print("a request beside 280 silent connections:", server.request("/health"))
        os.kill(server.engine_pid(), signal.SIGKILL)
        began = time.monotonic()
        body = b'{"prompt": "x", "max_tokens": 1}'
        while (status := server.request(COMPLETIONS, body)) != "200":
            assert time.monotonic() - began < 120, "the engine is not started again"
            silent += [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(20)]
            time.sleep(0.2)
        print(f"after the engine was killed: served again in {time.monotonic() - began:.1f} s, status {status}")
    finally:
        server.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", help="parts of the names of attacks")
    parser.add_argument("--json", metavar="FILE", help="write the results here")
    parser.add_argument("--listen", type=int, help=argparse.SUPPRESS)
    parser.add_argument("flags", nargs="*", help="of the server")
    args = parser.parse_args()
    if args.listen is not None:
        return listen(args.listen)
    if args.only == ["descriptors"]:
        return descriptors(args.flags)
    server = Server([*SHORT_LIMITS, *args.flags])
    try:
        print(f"front at rest: {server.mib():.0f} MiB\n")
        print("| attack | replies | first s | last s | peak MiB | gap s |\n| --- | --- | --- | --- | --- | --- |")
        outcomes = [attack(server, "nothing", lambda: (time.sleep(3), [("none", 3.0)])[1])]
        for name, (path, number, make) in ATTACKS.items():
            if args.only is None or any(part in name for part in args.only):
                content = make()
                outcomes.append(attack(server, name, lambda: requests(server, path, number, content)))  # noqa: B023
        for name, half in HALVES.items():
            if args.only is None or any(part in name for part in args.only):
                outcomes.append(attack(server, name, lambda: halves(server, half)))  # noqa: B023
        print(f"\nfront: largest {server.mib('VmHWM'):.0f} MiB, at the end {server.mib():.0f} MiB")
        if args.json:
            Path(args.json).write_text(json.dumps([outcome._asdict() for outcome in outcomes], indent=1))
    finally:
        server.stop()


if __name__ == "__main__":
    main()
