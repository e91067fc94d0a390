"""What becomes of clients that keep the server waiting: that send nothing, or half, or do not read."""

import asyncio
import logging
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from functools import partial

import pytest
import uvicorn
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from uvicorn.server import ServerState

from stepgraph.server.connections import Connection, Connections, End, Limits
from stepgraph.server.log_limit import LogLimit, is_refused_access, shorten_path
from stepgraph.server.sse import EventStream

try:
    import uvloop
except ImportError:
    LOOPS = [asyncio.new_event_loop]
else:
    LOOPS = [asyncio.new_event_loop, uvloop.new_event_loop]

BODY = bytes(48 * 2**20)
"""More than the system's buffers take."""
LONG_S = 60.0
SHORT_S = 0.2
LIMITS = Limits(max_head_bytes=65536, header_s=LONG_S, body_s=LONG_S, idle_s=LONG_S, stall_s=LONG_S)
GET = b"GET / HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n"


async def echo(scope, receive, send) -> None:
    """Replies with the body, or OK."""
    body = await Request(scope, receive).body()
    await PlainTextResponse(body or b"OK")(scope, receive, send)


class Server:
    """One that serves `app` in this process."""

    def __init__(self, app, limits: Limits, max_open: int):
        self.shared = Connections(limits, max_open)
        self.state = ServerState()
        config = uvicorn.Config(app, lifespan="off", ws="none", log_config=None)
        config.load()
        self.make = partial(Connection, config, self.state, {}, shared=self.shared)
        self.port = 0
        self._writers: list[asyncio.StreamWriter] = []

    async def client(self, content: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(content)
        self._writers.append(writer)  # which would close its connection as garbage
        return reader, writer

    def stuck(self, content: bytes = GET) -> socket.socket:
        """A client that does not read unless told to."""
        client = socket.create_connection(("127.0.0.1", self.port), timeout=30)
        client.sendall(content)
        return client

    async def until(self, holds: Callable[[], object]) -> None:
        async with asyncio.timeout(30):
            while not holds():
                await asyncio.sleep(0.005)


@asynccontextmanager
async def serving(app=echo, *, max_open: int = 100, **limits):
    server = Server(app, replace(LIMITS, **limits), max_open)
    listening = await asyncio.get_running_loop().create_server(server.make, "127.0.0.1", 0)
    server.port = listening.sockets[0].getsockname()[1]
    try:
        yield server
    finally:
        listening.close()
        for connection in tuple(server.state.connections):
            connection.transport.abort()
        await asyncio.sleep(0)


def run(test: Callable[[], Awaitable[None]], loop_factory=LOOPS[-1]) -> None:
    with asyncio.Runner(loop_factory=loop_factory) as runner:
        runner.run(test())


@pytest.mark.parametrize(
    ("sent", "limit", "reason", "reply"),
    [
        (b"", "idle_s", End.IDLE, b""),
        (b"GET / HTTP/1.1\r\nHo", "header_s", End.HEADERS_LATE, b"HTTP/1.1 408 "),
        (POST + b"ab", "body_s", End.BODY_LATE, b"HTTP/1.1 408 "),
        (GET, "idle_s", End.IDLE, b"HTTP/1.1 200 "),
        (GET + b"GET / HT", "header_s", End.HEADERS_LATE, b"HTTP/1.1 200 "),
    ],
)
def test_two_hundred_that_keep_the_server_waiting_do_not_outlive_their_limit(sent, limit, reason, reply) -> None:
    async def test() -> None:
        async with serving(max_open=500, **{limit: SHORT_S}) as server:
            clients = [await server.client(sent) for _ in range(200)]
            async with asyncio.timeout(30):
                replies = [await reader.read() for reader, _ in clients]
            assert all(content.startswith(reply) and bool(content) == bool(reply) for content in replies)
            assert server.shared.ended[reason] == 200
            assert server.shared.num_open == 0

    run(test)


def test_trickling_does_not_prolong_a_limit() -> None:
    async def test() -> None:
        async with serving(header_s=SHORT_S) as server:
            reader, writer = await server.client(b"GET / HTTP/1.1\r\n")
            async with asyncio.timeout(30):
                while not reader.at_eof() and not server.shared.ended[End.HEADERS_LATE]:
                    writer.write(b"A: b\r\n")
                    await asyncio.sleep(SHORT_S / 20)

    run(test)


def test_who_waits_for_an_answer_is_waited_for() -> None:
    async def slow(scope, receive, send) -> None:
        await asyncio.sleep(4 * SHORT_S)
        await echo(scope, receive, send)

    async def test() -> None:
        async with serving(slow, idle_s=SHORT_S, header_s=SHORT_S, body_s=SHORT_S) as server:
            reader, _ = await server.client(GET + POST + b"abcd")  # the second waits for the first
            content = await reader.read()
            assert content.count(b"HTTP/1.1 200 OK") == 2
            assert content.endswith(b"abcd")

    run(test)


def test_a_body_that_is_answered_early_has_its_limit_all_the_same() -> None:
    async def test() -> None:
        async with serving(Response(status_code=401), body_s=SHORT_S) as server:
            reader, _ = await server.client(POST + b"ab")
            assert (await reader.read()).startswith(b"HTTP/1.1 401 ")
            assert server.shared.ended[End.BODY_LATE] == 1

    run(test)


def test_a_body_answered_early_leaves_its_connection_to_the_next_request() -> None:
    async def test() -> None:
        async with serving(Response(status_code=401), idle_s=SHORT_S) as server:
            reader, writer = await server.client(POST + b"ab")
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"cd" + GET)
            assert (await reader.read()).startswith(b"HTTP/1.1 401 ")
            assert server.shared.ended[End.IDLE] == 1

    run(test)


