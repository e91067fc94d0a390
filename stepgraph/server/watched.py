"""What the engines did while somebody looked, for those who look: so many steps, and no more memory than that.

Whoever looks asks again and again for what came since. So nobody is waited for: a reader that is slow misses steps, and hears how
many. Nobody has to say that it looks no longer, either: an engine that is not asked for some seconds notes nothing any more.
"""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict, deque
from collections.abc import Sequence
from itertools import islice
from typing import Any, NamedTuple

import msgspec

import stepgraph
from stepgraph.engine.chrome_trace import chrome_trace
from stepgraph.engine.step_recorder import MAX_STEPS, SeenRequest, step_entry
from stepgraph.server.counts import EngineCounts
from stepgraph.server.engine_life import EngineLife
from stepgraph.server.messages import Seen, Watch

_MAX_BYTES = 2**24
"""Of the steps; those of hundreds of rows are fewer than `MAX_STEPS`."""
_MAX_REQUESTS = 4096
_MAX_GAUGES = 10_000
_PIECE = 500
"""Steps, or requests, of one message."""
LEASE_S = 5.0
"""An engine goes on noting for so long after it was asked to."""
_RENEW_S = 1.0
_GAUGE_S = 0.1
_SETTLE_S = 0.3
_LOST = "lost"
"""State of a request whose end was not seen."""

_encode = msgspec.json.Encoder().encode


class _Request(NamedTuple):
    change: int
    engine: int
    seen: SeenRequest


