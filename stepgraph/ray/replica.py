"""A replica: the server of `stepgraph serve` without its HTTP, and one engine in processes of its own."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import subprocess
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from ray import serve

from stepgraph.config.server import serve_config
from stepgraph.errors import EngineDeadError
from stepgraph.ray.http import Answering, Head, HttpRequest
from stepgraph.server.descriptors import raise_descriptor_limit
from stepgraph.server.front import Front, HttpFront, model_name
from stepgraph.server.serve import launches_of, prepare
from stepgraph.server.spawn import spawn_engine
from stepgraph.server.supervisor import OneFront, Supervisor


class EngineReplica:
    """What Ray Serve runs in an actor. Belongs to one event loop. The engine's processes end with the actor's.

    Args:
        settings: as `serve_config` takes them.
    """

    _stopped = True  # before there is something to stop

    async def __init__(self, settings: Mapping[str, Any]):  # type: ignore[misc]  # Serve awaits it
        started_at = time.monotonic()
        logging.getLogger("stepgraph").setLevel(logging.WARNING)
        raise_descriptor_limit()
        _, config = serve_config(settings)
        of_engines = {name: value for name, value in settings.items() if name not in type(config).__dataclass_fields__}
        prepared = prepare(of_engines, config)
        self._processes: list[subprocess.Popen[bytes]] = [spawn_engine(place) for place in prepared.places]
        launches = launches_of(prepared, config, self._processes, progress=False, takes_fronts=False)
        # a request of Serve's goes to any replica, and what a page looks at is one
        config = dataclasses.replace(config, ui=False)
        front = Front(
            prepared.config,
            config,
            prepared.api_keys,
            prepared.chat_template,
            None,
            None,
            config.max_connections,
            started_at,
        )
        self._supervisor = Supervisor(launches, model_name(front), config.adapters())
        sends = [engine.send_encoded for engine in self._supervisor.engines]
        self._http = HttpFront(front, sends, self._supervisor, self._supervisor.rest, self._supervisor.adapters)
        self._supervisor.attach(OneFront(self._http.replicas, self._http.counts))
        self._answering = Answering(self._http.app)
        self._stopped = False
        try:
            await self._supervisor.start()
            self._http.start()
            await asyncio.gather(self._http.load(), self._supervisor.wait_ready())
        except BaseException:
            await self._stop()
            raise

    async def answer(self, request: HttpRequest) -> AsyncGenerator[Head | bytes]:
        """Answer an HTTP request as `stepgraph serve` does; see `Answering.answer`."""
        async with aclosing(self._answering.answer(request)) as pieces:
            async for piece in pieces:
                yield piece

    async def metrics(self, accept: str | None) -> tuple[str, bytes, str]:
        """The replica's name, and see `Control.metrics`."""
        return serve.get_replica_context().replica_id.unique_id, *await self._supervisor.metrics(accept)

    async def load(self) -> int:
        """Requests that run or wait."""
        return sum(await self._supervisor.load())

    # What Ray Serve asks of a replica that has it

    async def check_health(self) -> None:
        """Raises EngineDeadError while the engine is not there: Serve replaces a replica of which this holds for several checks,
        and so it does not where the engine is started again meanwhile."""
        if (ailment := self._http.service.ailment) is not None:
            raise EngineDeadError(ailment)

    async def record_replica_metadata(self) -> dict[str, Any]:
        """What stays as it is, for routers: the tokens that the KV cache holds."""
        ready = self._http.replicas.ready
        assert ready is not None
        return {"kv_tokens": ready.num_kv_blocks * ready.block_size}

    async def record_routing_stats(self) -> dict[str, Any]:
        """What changes, for routers: whether requests are served, how many there are of whom, and a number that tells one report
        from the next."""
        service = self._http.service
        return {
            "is_up": service.trouble is None,
            "num_by_sender": self._answering.num_by_sender,
            "time": time.monotonic(),
        }

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """For `requests_and_cache`. Of several engines, the sums and the fullest cache."""
        loads = self._supervisor.loads()
        return {
            "num_running": sum(load.num_running for load in loads),
            "num_waiting": sum(load.num_waiting for load in loads),
            "kv_usage": max(load.kv_usage for load in loads),
        }

    async def __del__(self) -> None:
        """Serve calls this when the replica's requests are done, or their time is over."""
        await self._stop()

    async def _stop(self) -> None:
        if self._stopped:
            return
        self._stopped = True
        try:
            await self._supervisor.stop()
            await self._http.close()
        finally:
            for process in self._processes:
                process.kill()
