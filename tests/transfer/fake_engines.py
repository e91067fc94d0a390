"""Engines of which transfers are all there is: nothing is copied, and tests say how far it has come."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace

from stepgraph.transfer.base import FetchState
from stepgraph.transfer.layout import BlockLayout, TensorLayout
from stepgraph.transfer.leases import Leases
from stepgraph.transfer.link import Link, LinkError
from stepgraph.transfer.messages import Hello
from stepgraph.transfer.rank_cache import ExportedCache
from stepgraph.transfer.reference import Reference
from stepgraph.transfer.sockets import AllowedHosts, listen
from stepgraph.transfer.transfers import EngineTransfers

SECRET = b"secret"
KEYS = [bytes([number]) * 32 for number in range(9)]
LAYOUT = BlockLayout(2, 0, 1, ((TensorLayout((3,), "torch.float32", has_heads=False),),), (0,))
NUM_BLOCKS = 10


def wait(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(1e-3)


class FakeMoves:
    """Says what it was to copy, and is as far as a test says."""

    def __init__(self) -> None:
        self.num_moved, self.error = 0, None
        self.is_cancelled, self.is_busy = False, False
        self.moved: list = []

    def submit(self, move) -> None:
        assert len(move.source) == len(move.target)
        self.moved += zip(move.source, move.target, [move.step] * len(move.source), strict=True)

    def cancel(self) -> None:
        self.is_cancelled = True

    def done(self) -> bool:
        return self.is_cancelled and not self.is_busy


class FakeMovers:
    """Copies nothing. `attached` has what was begun of each source."""

    def __init__(self) -> None:
        self.attached: list[list[FakeMoves]] = []
        self.num_closed = 0
        self.moves_at_once = True
        self.may_close = threading.Event()
        self.may_close.set()
        self.error: Exception | None = None

    def attach(self, peer: Hello):
        if self.error is not None:
            raise self.error
        begun: list[FakeMoves] = []
        self.attached.append(begun)
        movers = self

        class Source:
            num_blocks = NUM_BLOCKS

            def begin(self) -> FakeMoves:
                begun.append(InstantMoves() if movers.moves_at_once else FakeMoves())
                return begun[-1]

            def close(self) -> None:
                movers.may_close.wait()
                movers.num_closed += 1
                assert all(moves.is_cancelled for moves in begun)

        return Source()

    def receive(self):
        """Where sources write, which they can until it is closed."""
        movers = self

        class Inbox:
            ranks = ("inbox",)

            def close(self) -> None:
                movers.may_close.wait()
                movers.num_closed += 1

        return Inbox()

    def close(self) -> None: ...

    @property
    def last(self) -> FakeMoves:
        """What was begun last."""
        return self.attached[-1][-1] if self.attached and self.attached[-1] else FakeMoves()


class InstantMoves(FakeMoves):
    def submit(self, move) -> None:
        super().submit(move)
        self.num_moved = len(self.moved)


@contextmanager
def creating() -> Iterator[Callable[..., EngineTransfers]]:
    """Gives what makes them, with movers as `movers`; in the end all are closed."""
    with ExitStack() as stack:

        def create(
            *, model="model", layout=LAYOUT, secret=SECRET, moves="sink", leases=None, **settings
        ) -> EngineTransfers:
            movers = FakeMovers()
            cache = ExportedCache(layout, is_cut=False, ranks=("here",), movers=movers)
            if moves == "source":
                cache = replace(cache, receive=movers.receive)
            settings = {"hosts": AllowedHosts(None), "address": ("127.0.0.1", None)} | settings
            leases = Leases(30.0, 2.0) if leases is None else leases
            made = EngineTransfers(cache, model, "fake", leases, secret, **settings)
            stack.callback(made.close)
            made.movers = movers
            return made

        yield create


def reference_to(source: EngineTransfers, lease: str = "a") -> Reference:
    """To a lease of a source."""
    return Reference(source.engine_id, source.host, source.port, lease)


def fails(fetch, reason) -> None:
    """A fetch ends so, and is done."""
    wait(lambda: fetch.state is not FetchState.UNDER_WAY)
    assert (fetch.state, fetch.reason) == (FetchState.FAILED, reason)
    wait(fetch.done)


def ends(link: Link) -> bool:
    """Whether a link ends, after whatever else comes."""
    try:
        while link.receive(10) is not None:
            pass
    except LinkError:
        return True
    return False


class Clock:
    """Stands still."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


class Rogue:
    """A source that does as a test says."""

    def __init__(self) -> None:
        self.listener, self.host, _ = listen("127.0.0.1", None)
        self.reference = Reference("rogue", self.host, 0, "a")

    @contextmanager
    def link(self) -> Iterator[Link]:
        stream, _ = self.listener.accept()
        link = Link(stream, SECRET, is_asking=False, timeout_s=10)
        assert isinstance(link.receive(10), Hello)
        link.send(Hello(1, "rogue", "model", LAYOUT.digest, ("fake",), False, ("here",)))
        yield link
        link.close()
