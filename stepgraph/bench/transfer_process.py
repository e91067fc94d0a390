"""An engine in a process of its own, driven through a pipe: what `bench transfer` sends prompts to."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Mapping, Sequence
from functools import partial
from multiprocessing.connection import Connection, wait
from typing import Any, NamedTuple

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.sink import FetchReport
from stepgraph.errors import StepgraphError
from stepgraph.transfer.reference import Offer, Reference

_START_S = 600.0
_TELL, _ABORT = "tell", "abort"
_IDLE_S = 0.01


class Ask(NamedTuple):
    """A request, answered greedily to its full length."""

    name: str
    prompt: Sequence[int]
    max_tokens: int
    salt: str
    """Only requests of the same one share prefixes: so a prompt can be computed again where it is cached."""
    transfer: Offer | Reference | None = None


class Given(NamedTuple):
    """Tokens of a request."""

    name: str
    at_s: float
    """When the engine had them, by `time.monotonic`, which all processes of a machine share."""
    token_ids: tuple[int, ...]
    is_last: bool


class Told(NamedTuple):
    """What an engine says of itself once it is ready, or is asked."""

    device: str
    reference: Reference | None
    """Where others find its leases, with no lease; None if they do not."""
    counts: dict[str, Any]
    """Its `TransferCounts`; empty if it has to do with no others."""
    fetch_s: tuple[float, ...]
    """How long each fetch took that has brought its blocks since it was last asked."""


class EngineProcess:
    """One engine.

    Args:
        settings: of the engine.
        device: number of the GPU, among those that can be seen; None: as the settings say.
    """

    def __init__(self, settings: Mapping[str, Any], device: int | None) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, there = context.Pipe()
        self.process = context.Process(target=_serve, args=(there, dict(settings), device), daemon=True)
        self.process.start()
        there.close()
        self.given: list[Given] = []
        """What has come of it, in its order."""

    def ready(self) -> Told:
        """Wait until it has started.

        Raises:
            StepgraphError: it cannot start, as it says.
        """
        if not self.connection.poll(_START_S):
            raise StepgraphError(f"an engine did not start within {_START_S:.0f} s")
        return self._told()

    def ask(self, ask: Ask) -> None:
        """Send a request, and wait until the engine has it."""
        self.connection.send(ask)
        while True:
            received = self._receive()
            if received == ask.name:
                return
            self.given.append(received)

    def tell(self) -> Told:
        """What it says of itself now."""
        self.connection.send(_TELL)
        return self._told()

    def abort_all(self) -> None:
        """End all requests, and forget what they were given."""
        self.connection.send(_ABORT)
        self._told()
        self.given.clear()

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.join()
        self.connection.close()

    def take(self) -> None:
        """Add what has come to `given`, without waiting."""
        while self.connection.poll():
            self.given.append(self._receive())

    def _told(self) -> Told:
        while not isinstance(received := self._receive(), Told):
            self.given.append(received)
        return received

    def _receive(self) -> Any:
        try:
            received = self.connection.recv()
        except EOFError:
            raise StepgraphError("an engine's process has ended") from None
        if isinstance(received, Exception):
            raise received
        return received


def wait_for(engines: Sequence[EngineProcess], name: str) -> list[Given]:
    """All that one of some engines gives for a request, waiting for its end."""
    while True:
        for engine in engines:
            engine.take()
            found = [given for given in engine.given if given.name == name]
            if found and found[-1].is_last:
                engine.given = [given for given in engine.given if given.name != name]
                return found
        wait([engine.connection for engine in engines])


def _serve(connection: Connection, settings: dict[str, Any], device: int | None) -> None:
    """Be an engine, until the pipe's other end is closed."""
    if device is not None:
        seen = os.environ.get("CUDA_VISIBLE_DEVICES")
        os.environ["CUDA_VISIBLE_DEVICES"] = str(device) if seen is None else seen.split(",")[device]
    try:
        engine = build_engine(EngineConfig.from_settings(**settings))
        fetch_s: list[float] = []
        if engine.exchange.sink is not None:
            engine.exchange.sink.on_end = partial(_note, fetch_s)
        connection.send(_tell(engine, fetch_s))
        while True:
            _turn(engine, connection, fetch_s)
    except (EOFError, OSError):  # nobody is there any more
        return
    except Exception:
        connection.send(StepgraphError(f"an engine failed:\n{traceback.format_exc()}"))


def _turn(engine: Engine, connection: Connection, fetch_s: list[float]) -> None:
    """Take what has been asked, and one step."""
    until_work_s = engine.seconds_until_work if engine.has_work else _IDLE_S
    while connection.poll(min(until_work_s or 0.0, _IDLE_S)):
        until_work_s = 0.0
        ask = connection.recv()
        if not isinstance(ask, Ask):
            for request in list(engine.scheduler.requests) if ask == _ABORT else ():
                engine.abort(request.id)
            connection.send(_tell(engine, fetch_s))
            continue
        params = SamplingParams(temperature=0, max_tokens=ask.max_tokens, ignore_eos=True)
        engine.add_request(ask.name, ask.prompt, params, cache_salt=ask.salt, transfer=ask.transfer)
        connection.send(ask.name)
    if not engine.has_work:
        engine.exchange.reclaim(copies=True)
        return
    updates = engine.step()
    now = time.monotonic()
    for update in updates:
        if update.new_token_ids or update.finish_reason is not None:
            connection.send(Given(update.request.id, now, update.new_token_ids, update.finish_reason is not None))


def _note(fetch_s: list[float], report: FetchReport) -> None:
    if report.reason is None:
        fetch_s.append(report.seconds)


def _tell(engine: Engine, fetch_s: list[float]) -> Told:
    transfers = engine.exchange.transfers
    if transfers is None:
        return Told(engine.executor.specs.device, None, {}, ())
    seconds = tuple(fetch_s)
    fetch_s.clear()
    reference = Reference(transfers.engine_id, transfers.host, transfers.port, "")
    counts = transfers.counts()
    told = {name: getattr(counts, name) for name in counts.__annotations__}
    return Told(engine.executor.specs.device, reference, told, seconds)
