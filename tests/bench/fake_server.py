"""A server that answers by a script, for `stepgraph bench serve`."""

import asyncio
import json
import threading
from collections.abc import Awaitable, Callable

from aiohttp import web


class FakeServer:
    """Answers by a script, in a thread of its own, and remembers what it was asked."""

    def __init__(self) -> None:
        self.answer: Callable[[int, web.Request, dict], Awaitable[web.StreamResponse]] = answer_in_full
        self.bodies: list[dict] = []
        self.headers: list[dict[str, str]] = []
        self.paths: list[str] = []
        self.active = self.most_active = 0
        self.url = ""
        self._loop = asyncio.new_event_loop()
        self._ready, self._ended = threading.Event(), asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._serve(),))

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(60)

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._ended.set)
        self._thread.join(60)
        self._loop.close()

    async def _serve(self) -> None:
        app = web.Application()
        app.router.add_get("/v1/models", self._models)
        app.router.add_post("/v1/{endpoint:.*}", self._completions)
        # Whoever hangs up must not leave a handler behind that waits for ever.
        runner = web.AppRunner(app, handler_cancellation=True, shutdown_timeout=0)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        self._ready.set()
        await self._ended.wait()
        await runner.cleanup()

    async def _models(self, request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "first/model"}, {"id": "other"}]})

    async def _completions(self, request: web.Request) -> web.StreamResponse:
        number = len(self.bodies)
        body = await request.json()
        self.bodies.append(body)
        self.headers.append(dict(request.headers))
        self.paths.append(request.path)
        self.active += 1
        self.most_active = max(self.most_active, self.active)
        try:
            return await self.answer(number, request, body)
        finally:
            self.active -= 1


async def send_events(request: web.Request, events: list[dict | str]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for event in events:
        text = event if isinstance(event, str) else json.dumps(event)
        await response.write(f"data: {text}\n\n".encode())
    return response


def chunks(count: int) -> list[dict | str]:
    return [{"choices": [{"index": 0, "text": " word"}], "usage": None}] * count


def usage(body: dict, num_output_tokens: int) -> dict:
    prompt = body.get("prompt") or body["messages"]
    return {"choices": [], "usage": {"prompt_tokens": len(prompt), "completion_tokens": num_output_tokens}}


async def answer_in_full(number: int, request: web.Request, body: dict) -> web.StreamResponse:
    """As many tokens as were asked for, two to a chunk."""
    length = body.get("max_tokens") or body["max_completion_tokens"]
    return await send_events(request, [*chunks(-(-length // 2)), usage(body, length), "[DONE]"])
