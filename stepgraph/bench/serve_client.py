"""Sends requests to an OpenAI-compatible server and notes when each piece of an answer arrives.

The client must not disturb what it measures: request bodies are encoded before the run, and while an answer streams each arrival
costs one look at the clock. What arrived is read when the answer is complete. Needs aiohttp; `bench serve` checks for it.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import re
import signal
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import aiohttp

from stepgraph.bench.serve_metrics import Outcome
from stepgraph.bench.serve_prompts import Prompt

_KEEPALIVE_S = 4.0
"""Less than the 5 s after which uvicorn closes an idle connection: sending into one that is just being closed fails."""
_MAX_ERROR_CHARACTERS = 300
_EVENT_TO_READ = re.compile(rb'"role"|"error"|"choices": ?\[\]|"usage": ?\{')
"""In every event of a stream that may be something else than a piece of the answer; reading all would cost several times more."""


@dataclass(frozen=True)
class Load:
    """Requests, and when to send them."""

    url: str
    headers: Mapping[str, str]
    bodies: Sequence[bytes]
    input_lens: Sequence[int]
    """Tokens of each prompt, in case the server does not say."""
    times_s: Sequence[float]
    """When each is due, from the begin of the run, ascending."""
    max_concurrency: int | None
    timeout_s: float
    """For one whole answer."""

    def part(self, rank: int, size: int) -> Load:
        """What one of `size` clients sends, with its share of the places: no fewer than clients, if they are limited."""
        indices, limit = self.indices(rank, size), self.max_concurrency
        return replace(
            self,
            bodies=[self.bodies[index] for index in indices],
            input_lens=[self.input_lens[index] for index in indices],
            times_s=[self.times_s[index] for index in indices],
            max_concurrency=None if limit is None else len(range(rank, limit, size)),
        )

    def indices(self, rank: int, size: int) -> list[int]:
        """The requests of that client: they go round among the clients, or among the places, as many as each has."""
        limit = self.max_concurrency or size
        return [index for index in range(len(self.bodies)) if index % limit % size == rank]


@dataclass(frozen=True)
class PartRun:
    """What became of one client's part of a load."""

    outcomes: Sequence[Outcome | None]
    """Of its requests; None: it had not ended at Ctrl-C."""
    duration_s: float
    cpu_s: float
    """CPU time of the process."""
    max_late_s: float
    """The longest that it was behind when it had a request to send."""
    interrupted: bool
    """By Ctrl-C."""


@dataclass(frozen=True)
class Run:
    """What became of a load."""

    outcomes: Sequence[Outcome]
    """Of the requests that ended, in the order in which they were due."""
    duration_s: float
    cpu_shares: Sequence[float]
    """Of each client's time, how much it used a core; near 1, it measured itself rather than the server."""
    max_late_s: float
    """The longest that a client was behind when it had a request to send."""
    interrupted: bool
    """By Ctrl-C: what was under way then has no outcome."""

    @classmethod
    def of(cls, load: Load, parts: Sequence[PartRun]) -> Run:
        """Of a load's parts, by rank; all began at one time."""
        ended = [
            (index, outcome)
            for rank, part in enumerate(parts)
            for index, outcome in zip(load.indices(rank, len(parts)), part.outcomes, strict=True)
            if outcome is not None
        ]
        return cls(
            outcomes=[outcome for _, outcome in sorted(ended, key=itemgetter(0))],
            duration_s=max(part.duration_s for part in parts),
            cpu_shares=[part.cpu_s / part.duration_s for part in parts],
            max_late_s=max(part.max_late_s for part in parts),
            interrupted=any(part.interrupted for part in parts),
        )


@dataclass(frozen=True)
class Stream:
    """What a streamed answer said."""

    chunk_times_s: list[float]
    """When each event with a piece of the answer arrived."""
    end_s: float
    """When the last event before the closing `[DONE]` did."""
    num_prompt_tokens: int | None
    """As the server counts them; None if it did not say."""
    num_output_tokens: int | None


class AnswerError(Exception):
    """A request without a whole answer.

    Args:
        kind: of failure, in a few words that do not differ between requests.
        details: what else is known.
    """

    def __init__(self, kind: str, details: object):
        super().__init__(f"{kind}: {details}")
        self.kind = kind


