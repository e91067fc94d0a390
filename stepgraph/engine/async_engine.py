"""AsyncEngine: the engine in a thread of its own, for callers that live in an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor

from stepgraph.config import EngineConfig
from stepgraph.engine.engine import Engine
from stepgraph.engine.outputs import RequestOutput
from stepgraph.engine.prompts import Prompt, tokenize
from stepgraph.engine.request import RequestUpdate
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.session import Session
from stepgraph.errors import EngineDeadError, RequestError
from stepgraph.models.source import ModelSource

_Event = RequestUpdate | BaseException


@dataclass
class _Call:
    """A `generate` call that is being served."""

    listen: Callable[[_Event], bool]
    """Passes an event on; False if the caller has gone."""
    running: set[str]
    """Ids of its requests in the engine."""


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
        self.engine = Engine(config, needs_tokenizer=True, progress=progress)
        self.tokenizer = self.engine.tokenizer
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._failure: BaseException | None = None
        self._closed = False
        self._calls: dict[str, _Call] = {}
        self._owners: dict[str, str] = {}  # of each of the engine's requests: the call it belongs to
        self._ids = (f"async-{number}" for number in count())
        self._thread = threading.Thread(target=self._run, name="stepgraph-engine", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        adapter: str | None = None,
    ) -> AsyncIterator[RequestOutput]:
        """Answer one prompt, token by token; each output holds the answers so far. Leaving early aborts the request.

        Args:
            prompt: text, token ids, or a dict, see `LLM.generate`.
            sampling_params: default `SamplingParams()`.
            request_id: names the request in its outputs and for `abort`; default: a new one.
            priority: lower runs first.
            adapter: folder of a LoRA adapter; needs ``enable_lora=True``.

        Raises:
            RequestError: the prompt or a parameter is unusable.
            EngineDeadError: the engine failed or was shut down.
        """
        loop = asyncio.get_running_loop()
        events: asyncio.Queue[_Event] = asyncio.Queue()

        def listen(event: _Event) -> bool:
            return _call_in(loop, lambda: events.put_nowait(event))

        tokenized = tokenize(prompt, self.tokenizer)
        call_id = request_id or next(self._ids)
        params = sampling_params or SamplingParams()
        started: asyncio.Future[Session] = loop.create_future()

        def start() -> None:
            try:
                if self._failure is not None:
                    raise EngineDeadError(f"the engine stopped: {self._failure}") from self._failure
                if call_id in self._calls:
                    raise RequestError(f"request id {call_id!r} is in use; give each request its own")
                session = Session.start(
                    self.engine, call_id, tokenized, params, priority=priority, adapter=adapter, abort=end
                )
                self._calls[call_id] = _Call(listen, {request.id for request in session.requests})
                self._owners.update((request.id, call_id) for request in session.requests)
                _resolve(loop, started, session)
            except BaseException as error:
                _resolve(loop, started, error)

        def end(engine_id: str) -> None:
            self._submit(lambda: self._end(engine_id, listen))

        def leave() -> None:
            call = self._calls.get(call_id)
            if call is not None and call.listen is listen:  # another caller's request may have this id
                for engine_id in tuple(call.running):
                    self._end(engine_id, listen)

        self._submit(start)
        finished = False
        try:
            session = await started
            while not finished:
                event = await events.get()
                if isinstance(event, BaseException):
                    finished = True
                    raise EngineDeadError(f"the engine stopped: {event}") from event
                grew = session.update(event.request.id, event.new_token_ids, event.finish_reason)
                finished = session.finished
                if grew:
                    yield session.output()
        finally:
            if not finished:
                self._submit(leave)

    def abort(self, request_id: str) -> None:
        """End a request; its `generate` call yields a last output with finish reason "abort"."""

        def stop() -> None:
            call = self._calls.get(request_id)
            for engine_id in tuple(call.running) if call is not None else ():
                update = self.engine.abort(engine_id)
                if update is not None:
                    self._deliver(update)

        self._submit(stop)

    @property
    def is_paused(self) -> bool:
        """See `Engine.is_paused`."""
        return self.engine.is_paused

    @property
    def is_sleeping(self) -> bool:
        """See `Engine.is_sleeping`."""
        return self.engine.is_sleeping

    async def pause(self) -> None:
        """Launch no more steps until `resume`; calls of `generate` wait. See `Engine.pause`."""
        await self._between_steps(self.engine.pause)

    async def resume(self) -> None:
        """Launch steps again."""
        await self._between_steps(self.engine.resume)

    async def sleep(self, level: int = 1) -> None:
        """Give memory of the device back until `wake_up`; calls of `generate` wait. See `Engine.sleep`."""
        await self._between_steps(partial(self.engine.sleep, level))

    async def wake_up(self) -> None:
        """Take the memory back that `sleep` gave up. See `Engine.wake_up`."""
        await self._between_steps(self.engine.wake_up)

    async def update_weights(self, weights: str | Path | ModelSource | Iterable[tuple[str, Tensor]]) -> None:
        """Replace the model's weights between two steps. See `Engine.update_weights`."""
        await self._between_steps(partial(self.engine.update_weights, weights))

    def shutdown(self) -> None:
        """Stop the engine and its thread, and free its memory; pending calls raise EngineDeadError."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()
        self.engine.shutdown()

    async def _between_steps(self, action: Callable[[], None]) -> None:
        """Have the engine's thread do something."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] = loop.create_future()

        def act() -> None:
            try:
                if self._failure is not None:
                    raise EngineDeadError(f"the engine stopped: {self._failure}") from self._failure
                action()
                _resolve(loop, done, None)
            except BaseException as error:
                _resolve(loop, done, error)

        self._submit(act)
        await done

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
                while not self._has_something_to_do(None) and self.engine.prepare():
                    pass  # with what may be needed later
                due = self.engine.seconds_until_work
                with self._wake:
                    self._wake.wait_for(partial(self._has_something_to_do, due), timeout=due)
                    if self._stopping:
                        break
                self._run_commands()
                if self.engine.has_work:
                    for update in self.engine.step():
                        self._deliver(update)
            self._failure = EngineDeadError("it was shut down")
        except BaseException as error:
            self._failure = error
        for call in self._calls.values():
            call.listen(self._failure)
        self._calls.clear()
        self._owners.clear()
        with self._wake:  # from here on, commands run in their callers' threads, and find the failure and no calls
            self._closed = True
        self._run_commands()

    def _has_something_to_do(self, due: float | None) -> bool:
        return bool(self._commands) or self._stopping or (due is None and self.engine.has_work)

    def _run_commands(self) -> None:
        while True:
            try:
                command = self._commands.popleft()
            except IndexError:
                return
            command()

    def _deliver(self, update: RequestUpdate) -> None:
        engine_id = update.request.id
        call_id = self._owners.get(engine_id)
        if call_id is None:
            return
        listen = self._calls[call_id].listen
        if not listen(update) or update.finish_reason is not None:
            self._end(engine_id, listen)

    def _end(self, engine_id: str, listen: Callable[[_Event], bool]) -> None:
        """Forget one of a call's requests, and end it if it still runs."""
        call_id = self._owners.get(engine_id)
        if call_id is None or self._calls[call_id].listen is not listen:  # it has ended; another's may have its id
            return
        del self._owners[engine_id]
        self._calls[call_id].running.discard(engine_id)
        if not self._calls[call_id].running:
            del self._calls[call_id]
        self.engine.abort(engine_id)


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
