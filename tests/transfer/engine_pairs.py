"""A prefill engine and a decode engine that look like one engine, and what both must be once nothing is asked of them."""

from __future__ import annotations

import random
import secrets
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from faults import Change, Tap, unchanged
from tiny import TINY_SETTINGS

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.engine.request import Request, RequestUpdate
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.transfer.leases import LossReason
from stepgraph.transfer.peer import Patience
from stepgraph.transfer.reference import Offer, Reference

ONE_TOKEN = SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)


def build(settings: dict[str, Any]) -> Engine:
    """An engine with these settings, of the tiny model's size."""
    return build_engine(EngineConfig.from_settings(**({"device": "cpu"} | TINY_SETTINGS | settings)))


def reference_to(engine: Engine, lease: str) -> Reference:
    """What a sink must be told of a lease."""
    transfers = engine.transfers
    assert transfers is not None
    return Reference(transfers.engine_id, transfers.host, transfers.port, lease)


def go_on(engine: Engine) -> Sequence[RequestUpdate]:
    """What an engine's loop does, once."""
    if engine.has_work:
        time.sleep(engine.seconds_until_work or 0)
        return engine.step()
    engine.exchange.reclaim(copies=False)
    time.sleep(1e-3)
    return ()


def failures(engine: Engine) -> Counter[str]:
    """Fetches that came to nothing, and leases that ended unconfirmed, by reason."""
    assert engine.transfers is not None
    counts = engine.transfers.counts()
    reasons = Counter(counts.failures) + Counter(counts.leases_ended)
    del reasons[LossReason.CONFIRMED]
    return reasons


def settle(engine: Engine, timeout_s: float) -> None:
    """Step until nothing is held for other engines, and nothing awaited from them."""
    deadline = time.monotonic() + timeout_s
    while engine.has_work or engine.exchange.is_active:
        assert time.monotonic() < deadline, check_at_rest(engine)
        go_on(engine)


def check_at_rest(engine: Engine) -> list[str]:
    """What an engine of which nothing is asked still has of transfers; nothing if all is well."""
    assert engine.transfers is not None
    pool, transfers = engine.scheduler.blocks, engine.transfers.counts()
    counts = {
        "leases": transfers.num_leases,
        "fetches": transfers.num_fetches,
        "blocks that are not free": pool.num_usable - pool.num_free,
        "quarantined blocks": pool.num_quarantined,
    }
    return [f"{count} {what}" for what, count in counts.items() if count]


class Pair:
    """Two engines, for those who drive one: a request's prompt is computed by the source, maybe while the sink already takes
    blocks over, and the sink answers. Some requests are the sink's alone.

    Args:
        source, sink: the engines.
        seed: of which requests go which way.
        refer: makes the reference that the sink gets of a lease; default: the right one.
    """

    def __init__(
        self, source: Engine, sink: Engine, seed: int = 0, refer: Callable[[str], Reference] | None = None
    ) -> None:
        self.source, self.sink, self.config = source, sink, sink.config
        self._random = random.Random(seed)
        self._refer = refer or (lambda lease: reference_to(source, lease))
        self._leases = 0

    seconds_until_work = None

    @property
    def has_work(self) -> bool:
        return self.source.has_work or self.sink.has_work

    def step(self) -> Sequence[RequestUpdate]:
        """One step of each that has something to do. What the source says is dropped."""
        go_on(self.source)
        return go_on(self.sink)

    def add_request(self, name: str, prompt: Sequence[int], params: SamplingParams, **options: Any) -> Request:
        """See `Engine.add_request`. Returns what the sink makes of it."""
        way = self._random.choice(("at once", "at once", "after", "sink alone"))
        if way == "sink alone":
            return self.sink.add_request(name, prompt, params, **options)
        self._leases += 1
        lease = f"{name} {self._leases}"
        first = self.source.add_request(name, prompt, ONE_TOKEN, transfer=Offer(lease), **options)
        while way == "after" and first.finish_reason is None:
            go_on(self.source)
        return self.sink.add_request(name, prompt, params, transfer=self._refer(lease), **options)

    def abort(self, name: str) -> None:
        """At one of the two, or at both."""
        for engine in self._random.choice(((self.source,), (self.sink,), (self.source, self.sink))):
            engine.abort(name)

    # Of the life of one engine, or of both

    def sleep(self, level: int) -> None:
        self._slept = self._some()
        for engine in self._slept:
            engine.sleep(level)

    def wake_up(self) -> None:
        for engine in self._slept:
            engine.wake_up()

    def update_weights(self, weights: Any) -> None:
        for engine in (self.source, self.sink):
            engine.update_weights(weights)

    def reset_prefix_cache(self, *, preempt: bool) -> None:
        for engine in self._some():
            engine.reset_prefix_cache(preempt=preempt)

    def shutdown(self) -> None:
        for engine in (self.source, self.sink):
            engine.shutdown()

    def _some(self) -> tuple[Engine, ...]:
        return self._random.choice(((self.source,), (self.sink,), (self.source, self.sink)))


