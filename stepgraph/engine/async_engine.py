"""AsyncEngine: the engine in a thread of its own, for callers that live in an event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor

from stepgraph.config import EngineConfig
from stepgraph.engine.adapter_reader import AdapterReader
from stepgraph.engine.build import build_engine
from stepgraph.engine.outputs import RequestOutput
from stepgraph.engine.prompts import Prompt, TokenizedPrompt, require_tokenizer, tokenize
from stepgraph.engine.request import RequestUpdate
from stepgraph.engine.sampling_params import SamplingParams, bad_word_token_ids
from stepgraph.engine.session import Session
from stepgraph.errors import EngineDeadError, RequestError
from stepgraph.models.adapters import AdapterFile
from stepgraph.models.source import ModelSource

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

T = TypeVar("T")
_Event = RequestUpdate | BaseException


class _Mailbox:
    """From the engine's thread to a caller's event loop, which is woken once for all that comes until it looks."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._events: deque[_Event] = deque()
        self._news = asyncio.Event()
        self._woken = False

    def put(self, event: _Event) -> bool:
        """Pass an event on; False if the caller has gone."""
        self._events.append(event)
        if self._woken:
            return not self._loop.is_closed()
        self._woken = True
        return _call_in(self._loop, self._news.set)

    async def take(self) -> list[_Event]:
        """Wait for events; all that are there."""
        await self._news.wait()
        self._news.clear()
        self._woken = False  # before looking: what comes now wakes the loop again
        return [self._events.popleft() for _ in range(len(self._events))]


@dataclass(eq=False)
class _Call:
    """A `generate` call that is being served."""

    id: str
    mailbox: _Mailbox
    running: set[str] = field(default_factory=set)
    """Ids of its requests in the engine; none before its prompt is prepared."""
    is_aborted: bool = False
    """Before it had any."""


