"""What a full queue tells those it turns away."""

import time
from types import SimpleNamespace

import pytest
from observed import LOAD, one_engine
from observed import service as service_of

from stepgraph.config.server import ServerConfig
from stepgraph.engine.prompts import TokenizedPrompt
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.server.errors import APIError
from stepgraph.server.generation import Origin
from stepgraph.server.messages import Progress, TokenUpdate


def test_the_time_to_come_again_follows_from_what_answers_took_and_not_from_refusals() -> None:
    client = one_engine()
    service = service_of(ServerConfig(max_queue=1), client)
    service._model = SimpleNamespace(name="tiny")

    def submit(id: str, *, seconds_ago: float = 0) -> None:
        client.submit(
            id,
            TokenizedPrompt(None, [1]),
            SamplingParams(),
            None,
            arrived_at=time.monotonic() - seconds_ago,
            origin=Origin("chat", "tiny", id, None),
        )

    for id, seconds in (("a", 30), ("b", 50)):
        submit(id, seconds_ago=seconds)
        client.on_message(0, Progress([TokenUpdate(id, (5,), "stop")], [], LOAD))
    submit("given up", seconds_ago=0.1)
    client.clients[0].abort(["given up"])
    for id in ("runs", "waits"):
        submit(id)
    for _ in range(100):
        with pytest.raises(APIError, match="the queue is full") as refused:
            service.check_room(SamplingParams(), num_prompts=1)
        assert refused.value.headers == {"Retry-After": "21"}  # half the queue's mean of 40 s, and a moment
    service.shut_down()
