"""What becomes of clients that do not read, or slowly."""

import asyncio
import socket
import time

import pytest
import uvicorn
from starlette.responses import Response
from uvicorn.server import ServerState

from stepgraph.server import stall_limit
from stepgraph.server.sse import EventStream
from stepgraph.server.stall_limit import StallLimitedProtocol

BODY = bytes(48 * 2**20)
"""More than the system's buffers take."""
STALLED_S = 0.3


async def connect(app, state: ServerState) -> tuple[asyncio.Server, socket.socket]:
    """A server for `app`, and a client that has sent it a request."""
    config = uvicorn.Config(app, lifespan="off", log_config=None)
    config.load()
    server = await asyncio.get_running_loop().create_server(
        lambda: StallLimitedProtocol(config, state, app_state={}), "127.0.0.1", 0
    )
    client = socket.create_connection(server.sockets[0].getsockname(), timeout=30)
    client.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    return server, client


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(stall_limit, "_STALLED_S", STALLED_S)


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

    async def serve() -> None:
        state = ServerState()
        server, client = await connect(app, state)
        with client:
            async with asyncio.timeout(20):
                while not state.total_requests and not state.connections:
                    await asyncio.sleep(0.01)
                while state.connections or state.tasks:
                    await asyncio.sleep(0.01)
        assert ended == [True] * stream
        server.close()

    asyncio.run(serve())


def test_a_client_that_reads_slowly_gets_everything() -> None:
    def read(client: socket.socket) -> int:
        num_bytes = 0
        while num_bytes < len(BODY) and (content := client.recv(2**20, socket.MSG_WAITALL)):
            num_bytes += len(content)
            time.sleep(STALLED_S / 10)
        return num_bytes

    async def serve() -> None:
        server, client = await connect(Response(BODY), ServerState())
        with client:
            assert await asyncio.to_thread(read, client) >= len(BODY)
        server.close()

    asyncio.run(serve())
