"""AsyncEngine: the engine in a thread of its own, for callers that live in an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable
from itertools import count
from typing import Any

from stepgraph.config import EngineConfig
from stepgraph.engine.engine import Engine
from stepgraph.engine.outputs import RequestOutput
from stepgraph.engine.prompts import Prompt, tokenize
from stepgraph.engine.request import RequestUpdate
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.session import Session
from stepgraph.errors import EngineDeadError

_Event = RequestUpdate | BaseException


class AsyncEngine:
    """Serves many concurrent `generate` calls with one engine.

    The engine runs in its own thread, which sleeps while there is nothing to do. If it fails, every pending and later
    call raises EngineDeadError.

    Example:
        >>> engine = AsyncEngine(EngineConfig.from_settings(model="smollm2"))
        >>> async for output in engine.generate("Once upon a time", SamplingParams(max_tokens=32)):
        ...     print(output.outputs[0].text)
    """

    def __init__(self, config: EngineConfig, *, progress: bool = False):
        self.engine = Engine(config, progress=progress)
        self.tokenizer = self.engine.tokenizer
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._failure: BaseException | None = None
        self._closed = False
        self._listeners: dict[str, Callable[[_Event], bool]] = {}
        self._ids = (f"async-{number}" for number in count())
        self._thread = threading.Thread(target=self._run, name="stepgraph-engine", daemon=True)
        self._thread.start()

    async def generate(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None, *, request_id: str | None = None
    ) -> AsyncIterator[RequestOutput]:
        """Answer one prompt, token by token; each output holds the answer so far. Leaving early aborts the request.

        Raises:
            RequestError: the prompt or a parameter is unusable.
            EngineDeadError: the engine failed or was shut down.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[_Event] = asyncio.Queue()

        def listen(event: _Event) -> bool:
            return _call_in(loop, lambda: events.put_nowait(event))

        text, token_ids = tokenize(prompt, self.tokenizer)
        request_id = request_id or next(self._ids)
        params = sampling_params or SamplingParams()
        started: asyncio.Future[Session] = loop.create_future()

        def start() -> None:
            try:
                if self._failure is not None:
                    raise EngineDeadError(f"the engine stopped: {self._failure}") from self._failure
                request = self.engine.add_request(request_id, token_ids, params)
                self._listeners[request_id] = listen
                _resolve(loop, started, Session(request, text, self.tokenizer))
            except BaseException as error:
                _resolve(loop, started, error)

        def leave() -> None:
            if self._listeners.get(request_id) is listen:  # another caller's request may have this id
                del self._listeners[request_id]
                self.engine.abort(request_id)

        self._submit(start)
        finished = False
        try:
            session = await started
            while not finished:
                event = await events.get()
                if isinstance(event, BaseException):
                    finished = True
                    raise EngineDeadError(f"the engine stopped: {event}") from event
                finished = event.finish_reason is not None
                yield session.update(event)
        finally:
            if not finished:
                self._submit(leave)

    def abort(self, request_id: str) -> None:
        """End a request; its `generate` call yields a last output with finish reason "abort"."""

        def stop() -> None:
            update = self.engine.abort(request_id)
            if update is not None:
                self._deliver(update)

        self._submit(stop)

    def shutdown(self) -> None:
        """Stop the engine's thread; pending calls raise EngineDeadError."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()

    def _submit(self, command: Callable[[], None]) -> None:
        with self._wake:
            self._commands.append(command)
            self._wake.notify()
            closed = self._closed
        if closed:  # nobody else will run it
            self._run_commands()

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    self._wake.wait_for(lambda: self._commands or self._stopping or self.engine.has_work)
                    if self._stopping:
                        break
                self._run_commands()
                if self.engine.has_work:
                    for update in self.engine.step():
                        self._deliver(update)
            self._failure = EngineDeadError("it was shut down")
        except BaseException as error:
            self._failure = error
        with self._wake:
            self._closed = True
        self._run_commands()
        for listen in list(self._listeners.values()):
            listen(self._failure)
        self._listeners.clear()

    def _run_commands(self) -> None:
        while True:
            try:
                command = self._commands.popleft()
            except IndexError:
                return
            command()

    def _deliver(self, update: RequestUpdate) -> None:
        listen = self._listeners.get(update.request.id)
        if listen is None:
            return
        if not listen(update):
            self.engine.abort(update.request.id)
        if update.request.finish_reason is not None:
            del self._listeners[update.request.id]


def _resolve(loop: asyncio.AbstractEventLoop, future: asyncio.Future[Any], result: Any) -> None:
    def set_result() -> None:
        if future.done():  # the caller has left
            return
        if isinstance(result, BaseException):
            future.set_exception(result)
        else:
            future.set_result(result)

    _call_in(loop, set_result)


def _call_in(loop: asyncio.AbstractEventLoop, callback: Callable[[], None]) -> bool:
    """Run `callback` in a caller's event loop; False if that loop has ended, and with it the caller."""
    try:
        loop.call_soon_threadsafe(callback)
    except RuntimeError:
        if not loop.is_closed():
            raise
        return False
    return True
