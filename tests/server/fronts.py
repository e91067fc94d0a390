"""A front of engines that are none."""

import time

import msgspec
from observed import LOAD
from observed import READY as NOT_LARGE

from stepgraph.engine.prompts import TokenizedPrompt
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.server.counts import RequestCounts
from stepgraph.server.engine_client import EngineClient
from stepgraph.server.engine_observer import EngineState, EngineStatus
from stepgraph.server.generation import Generation, Origin
from stepgraph.server.messages import Abort, Accepted, Add, Door, Failed, Progress, TokenUpdate, decode_to_engine
from stepgraph.server.replicas import Replicas
from stepgraph.server.rest import Rest

PROMPT = [*range(1, 49)]
READY = msgspec.structs.replace(NOT_LARGE, num_kv_blocks=4097)


class Front:
    """A front of engines that take every request, and end none by themselves.

    Args:
        num_engines: how many there are.
        shared: other fronts have them, too.
        roles: of each; default: mixed.
        accepts: they say at once that they have queued a request.
        settings: of `Replicas`.
    """

    def __init__(self, num_engines: int = 2, *, shared: bool = False, roles=None, accepts: bool = True, **settings):
        self.sent: list[list[Add]] = [[] for _ in range(num_engines)]
        self.aborted: list[list[str]] = [[] for _ in range(num_engines)]
        self._accepts = accepts
        clients = [EngineClient(self._taker(number), RequestCounts(), shared=shared) for number in range(num_engines)]
        self.replicas = Replicas(clients, Rest(), **settings)
        self.ready = [READY] * num_engines
        if roles is not None:
            self.ready = [
                msgspec.structs.replace(READY, role=role, door=Door(f"engine {number}", "@socket", 0))
                for number, role in enumerate(roles)
            ]
        for number in range(num_engines):
            self.start(number)
        self.generations: dict[str, Generation] = {}

    def _taker(self, number: int):
        def take(content: bytes) -> None:
            message = decode_to_engine(content)
            if isinstance(message, Add):
                self.sent[number].append(message)
                if self._accepts:
                    self.replicas.on_message(number, Accepted(message.group))
            elif isinstance(message, Abort):
                self.aborted[number] += message.ids

        return take

    def submit(self, prompt=PROMPT, *, salt=None, params=None, **options) -> int | None:
        """Send a request; the engine that got it, None if none or several did."""
        before = [len(adds) for adds in self.sent]
        id = f"r{len(self.generations)}"
        self.generations[id] = self.replicas.submit(
            id,
            TokenizedPrompt(None, list(prompt), salt),
            SamplingParams() if params is None else params,
            None,
            arrived_at=time.monotonic(),
            origin=Origin("chat", "tiny", "r", None),
            **options,
        )
        got = [number for number, adds in enumerate(self.sent) if len(adds) > before[number]]
        return got[0] if len(got) == 1 else None

    def begin(self, engine: int) -> None:
        """An engine's last request gets its first token."""
        running = LOAD._replace(num_running=len(self.sent[engine]), num_waiting=0)
        first = TokenUpdate(self.sent[engine][-1].requests[0][0], (5,))
        self.replicas.on_message(engine, Progress([first], [], running))

    def end(self, engine: int) -> None:
        """An engine's process is gone."""
        died = Failed("its process was killed by signal 9", is_users=False)
        self.replicas.on_status(engine, EngineStatus(EngineState.RESTARTING, self.ready[engine], died))
        self.replicas.on_end(engine, "the engine stopped: its process was killed by signal 9")

    def start(self, engine: int) -> None:
        """An engine takes requests."""
        self.replicas.on_status(engine, EngineStatus(EngineState.READY, self.ready[engine]))