class World:
    """A source and a sink of the tiny model, and a `Tap` that the sink is sent to.

    Args:
        model: folder of it.
        settings: of both engines.
    """

    def __init__(self, model: str, **settings: Any) -> None:
        self.source = build({"model": model, "splitwise_role": "prefill"} | settings)
        self.sink = build({"model": model, "splitwise_role": "decode"} | settings)
        self.pair = Pair(self.source, self.sink, refer=self.refer)
        self.late_s = 0.0
        """How far the clock of the source's leases is ahead."""
        self.source.transfers.leases._clock = lambda: time.monotonic() + self.late_s
        self._tap: Tap | None = None

    @contextmanager
    def tapped(
        self, *, to_sink: Change = unchanged, to_source: Change = unchanged, timeout_s: float = 20.0
    ) -> Iterator[Tap]:
        """Inside, there is a tap that does this; see `Tap`. The sink gives up what does not move on for `timeout_s`."""
        transfers = self.sink.transfers
        transfers._patience = Patience(timeout_s=timeout_s, wait_s=timeout_s)
        at, secret = reference_to(self.source, "").host, self.source.config.transfer.secret()
        self._tap = Tap(f"{at}-{secrets.token_hex(4)}", at, secret, to_sink=to_sink, to_source=to_source)
        try:
            yield self._tap
        finally:
            self._tap.close()

    def refer(self, lease: str) -> Reference:
        """To a lease of the source's, by way of the tap."""
        assert self._tap is not None
        return replace(reference_to(self.source, lease), host=self._tap.host)

    def begin(self, name: str, prompt: Sequence[int], params: SamplingParams, **options: Any) -> Request:
        """Ask both at once; returns the sink's request. No prefix of another name's is found."""
        options = {"cache_salt": name} | options
        self.source.add_request(name, prompt, ONE_TOKEN, transfer=Offer(name), **options)
        return self.sink.add_request(name, prompt, params, transfer=self.refer(name), **options)

    def run(self, *requests: Request) -> None:
        """Step until these have ended."""
        self.until(lambda: all(request.finish_reason is not None for request in requests))

    def until(self, condition: Callable[[], bool]) -> None:
        """Step until it is so."""
        deadline = time.monotonic() + 60
        while not condition():
            assert time.monotonic() < deadline
            self.pair.step()

    def check_at_rest(self) -> None:
        """AssertionError unless nothing is left over at either end, when leases that nobody has asked for have expired."""
        settle(self.sink, 60)
        while self.source.has_work:
            go_on(self.source)
        self.late_s += 1000.0
        settle(self.source, 60)
        assert check_at_rest(self.source) + check_at_rest(self.sink) == []

    def close(self) -> None:
        """End the engines."""
        self.pair.shutdown()
