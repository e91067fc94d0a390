"""Several fronts in processes of their own, which share a port, as the supervisor has them."""

from __future__ import annotations

import asyncio
import dataclasses
import socket
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from stepgraph.server.counts import FrontCounts
from stepgraph.server.engine_life import Launch
from stepgraph.server.engine_observer import EngineStatus
from stepgraph.server.front import Front, model_name, serve
from stepgraph.server.front_life import FrontLife
from stepgraph.server.front_messages import (
    AskCounts,
    EngineEnded,
    EngineNews,
    PrefixesForgotten,
    Share,
    StartFront,
    ToFront,
)
from stepgraph.server.messages import FromEngine, FrontGone
from stepgraph.server.supervisor import Supervisor

_SHARE_S = 5.0
"""What a front may take to hear of something; one that takes longer hears of it later."""
_COUNT_S = 1.0
"""What a front may take to say what it has counted; of one that takes longer, what it said last counts."""
_METHODS = frozenset({"administer", "metrics", "load", "graphs", "look", "trace"})
"""What fronts may call."""


class FrontProcesses:
    """A `FrontSide`, and the `FrontOwner` of all. Belongs to one event loop.

    Args:
        start: what each is told first; see `FrontLife`.
        listening: the sockets of each.
        supervisor: owns the engines.
    """

    def __init__(self, start: StartFront, listening: Sequence[Sequence[socket.socket]], supervisor: Supervisor):
        self._supervisor = supervisor
        self._fronts = [FrontLife(number, start, sockets, self) for number, sockets in enumerate(listening)]
        self._gone = FrontCounts.of(len(supervisor.engines))  # what processes have counted that are no more
        self.tasks: tuple[asyncio.Task[None], ...] = ()
        """There is none of which the end is the end of all."""

    def start(self) -> None:
        """Start the processes."""
        for front in self._fronts:
            front.start()

    async def load(self) -> None:
        """Wait until all have what they need of the model; see `FrontLife.wait_loaded`."""
        await asyncio.gather(*(front.wait_loaded() for front in self._fronts))

    async def drain(self, hurry: asyncio.Event) -> None:
        """Let them finish what runs, and end; at once when they are to `hurry`."""
        await asyncio.gather(*(front.drain(hurry) for front in self._fronts))

    async def close(self) -> None:
        """End the processes."""
        await asyncio.gather(*(front.stop() for front in self._fronts))

    # See `FrontSide`

    def on_message(self, replica: int, message: FromEngine) -> None:
        """See `EngineListener`. Requests' news go from the engines to the fronts without a way round here."""

    def on_status(self, replica: int, status: EngineStatus) -> None:
        """See `EngineListener`."""
        self._tell(EngineNews(replica, status))

    def on_end(self, replica: int, reason: str) -> None:
        """See `EngineListener`."""
        self._tell(EngineEnded(replica, reason))

    def forget_prefixes(self, replica: int) -> None:
        """See `Fronts`."""
        self._tell(PrefixesForgotten(replica))

    async def share(self) -> None:
        """See `Fronts`."""
        await self._ask(self._shared(), _SHARE_S)

    async def num_unfinished(self) -> int:
        """See `Fronts`."""
        return sum((await self.counts()).num_unfinished)

    async def counts(self) -> FrontCounts:
        """See `FrontSide`."""
        await self._ask(AskCounts, _COUNT_S)
        total = FrontCounts.of(len(self._supervisor.engines))
        total.add(self._gone)
        for front in self._fronts:
            if front.counts is not None:
                total.add(front.counts)
        return total

    # See `FrontOwner`

    def on_front(self, front: FrontLife) -> None:
        """See `FrontOwner`."""
        front.tell(self._shared()(-1))
        for engine in self._supervisor.engines:
            front.tell(EngineNews(engine.replica, engine.status))

    def on_front_gone(self, name: str, counts: FrontCounts | None) -> None:
        """See `FrontOwner`."""
        if counts is not None:
            self._gone.add(counts, is_gone=True)
        for engine in self._supervisor.engines:
            engine.tell(FrontGone(name))

    async def call(self, method: str, arguments: dict[str, Any]) -> Any:
        """See `FrontOwner`."""
        assert method in _METHODS, method
        return await getattr(self._supervisor, method)(**arguments)

    def _shared(self) -> Callable[[int], Share]:
        rest = self._supervisor.rest
        return partial(
            Share,
            sleep_level=rest.sleep_level,
            paused=rest.paused,
            coming=rest.coming,
            adapters=self._supervisor.adapters,
        )

    def _tell(self, message: ToFront) -> None:
        for front in self._fronts:
            front.tell(message)

    async def _ask(self, question: Callable[[int], ToFront], timeout_s: float) -> None:
        await asyncio.gather(*(front.ask(question, timeout_s) for front in self._fronts))


async def serve_with_processes(
    front: Front,
    settings: Mapping[str, Any],
    launches: Sequence[Launch],
    listening: Sequence[socket.socket],
    metrics_listening: Sequence[socket.socket] | None,
) -> int:
    """Serve with a front process for each socket but the last; see `serve`. What a front may hold is its part of what the server
    may."""
    supervisor = Supervisor(launches, model_name(front), front.config.adapters())
    ports = [listening] if metrics_listening is None else [listening, metrics_listening]
    sockets = [list(of_front) for of_front in zip(*ports, strict=True)][:-1]
    start = StartFront(
        name="",
        address="",
        settings=dict(settings),
        server_settings=_server_settings(front, len(sockets)),
        api_keys=list(front.api_keys),
        chat_template=front.chat_template,
        listening=[],
        max_connections=front.max_connections,
        num_engines=len(launches),
    )
    fronts = FrontProcesses(start, sockets, supervisor)
    supervisor.attach(fronts)
    return await serve(front, supervisor, fronts, len(sockets))


def _server_settings(front: Front, num_fronts: int) -> dict[str, Any]:
    """Those of one of several fronts: bodies take memory of each, and one of the largest must find room. Ports are those that are
    open."""
    config = front.config
    most_mib = max(config.max_bodies_mib / num_fronts, min(config.max_bodies_mib, config.max_body_mib))
    assert front.listening is not None
    port = front.listening.getsockname()[1]
    metrics_port = None if front.metrics_listening is None else front.metrics_listening.getsockname()[1]
    return dataclasses.asdict(
        dataclasses.replace(config, max_bodies_mib=most_mib, port=port, metrics_port=metrics_port)
    )
