"""Requests whose reply is never begun: they end in the engine all the same."""

import asyncio
import json
import time
from types import SimpleNamespace

import pytest
from observed import READY

from stepgraph.config.server import ServerConfig
from stepgraph.server.app import create_app
from stepgraph.server.engine_client import EngineClient
from stepgraph.server.messages import encode
from stepgraph.server.metrics import Metrics
from stepgraph.server.service import Service

TIMEOUT_S = 0.5


class Server:
    """A server in this process, whose engine takes requests and says nothing more of them."""

    def __init__(self) -> None:
        metrics = Metrics("tiny")
        self.client = EngineClient({}, observer=metrics)
        self.client._take(encode(READY))
        self.service = Service(ServerConfig(request_timeout=TIMEOUT_S), self.client, lambda: SimpleNamespace())
        self.service._face = SimpleNamespace(name="tiny", tokenizer=None, sampling_defaults={})
        self.app = create_app(self.service, metrics, api_keys=())
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
        try:
            await self.app(scope, receive, send)
        finally:
            self.service.shut_down()

    async def accept(self) -> None:
        """Wait for a request, and tell that the engine has queued it."""
        while not self.client.num_unfinished:
            await asyncio.sleep(0)
        for generation in self.client._generations.values():
            generation.accept()


def test_a_request_accepted_as_its_time_runs_out_ends() -> None:
    async def serve() -> None:
        server = Server()
        answering = asyncio.create_task(server.answer(stream=True))
        await server.accept()
        time.sleep(TIMEOUT_S)  # the loop finds the request accepted and the time over at once
        await answering
        assert (server.status, server.client.num_unfinished) == (504, 0)

    asyncio.run(serve())


def test_a_request_whose_stream_cannot_be_begun_ends() -> None:
    async def serve() -> None:
        server = Server()
        answering = asyncio.create_task(server.answer(stream=True, starts=False))
        await server.accept()
        with pytest.raises(OSError, match="the connection is gone"):
            await answering
        assert server.client.num_unfinished == 0

    asyncio.run(serve())


def test_a_request_refused_after_the_engine_has_it_ends() -> None:
    async def serve() -> None:
        server = Server()
        answering = asyncio.create_task(server.answer(echo=True))  # there is no tokenizer to tell the prompt's text
        await server.accept()
        await answering
        assert (server.status, server.client.num_unfinished) == (400, 0)

    asyncio.run(serve())