def encode_request(prompt: Prompt, *, model: str, chat: bool, fields: Mapping[str, Any]) -> bytes:
    """The body of a request for a streamed answer with the numbers of its tokens; `fields` come last and win."""
    content = {"messages": prompt.content} if chat else {"prompt": prompt.content}
    length = {"max_completion_tokens" if chat else "max_tokens": prompt.max_tokens}
    streaming = {"stream": True, "stream_options": {"include_usage": True}}
    return json.dumps({"model": model, **content, **length, **streaming, **fields}).encode()


def run_load(load: Load, *, on_end: Callable[[], object]) -> Run:
    """Send all requests when they are due and wait for their answers, or until Ctrl-C.

    No failure of a request ends the run. Must be called in the main thread, which receives Ctrl-C.

    Args:
        load: what to send.
        on_end: called after each request.
    """
    return Run.of(load, [run_part(load, on_end=on_end, begin=time.perf_counter)])


def run_part(load: Load, *, on_end: Callable[[], object], begin: Callable[[], float]) -> PartRun:
    """The same for one client's part of a load.

    Args:
        load, on_end: see `run_load`.
        begin: called when all is ready and Ctrl-C would be heard; returns when the run begins, in `time.perf_counter`'s seconds.
    """
    gc.freeze()  # a full collection would walk over everything there is, prompts included, while answers arrive
    try:
        with asyncio.Runner(loop_factory=_event_loop_factory()) as runner:
            return runner.run(_run_part(load, on_end, begin))
    finally:
        gc.unfreeze()


