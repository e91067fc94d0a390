"""Requests whose reply is never begun: they end in the engine all the same."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
from observed import one_engine, service

from stepgraph.config.server import ServerConfig
from stepgraph.server.app import create_app
from stepgraph.server.counts import FrontCounts
from stepgraph.server.engine_life import Launch
from stepgraph.server.replicas import Replicas
from stepgraph.server.supervisor import OneFront, Supervisor

TIMEOUT_S = 1.0
MODEL = SimpleNamespace(name="tiny", tokenizer=None, sampling_defaults={}, longest_token=8)


class Server:
    """A server in this process, whose engine takes requests and says nothing more of them."""

    def __init__(self, client: Replicas) -> None:
        self.client = client
        self.service = service(ServerConfig(request_timeout=TIMEOUT_S), client, lambda: MODEL)
        self.app = create_app(self.service, api_keys=())
        self.status = 0

    async def answer(self, *, starts: bool = True, **fields) -> None:
        """Answer a request of /v1/completions; `starts`: its reply can be begun."""
        body = json.dumps({"prompt": [1], **fields}).encode()
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            if not messages:
                await asyncio.Event().wait()
            return messages.pop()

        async def send(message) -> None:
            if not starts:
                raise OSError("the connection is gone")
            self.status = message.get("status", self.status)

        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/completions",
            "headers": [(b"content-type", b"application/json")],
            "query_string": b"",
        }
        await self.app(scope, receive, send)


def told_to_the_engine(use: Callable[[Server], Awaitable[None]]) -> list[str]:
    """Use a server; returns the names of the messages that its engine got."""
    process = subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("silent_engine.py"))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )

    async def serve() -> None:
        supervisor = Supervisor([Launch({}, first_process=process)], "tiny", {})
        client = one_engine(supervisor.engines[0].send_encoded, is_ready=False)
        supervisor.attach(OneFront(client, lambda: FrontCounts.of(1)))
        await supervisor.start()
        server = Server(client)
        try:
            await asyncio.gather(supervisor.wait_ready(), server.service.load())
            await use(server)
            assert client.num_unfinished == 0
        finally:
            await supervisor.stop()
            server.service.shut_down()

    asyncio.run(serve())
    with process:
        return process.stdout.read().decode().split()


def test_a_request_accepted_as_its_time_runs_out_ends() -> None:
    async def use(server: Server) -> None:
        answering = asyncio.create_task(server.answer(stream=True))
        while not server.client.num_unfinished:
            await asyncio.sleep(0)
        time.sleep(TIMEOUT_S)  # the loop finds the request accepted and the time over at once
        await answering
        assert server.status == 504

    assert told_to_the_engine(use) == ["Add", "Abort"]


def test_a_request_whose_stream_cannot_be_begun_ends() -> None:
    async def use(server: Server) -> None:
        with pytest.raises(OSError, match="the connection is gone"):
            await server.answer(stream=True, starts=False)

    assert told_to_the_engine(use) == ["Add", "Abort"]


def test_a_request_refused_after_the_engine_has_it_ends() -> None:
    async def use(server: Server) -> None:
        await server.answer(echo=True)  # there is no tokenizer to tell the prompt's text
        assert server.status == 400

    assert told_to_the_engine(use) == ["Add", "Abort"]