def test_the_longest_silent_makes_way_for_a_new_connection() -> None:
    async def test() -> None:
        gate = asyncio.Event()

        async def gated(scope, receive, send) -> None:
            await gate.wait()
            await echo(scope, receive, send)

        async with serving(gated, max_open=3) as server:
            answered, _ = await server.client(GET)
            await server.until(lambda: server.state.tasks)
            first, _ = await server.client(b"GET")
            await server.until(lambda: server.shared.num_open == 2)
            second, _ = await server.client()
            await server.until(lambda: server.shared.num_open == 3)
            new, _ = await server.client(GET)
            assert await first.read() == b""  # not the one that is being answered, which is older
            await server.until(lambda: len(server.state.tasks) == 2)
            newer, _ = await server.client(GET)
            assert await second.read() == b""
            await server.until(lambda: len(server.state.tasks) == 3)
            refused, _ = await server.client(GET)
            assert (await refused.read()).startswith(b"HTTP/1.1 503 ")
            gate.set()
            for reader in (answered, new, newer):
                assert (await reader.readuntil(b"OK")).startswith(b"HTTP/1.1 200 OK")
            assert server.shared.ended[End.MADE_WAY] == 2
            assert server.shared.ended[End.REFUSED] == 1
            assert server.shared.num_open == 3

    run(test)


def test_who_reads_nothing_makes_way_too_before_the_limit_for_that() -> None:
    async def large_first(scope, receive, send) -> None:
        content = BODY if scope["path"] == "/large" else b"OK"
        await Response(content)(scope, receive, send)

    async def test() -> None:
        async with serving(large_first, max_open=2) as server:
            stuck = server.stuck(GET.replace(b"/ ", b"/large "))
            await server.until(lambda: any(connection.cycle for connection in server.shared._waiting))
            reading, _ = await server.client(GET.replace(b"/ ", b"/large "))
            await server.until(lambda: server.shared.num_open == 2)
            new, _ = await server.client(GET)
            assert (await new.readuntil(b"OK")).startswith(b"HTTP/1.1 200 OK")
            assert server.shared.ended[End.MADE_WAY] == 1
            received = await reading.readuntil(b"\r\n\r\n")
            assert received.startswith(b"HTTP/1.1 200 OK")
            assert await reading.readexactly(len(BODY)) == BODY
            stuck.close()

    run(test)


def test_headers_that_do_not_end_end_their_connection() -> None:
    async def test() -> None:
        async with serving(max_head_bytes=1000) as server:
            reader, writer = await server.client(b"GET / HTTP/1.1\r\n")
            await server.until(lambda: server.shared.num_open)
            await asyncio.sleep(0.02)
            writer.write(b"A: bcdef\r\n" * 200)
            assert (await reader.read()).startswith(b"HTTP/1.1 400 ")
            assert server.shared.ended[End.HEADERS_TOO_LARGE] == 1

    run(test)


@pytest.mark.parametrize("loop_factory", LOOPS)
@pytest.mark.parametrize("version", [b"1.1", b"1.0"])
def test_a_client_that_ends_its_side_after_the_request_is_answered(loop_factory, version) -> None:
    async def slow(scope, receive, send) -> None:
        await asyncio.sleep(0.2)
        await echo(scope, receive, send)

    async def test() -> None:
        async with serving(slow) as server:
            reader, writer = await server.client(GET.replace(b"1.1", version))
            writer.write_eof()
            content = await reader.read()
            interim = b"HTTP/1.1 100 Continue\r\n\r\n"
            assert content.replace(interim, b"").startswith(b"HTTP/1.1 200 OK\r\n")
            assert content.endswith(b"OK")
            assert (interim in content) == (version == b"1.1")

    run(test, loop_factory)