class Watched:
    """Belongs to one event loop.

    Args:
        engines: of the server.
        counts: what is known of each.
        model_name: for people.
        max_steps, max_bytes: of the steps that are kept.
    """

    def __init__(
        self,
        engines: Sequence[EngineLife],
        counts: Sequence[EngineCounts],
        model_name: str,
        *,
        max_steps: int = MAX_STEPS,
        max_bytes: int = _MAX_BYTES,
    ):
        self._engines, self._counts, self._model_name = engines, counts, model_name
        self._max_steps, self._max_bytes = max_steps, max_bytes
        self._steps: deque[bytes] = deque()  # as JSON
        self._first = 0  # number of the first of them
        self._num_bytes = 0
        self._requests: OrderedDict[int, _Request] = OrderedDict()  # by id, what changed last comes last
        self._num_changes = 0
        self._gauges: deque[dict[str, Any]] = deque(maxlen=_MAX_GAUGES)
        self._gauged_at = 0.0
        self._asked_at = -LEASE_S
        self._next_ids = list(range(1, len(engines) + 1))
        self._about_engines: list[dict[str, Any]] = []
        self._num_abouts = 0

    def take(self, replica: int, message: Seen) -> None:
        """Keep what an engine says."""
        if message.begins:
            self.lose(replica)
        for step in message.steps:
            number = self._first + len(self._steps)
            entry = _encode(step_entry(step, number, replica))
            self._steps.append(entry)
            self._num_bytes += len(entry)
        while len(self._steps) > self._max_steps or self._num_bytes > self._max_bytes:
            self._num_bytes -= len(self._steps.popleft())
            self._first += 1
        for request in message.requests:
            self._note(replica, request)
            self._next_ids[replica] = max(self._next_ids[replica], request.id + len(self._engines))

    def lose(self, replica: int) -> None:
        """No more is heard of an engine's requests that have not ended: nobody looked, or it is gone."""
        running = [each.seen for each in self._requests.values() if each.engine == replica and _runs(each.seen)]
        for seen in running:
            self._note(replica, seen._replace(state=_LOST))

    def look(self, cursor: Sequence[int] | None) -> dict[str, Any]:
        """What came since the last look, and what the engines hold now.

        Args:
            cursor: of the last look; None at the first.

        Returns:
            ``{"messages": [JSON, …], "cursor": …, "more": …}``; `more`: there is more already.
        """
        self.ask()
        engines = [self._engine(engine) for engine in self._engines]
        if engines != self._about_engines:
            self._about_engines = engines
            self._num_abouts += 1
        if cursor is None:
            return {"messages": [self._hello()], "cursor": [self._first, 0, self._num_abouts], "more": True}
        number, change, about = cursor
        messages = []
        if about != self._num_abouts:
            messages.append(_encode({"type": "engines", "engines": engines}))
        dropped = max(0, self._first - number)
        start = max(number, self._first)
        steps = list(islice(self._steps, start - self._first, start - self._first + _PIECE))
        if steps or dropped:
            messages.append(b'{"type":"steps","steps":[' + b",".join(steps) + b'],"dropped":%d}' % dropped)
        changed = self._changed_since(change)
        if changed:
            entries = [{"engine": each.engine, **each.seen._asdict()} for each in changed]
            messages.append(_encode({"type": "requests", "requests": entries}))
            change = changed[-1].change
        number = start + len(steps)
        more = number < self._first + len(self._steps) or change < self._num_changes
        if not more:
            messages += [_encode({"type": "gauges", **gauge}) for gauge in self._gauges_now()]
        return {"messages": messages, "cursor": [number, change, self._num_abouts], "more": more}

    def ask(self) -> None:
        """Have the engines note their steps for the next seconds."""
        now = time.monotonic()
        if now - self._asked_at >= _RENEW_S:
            self._asked_at = now
            for engine in self._engines:
                if engine.is_ready:
                    engine.tell(Watch(now + LEASE_S, self._next_ids[engine.replica], len(self._engines)))
        if now - self._gauged_at >= _GAUGE_S:
            self._gauged_at = now
            self._gauges += self._gauges_now()

    async def trace(self, seconds: float) -> bytes:
        """A trace as JSON, see `chrome_trace`: of what comes in so many seconds, or with 0 of what is kept."""
        first, since = 0, 0.0
        if seconds:
            first, since = self._first + len(self._steps), time.monotonic()
            while (left := since + seconds - time.monotonic()) > 0:
                self.ask()
                await asyncio.sleep(min(left, _GAUGE_S))
            await asyncio.sleep(_SETTLE_S)  # for what the engines have noted and not said
        return await asyncio.to_thread(_trace, *self._kept(first, since))

    def _kept(self, first: int, since: float) -> tuple[list[bytes], list[dict[str, Any]], list[dict[str, Any]], Any]:
        """What `_trace` takes: the steps from number `first` on and what happened since then."""
        steps = list(islice(self._steps, max(0, first - self._first), None))
        requests = [
            {"engine": each.engine, **each.seen._asdict()}
            for each in sorted(self._requests.values(), key=lambda each: each.seen.id)
            if not since or _runs(each.seen) or (each.seen.finished or 0.0) >= since
        ]
        gauges = [gauge for gauge in self._gauges if gauge["time"] >= since]
        return steps, requests, gauges, self._about()

    def _note(self, replica: int, request: SeenRequest) -> None:
        self._num_changes += 1
        self._requests[request.id] = _Request(self._num_changes, replica, request)
        self._requests.move_to_end(request.id)
        while len(self._requests) > _MAX_REQUESTS:
            self._requests.popitem(last=False)

    def _changed_since(self, change: int) -> list[_Request]:
        """The first of those that changed, in the order in which they did."""
        found = []
        for each in reversed(self._requests.values()):
            if each.change <= change:
                break
            found.append(each)
        return found[::-1][:_PIECE]

    def _hello(self) -> bytes:
        hello = {
            "type": "hello",
            **self._about(),
            "engine": self._about_engines[0],
            "engines": self._about_engines,
            "capacity": self._max_steps,
        }
        return _encode({**hello, "steps": [], "requests": []})

    def _about(self) -> dict[str, Any]:
        clock = round(time.time() - time.monotonic(), 6)
        return {"model": self._model_name, "version": stepgraph.__version__, "clock": clock}

    def _engine(self, engine: EngineLife) -> dict[str, Any]:
        about: dict[str, Any] = {
            "model": self._model_name,
            "version": stepgraph.__version__,
            "state": str(engine.status.state),
            "trouble": engine.status.trouble,
        }
        ready = engine.status.ready
        if ready is not None:
            about |= {
                "device": ready.device,
                "backend": ready.backend,
                "precision": ready.precision,
                "max_num_seqs": ready.max_num_seqs,
                "max_num_batched_tokens": ready.max_tokens,
                "max_model_len": ready.max_model_len,
                "num_kv_blocks": ready.num_kv_blocks,
                "block_size": ready.block_size,
                "max_drafts": ready.max_drafts,
                "num_ranks": ready.num_ranks,
                "role": ready.role,
            }
        return about

    def _gauges_now(self) -> list[dict[str, Any]]:
        now = round(time.monotonic(), 6)
        gauges = []
        for engine, counts in zip(self._engines, self._counts, strict=True):
            load, ready = counts.load, engine.status.ready
            total = 0 if ready is None else ready.num_kv_blocks - 1  # one is null
            used = round(load.kv_usage * total)
            gauges.append(
                {
                    "engine": engine.replica,
                    "time": now,
                    "running": load.num_running,
                    "waiting": load.num_waiting,
                    "kv_used": used,
                    "kv_total": total,
                }
            )
        return gauges


def _trace(steps: Sequence[bytes], *others: Any) -> bytes:
    return _encode(chrome_trace(msgspec.json.decode(b"[" + b",".join(steps) + b"]"), *others))


def _runs(request: SeenRequest) -> bool:
    return request.state in ("waiting", "running")
