"""What the ingress says without a replica."""

import asyncio
import json

import pytest
from ray.serve.exceptions import BackPressureError
from ray.serve.handle import DeploymentResponseGenerator

from stepgraph.ray.ingress import ForwardingApp


class Full(DeploymentResponseGenerator):
    """The reply of a deployment whose queue is full."""

    def __init__(self, error: BackPressureError) -> None:
        self._error = error

    async def __anext__(self):
        raise self._error

    def cancel(self) -> None:
        pass


class Engines:
    """Stands for a handle."""

    def __init__(self, error: BackPressureError) -> None:
        self._error, self.num_calls = error, 0

    def options(self, **_):
        return self

    def remote(self, _):
        self.num_calls += 1
        return Full(self._error)


@pytest.mark.parametrize(
    ("path", "error", "status", "retry_after"),
    [
        ("/v1/completions", BackPressureError(3, 2), 503, "5"),
        ("/v1/messages", BackPressureError(3, 2, 429, 1.5), 429, "2"),
    ],
)
def test_a_request_that_serve_refuses_is_told_why_and_not_sent_again(path, error, status, retry_after) -> None:
    engines, sent = Engines(error), []
    bodies = [{"type": "http.request", "body": b"{}", "more_body": False}]

    async def receive():
        return bodies.pop() if bodies else await asyncio.Event().wait()

    async def send(message) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": path, "query_string": b"", "headers": []}
    asyncio.run(ForwardingApp(engines, 1.0)(scope, receive, send))
    start, content = sent
    assert start["status"] == status
    assert dict(start["headers"])[b"retry-after"] == retry_after.encode()
    assert "max_queued_requests" in json.loads(content["body"])["error"]["message"]
    assert engines.num_calls == 1


def test_a_websocket_is_closed() -> None:
    engines, sent = Engines(BackPressureError(3, 2)), []

    async def send(message) -> None:
        sent.append(message)

    asyncio.run(ForwardingApp(engines, 1.0)({"type": "websocket", "path": "/v1/realtime"}, None, send))
    assert sent == [{"type": "websocket.close"}]
    assert engines.num_calls == 0