@pytest.mark.parametrize("loop_factory", LOOPS)
@pytest.mark.parametrize("how", ["close", "shutdown"])
def test_a_client_that_leaves_altogether_is_still_found_out(loop_factory, how) -> None:
    left = []

    async def wait(scope, receive, send) -> None:
        await receive()
        left.append((await receive())["type"])

    async def test() -> None:
        async with serving(wait) as server:
            client = server.stuck()
            await server.until(lambda: server.state.tasks)
            client.close() if how == "close" else client.shutdown(socket.SHUT_RDWR)
            await server.until(lambda: left)
            assert left == ["http.disconnect"]
            client.close()

    run(test, loop_factory)


def test_half_a_request_of_a_client_that_ended_its_side_is_not_waited_for() -> None:
    async def test() -> None:
        async with serving() as server:
            reader, writer = await server.client(POST + b"ab")
            writer.write_eof()
            assert await reader.read() == b""
            await server.until(lambda: server.shared.num_open == 0)

    run(test)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_reads_nothing_loses_its_connection(stream) -> None:
    ended = []

    async def events():
        try:
            while True:
                await asyncio.sleep(0.001)
                yield BODY
        finally:
            ended.append(True)

    async def app(scope, receive, send) -> None:
        whole = Response(BODY)
        streamed = EventStream(events(), failed=lambda failure: failure.body(), request_id="r1")
        await (streamed if stream else whole)(scope, receive, send)

    async def test() -> None:
        async with serving(app, stall_s=SHORT_S) as server:
            with server.stuck():
                await server.until(lambda: server.shared.ended[End.STALLED])
                await server.until(lambda: not server.state.connections and not server.state.tasks)
        assert ended == [True] * stream

    run(test)


def test_a_client_that_reads_slowly_gets_everything() -> None:
    def read(client: socket.socket) -> int:
        num_bytes = 0
        while num_bytes < len(BODY) and (content := client.recv(2**20, socket.MSG_WAITALL)):
            num_bytes += len(content)
            time.sleep(SHORT_S / 10)
        return num_bytes

    async def test() -> None:
        async with serving(Response(BODY), stall_s=SHORT_S) as server:
            with server.stuck() as client:
                assert await asyncio.to_thread(read, client) >= len(BODY)

    run(test)


def test_progress_that_only_the_system_sees_keeps_a_slow_reader() -> None:
    """What it takes comes from the socket's buffer; the transport waits with as much as before."""

    async def test() -> None:
        async with serving(Response(BODY), stall_s=LONG_S) as server:
            with server.stuck() as client:
                await server.until(lambda: any(one.flow.write_paused for one in server.state.connections))
                [connection] = server.state.connections
                await asyncio.sleep(0.05)
                before, waiting = connection._num_unread_bytes(), connection.transport.get_write_buffer_size()
                assert before > waiting
                while connection._num_unread_bytes() == before:
                    client.recv(65536)
                    await asyncio.sleep(0)
                connection._look(before)
                assert not connection.transport.is_closing()
                connection._look(connection._num_unread_bytes())
                assert connection.transport.is_closing()

    run(test)


def record(message: str, *args) -> logging.LogRecord:
    return logging.LogRecord("x", logging.INFO, "x", 1, message, args, None)


def test_lines_of_requests_without_a_key_are_limited_and_counted(monkeypatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    limit = LogLimit(is_refused_access, max_lines=3, span_s=10)
    line = '%s - "%s %s HTTP/%s" %d'

    def passes(status: int) -> bool:
        return limit.filter(record(line, "1.2.3.4:5", "GET", "/", "1.1", status))

    assert [passes(401) for _ in range(50)] == [True] * 3 + [False] * 47
    assert all(passes(200) for _ in range(50))
    now += 11
    again = record(line, "1.2.3.4:5", "GET", "/", "1.1", 401)
    assert limit.filter(again)
    assert again.getMessage().endswith("401 (47 more such lines were left out)")
    assert [passes(401) for _ in range(3)] == [True, True, False]
    now += 1000
    last = record(line, "1.2.3.4:5", "GET", "/", "1.1", 401)
    limit.filter(last)
    assert "(1 more" in last.getMessage()


def test_a_line_of_the_access_log_is_no_longer_than_a_line() -> None:
    line = record('%s - "%s %s HTTP/%s" %d', "1.2.3.4:5", "GET", "/" + "x" * 60000, "1.1", 404)
    assert shorten_path(line)
    assert len(line.getMessage()) < 400