class AsyncEngine:
    """Serves many concurrent `generate` calls with one engine.

    The engine runs in its own thread, which sleeps while there is nothing to do. If it fails, every pending and later
    call raises EngineDeadError.

    Examples:
        >>> engine = AsyncEngine(EngineConfig.from_settings(model="smollm2"))
        >>> async for output in engine.generate("Once upon a time", SamplingParams(max_tokens=32)):
        ...     print(output.outputs[0].text)
    """

    def __init__(self, config: EngineConfig, *, progress: bool = False):
        self.engine = build_engine(config, needs_tokenizer=True, progress=progress)
        self.tokenizer = self.engine.tokenizer
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._failure: BaseException | None = None
        self._closed = False
        self._calls: dict[str, _Call] = {}
        self._owners: dict[str, _Call] = {}  # of each of the engine's requests: the call it belongs to
        self._adapters = AdapterReader(self.engine.read_adapter)
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
        """Answer one prompt, token by token; each output holds the answers so far. A caller that is slower than the engine finds
        what came meanwhile in one output. Leaving early aborts the request.

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
        call = _Call(request_id or next(self._ids), _Mailbox())
        params = sampling_params or SamplingParams()
        entered = self._in_engine(partial(self._enter, call))
        finished = False
        try:
            prepare = asyncio.to_thread(_prepare, prompt, params, self.tokenizer)
            (tokenized, bad_words), _ = await asyncio.gather(prepare, entered)
            source: str | AdapterFile | None = adapter
            while True:
                start = partial(self._start, call, tokenized, params, priority, source, bad_words)
                session = await self._in_engine(start)
                if session is not None:
                    break
                assert adapter is not None
                source = await asyncio.wrap_future(self._adapters.ask(adapter))
            while not finished:
                grew, failure = False, None
                for event in await call.mailbox.take():
                    if isinstance(event, BaseException):
                        failure = event
                    else:
                        grew |= session.update(event.request.id, event.new_token_ids, event.finish_reason)
                finished = session.finished
                if grew:
                    yield session.output()
                if failure is not None and not finished:
                    raise EngineDeadError(f"the engine stopped: {failure}") from failure
        finally:
            if not finished:
                self._submit(partial(self._leave, call))

    def abort(self, request_id: str) -> None:
        """End a request; its `generate` call yields a last output with finish reason "abort"."""
        self._submit(partial(self._abort, request_id))

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

    async def reset_prefix_cache(self, *, preempt: bool = False) -> int:
        """Forget the prefixes of earlier requests, between two steps. See `Engine.reset_prefix_cache`."""
        return await self._in_engine(partial(self.engine.reset_prefix_cache, preempt=preempt))

    def shutdown(self) -> None:
        """Stop the engine and its thread, and free its memory; pending calls raise EngineDeadError."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        self._thread.join()
        self.engine.shutdown()

    async def _between_steps(self, action: Callable[[], None]) -> None:
        """Have the engine's thread do something."""
        await self._in_engine(action)

    def _in_engine(self, action: Callable[[], T]) -> asyncio.Future[T]:
        """What `action` gives in the engine's thread, between two steps; EngineDeadError if there are none any more."""
        loop = asyncio.get_running_loop()
        done: asyncio.Future[T] = loop.create_future()

        def act() -> None:
            try:
                if self._failure is not None:
                    raise EngineDeadError(f"the engine stopped: {self._failure}") from self._failure
                _resolve(loop, done, action())
            except BaseException as error:
                _resolve(loop, done, error)

        self._submit(act)
        return done

    def _enter(self, call: _Call) -> None:
        if call.id in self._calls:
            raise RequestError(f"request id {call.id!r} is in use; give each request its own", param="request_id")
        self._calls[call.id] = call

    def _start(
        self,
        call: _Call,
        prompt: TokenizedPrompt,
        params: SamplingParams,
        priority: int,
        adapter: str | AdapterFile | None,
        bad_words: Sequence[Sequence[int]],
    ) -> Session | None:
        """Queue a call's requests; None if their adapter must be read first, which is not for this thread."""
        if isinstance(adapter, str) and not self.engine.holds_adapter(adapter):
            return None

        def end(engine_id: str) -> None:
            self._submit(partial(self._end, engine_id, call))

        session = Session.start(
            self.engine, call.id, prompt, params, priority=priority, adapter=adapter, bad_words=bad_words, abort=end
        )
        call.running = {request.id for request in session.requests}
        self._owners.update(dict.fromkeys(call.running, call))
        if call.is_aborted:
            self._abort(call.id)
        return session

    def _abort(self, call_id: str) -> None:
        call = self._calls.get(call_id)
        if call is None:
            return
        call.is_aborted = True
        for engine_id in tuple(call.running):
            update = self.engine.abort(engine_id)
            if update is not None:
                self._deliver(update)

    def _leave(self, call: _Call) -> None:
        """Nobody listens to a call any more."""
        for engine_id in tuple(call.running):
            self._end(engine_id, call)
        if self._calls.get(call.id) is call:  # another caller's request may have this id
            del self._calls[call.id]

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
            call.mailbox.put(self._failure)
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
        call = self._owners.get(engine_id)
        if call is None:
            return
        if not call.mailbox.put(update) or update.finish_reason is not None:
            self._end(engine_id, call)

    def _end(self, engine_id: str, call: _Call) -> None:
        """Forget one of a call's requests, and end it if it still runs."""
        if self._owners.get(engine_id) is not call:  # it has ended; another's may have its id
            return
        del self._owners[engine_id]
        call.running.discard(engine_id)
        if not call.running:
            del self._calls[call.id]
        self.engine.abort(engine_id)


def _prepare(
    prompt: Prompt, params: SamplingParams, tokenizer: PreTrainedTokenizerFast | None
) -> tuple[TokenizedPrompt, list[list[int]]]:
    """What takes the tokenizer, which may be long for a long prompt."""
    bad_words = getattr(params, "bad_words", ())  # whatever `params` are: Session refuses what they must not be
    return tokenize(prompt, tokenizer), bad_word_token_ids(bad_words, require_tokenizer(tokenizer)) if bad_words else []


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
