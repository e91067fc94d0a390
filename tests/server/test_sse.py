"""How a stream of events ends when its reader does not behave."""

import asyncio

from stepgraph.server import sse
from stepgraph.server.sse import DONE, EventStream


def test_a_reader_that_takes_all_but_the_end_is_cut_off_too(monkeypatch) -> None:
    monkeypatch.setattr(sse, "_STALLED_S", 0.1)

    async def events():
        yield DONE

    async def send(message) -> None:
        if message["type"] == "http.response.body" and not message["more_body"]:
            await asyncio.Event().wait()  # what came before fills the buffers, and nobody empties them

    async def receive():
        await asyncio.Event().wait()

    async def serve() -> None:
        stream = EventStream(events(), failed=lambda failure: failure.body(), request_id="r1")
        await asyncio.wait_for(stream({}, receive, send), timeout=20)

    asyncio.run(serve())