def first_model(base_url: str, headers: Mapping[str, str]) -> str:
    """The first name that the server's /v1/models lists.

    Raises:
        AnswerError: the server cannot be reached, or lists none.
    """

    async def ask() -> str:
        async with aiohttp.ClientSession(headers=headers) as session, session.get(f"{base_url}/v1/models") as response:
            await _require_ok(response)
            answer = await response.json(content_type=None)
        try:
            return str(answer["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise AnswerError("no model", f"the server lists none in {str(answer)[:_MAX_ERROR_CHARACTERS]}") from error

    try:
        return asyncio.run(ask())
    except (aiohttp.ClientError, OSError, json.JSONDecodeError) as error:
        raise AnswerError(type(error).__name__, error) from error


def read_stream(reads: Sequence[tuple[float, bytes]]) -> Stream:
    """Make sense of the bytes of a stream of server-sent events and the times of their arrival, however they were cut.

    Every event whose `choices` are not empty is a piece of the answer, even without text: the tokens of one may not make a
    character yet. A first event of a chat that only names the role is none, as servers may send it before there is a token.

    Raises:
        AnswerError: the server reported an error, or the stream ended early or without an answer.
    """
    chunk_times_s: list[float] = []
    usage: Any = None
    end_s, done = 0.0, False
    rest = b""
    if reads:
        reads = [*reads, (reads[-1][0], b"\n\n")]  # some servers do not end their last event
    for time_s, data in reads:
        *events, rest = (rest + data).replace(b"\r\n", b"\n").split(b"\n\n")
        for event in events:
            payload = _payload(event)
            if not payload:
                continue
            if payload == b"[DONE]":
                done = True
                continue
            end_s = time_s
            if _EVENT_TO_READ.search(payload):
                message = _parse(payload)
                usage = message.get("usage") or usage
                if not message.get("choices") or (not chunk_times_s and _only_names_role(message)):
                    continue
            chunk_times_s.append(time_s)
    if not done:
        raise AnswerError("stream ended early", f"{len(chunk_times_s)} chunks and no [DONE]")
    if not chunk_times_s:
        raise AnswerError("empty answer", "a stream without a chunk of output")
    return Stream(chunk_times_s, end_s, _count(usage, "prompt_tokens"), _count(usage, "completion_tokens"))


async def _run_part(load: Load, on_end: Callable[[], object], begin: Callable[[], float]) -> PartRun:
    outcomes: list[Outcome | None] = [None] * len(load.bodies)
    late_s = [0.0] * len(load.bodies)
    places = contextlib.nullcontext() if load.max_concurrency is None else asyncio.Semaphore(load.max_concurrency)
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEPALIVE_S)
    # Compression would hold tokens back until there is enough to compress.
    headers = {"Content-Type": "application/json", "Accept-Encoding": "identity", **load.headers}
    timeout = aiohttp.ClientTimeout(total=load.timeout_s)
    async with aiohttp.ClientSession(connector=connector, headers=headers, timeout=timeout) as session:
        begin_s, begin_cpu = time.perf_counter(), time.process_time()

        async def serve(index: int) -> None:
            late_s[index] = time.perf_counter() - begin_s - load.times_s[index]
            async with places:
                outcomes[index] = await _send(session, load.url, load.bodies[index], load.input_lens[index], begin_s)
            on_end()

        async def send_all() -> None:
            nonlocal begin_s, begin_cpu
            begin_s, begin_cpu = begin(), time.process_time()
            async with asyncio.TaskGroup() as requests:
                for index, due_s in enumerate(load.times_s):
                    wait_s = begin_s + due_s - time.perf_counter()
                    if wait_s > 0:
                        await asyncio.sleep(wait_s)
                    requests.create_task(serve(index))

        interrupted = await _until_interrupt(send_all())
        duration_s, cpu_s = time.perf_counter() - begin_s, time.process_time() - begin_cpu
    return PartRun(
        outcomes=outcomes,
        duration_s=duration_s,
        cpu_s=cpu_s,
        # All at once cannot be in time.
        max_late_s=max(late_s) if load.times_s[-1] > 0 else 0.0,
        interrupted=interrupted,
    )


async def _until_interrupt(work: Coroutine[Any, Any, None]) -> bool:
    """Returns whether Ctrl-C ended the work. A second Ctrl-C does what it did before."""
    loop = asyncio.get_running_loop()
    task = loop.create_task(work)
    previous = signal.getsignal(signal.SIGINT)

    def restore() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        signal.signal(signal.SIGINT, previous)

    def stop() -> None:
        restore()
        task.cancel()

    loop.add_signal_handler(signal.SIGINT, stop)
    try:
        await task
    except asyncio.CancelledError:
        return True
    finally:
        restore()
    return False


async def _send(session: aiohttp.ClientSession, url: str, body: bytes, input_len: int, begin: float) -> Outcome:
    clock = time.perf_counter
    reads: list[tuple[float, bytes]] = []
    start_s = clock() - begin
    try:
        async with session.post(url, data=body) as response:
            await _require_ok(response)
            read = response.content.readany
            while data := await read():
                reads.append((clock() - begin, data))
        stream = read_stream(reads)
    except (AnswerError, aiohttp.ClientError, OSError) as error:
        failed = error if isinstance(error, AnswerError) else AnswerError(type(error).__name__, error)
        return Outcome(start_s, clock() - begin, input_len, error=str(failed), error_kind=failed.kind)
    return Outcome(
        start_s=start_s,
        end_s=stream.end_s,
        input_len=input_len if stream.num_prompt_tokens is None else stream.num_prompt_tokens,
        output_len=len(stream.chunk_times_s) if stream.num_output_tokens is None else stream.num_output_tokens,
        chunk_times_s=stream.chunk_times_s,
        has_usage=stream.num_output_tokens is not None,
    )


async def _require_ok(response: aiohttp.ClientResponse) -> None:
    if response.status != 200:
        text = (await response.read()).decode(errors="replace")
        raise AnswerError(f"HTTP {response.status}", text[:_MAX_ERROR_CHARACTERS])


def _payload(event: bytes) -> bytes:
    """The data of a server-sent event; empty for a comment, which some servers send to keep connections open."""
    return b"\n".join([line[5:] for line in event.split(b"\n") if line.startswith(b"data:")]).strip()


def _parse(payload: bytes) -> dict[str, Any]:
    try:
        message = json.loads(payload)
    except ValueError as error:
        raise AnswerError("malformed event", f"{error} in {payload[:_MAX_ERROR_CHARACTERS]!r}") from error
    if not isinstance(message, dict) or message.get("error"):
        raise AnswerError("error in the stream", payload[:_MAX_ERROR_CHARACTERS].decode(errors="replace"))
    return message


def _only_names_role(message: Mapping[str, Any]) -> bool:
    match message:
        case {"choices": [{"delta": {"role": _, **others}}, *_]}:
            return not any(others.values())
    return False


def _count(usage: Any, name: str) -> int | None:
    """A number of tokens as the server counts them, if it does."""
    number = usage.get(name) if isinstance(usage, dict) else None
    return number if isinstance(number, int) else None


def _event_loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Of uvloop, which comes with the server and halves the cost of an arrival; else asyncio's own."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
