"""NIXL moves what it is told to, and nothing any more once its agent has ended; with an imitation of it, and with itself where it
is installed."""

import ctypes
import gc
import importlib.util
import json
import time
import weakref
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from fake_engines import KEYS, SECRET, fails, reference_to, wait
from torch import Tensor

from stepgraph.errors import ConfigError
from stepgraph.layers.cache import LatentSpec, PagedSpec
from stepgraph.parallel.shard import Cut, Shard
from stepgraph.platforms import create_platform
from stepgraph.step.memory import CacheLayout
from stepgraph.step.signals import KVSignals
from stepgraph.transfer import nixl
from stepgraph.transfer.base import FetchState, Move, TransferError
from stepgraph.transfer.create import export_cache
from stepgraph.transfer.layout import BlockLayout
from stepgraph.transfer.leases import Leases, LossReason
from stepgraph.transfer.messages import PROTOCOL, Hello
from stepgraph.transfer.rank_cache import RankCache
from stepgraph.transfer.sockets import AllowedHosts
from stepgraph.transfer.transfers import EngineTransfers

NUM_BLOCKS = 6


class ImitatedAgent:
    """Writes at once, if the other agent is there and has the memory registered."""

    agents: ClassVar[weakref.WeakValueDictionary] = weakref.WeakValueDictionary()

    def __init__(self, name: str, config) -> None:
        self.name, self.regions, self.state = name, [], "DONE"
        self.agents[name] = self

    def register_memory(self, regions, kind):
        assert kind == "DRAM"
        self.regions = [(address, size) for address, size, _, _ in regions]
        return self.regions

    def deregister_memory(self, regions) -> None:
        assert regions is self.regions
        self.regions = []

    def get_agent_metadata(self) -> bytes:
        return self.name.encode()

    def add_remote_agent(self, metadata: bytes) -> str:
        if metadata.decode() not in self.agents:
            raise RuntimeError("no such agent")
        return metadata.decode()

    def remove_remote_agent(self, name: str) -> None: ...

    def get_xfer_descs(self, pieces, kind):
        return [tuple(map(int, piece)) for piece in pieces]

    def initialize_xfer(self, operation, source, target, name):
        assert operation == "WRITE"
        return source, target, name

    def transfer(self, handle) -> str:
        source, target, name = handle
        other = self.agents.get(name)
        for (here, size, _), (there, other_size, _) in zip(source, target, strict=True):
            assert size == other_size
            assert any(a <= here and here + size <= a + n for a, n in self.regions)
            if other is None or not any(a <= there and there + size <= a + n for a, n in other.regions):
                raise RuntimeError("disconnected")
            ctypes.memmove(there, here, size)
        return "PROC"

    def check_xfer_state(self, handle) -> str:
        return self.state

    def release_xfer_handle(self, handle) -> None: ...


IMITATED = SimpleNamespace(nixl_agent=ImitatedAgent, nixl_agent_config=lambda backends: backends)
REAL = pytest.mark.skipif(importlib.util.find_spec("nixl") is None, reason="NIXL is not installed")


@pytest.fixture(params=["imitated", pytest.param("real", marks=REAL)])
def api(request, monkeypatch) -> None:
    monkeypatch.setenv("UCX_TLS", "tcp")
    if request.param == "imitated":
        monkeypatch.setattr(nixl, "_load", lambda: IMITATED)


def rank_cache(*, gives: bool, shard: Shard = Shard(), device: str = "cpu") -> RankCache:  # noqa: B008  # frozen
    paged = PagedSpec(2, 3, torch.float8_e4m3fn, heads=Cut.whole(2))
    layout = CacheLayout((paged, LatentSpec(5, torch.bfloat16)), (), 2, 2, 0)
    platform = create_platform("cpu")
    memory = platform.memory(layout.sizes(NUM_BLOCKS), sleepable=False, shared=gives)
    tensors = tuple(
        tuple(tensor.to(device) for tensor in cache.block_tensors) for cache in layout.allocate(NUM_BLOCKS, memory)
    )
    return RankCache(BlockLayout.of(layout), shard, tensors, memory, KVSignals(2, platform) if gives else None)


def content(cache: RankCache, block: int) -> list[Tensor]:
    return [tensor[block].contiguous().view(torch.uint8).clone() for tensors in cache.tensors for tensor in tensors]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(*pair) for pair in zip(one, other, strict=True))


@pytest.fixture
def source() -> RankCache:
    cache = rank_cache(gives=True)
    generator = torch.Generator().manual_seed(0)
    for tensors in cache.tensors:
        for tensor in tensors:
            tensor.view(torch.uint8).random_(0, 256, generator=generator)
    return cache


@pytest.fixture
def create(api) -> Iterator[Callable[[RankCache], EngineTransfers]]:
    made: list[EngineTransfers] = []

    def create(cache: RankCache) -> EngineTransfers:
        exported = export_cache("nixl", cache)
        gives = cache.signals is not None
        made.append(
            EngineTransfers(
                exported,
                "model",
                "nixl",
                Leases(30.0, 2.0),
                SECRET,
                address=("127.0.0.1", None) if gives else None,
                hosts=None if gives else AllowedHosts(None),
            )
        )
        made[-1].movers = exported.movers
        return made[-1]

    yield create
    for transfers in made:
        transfers.close()
        transfers.movers.close()


def test_blocks_are_written_where_they_belong_as_layers_are(create, source) -> None:
    target = rank_cache(gives=False)
    giver, taker = create(source), create(target)
    giver.leases.open("a")
    giver.leases.fill("a", 0, [5, 2], KEYS[:2], 0)
    fetch = taker.fetch(reference_to(giver), 0, [1, 4], KEYS[:2])
    giver.leases.fill("a", 2, [3], KEYS[2:3], 1)
    giver.leases.complete("a")
    time.sleep(0.1)
    assert not any(tensor.view(torch.uint8).any() for tensors in target.tensors for tensor in tensors)
    source.signals.set(2)
    wait(lambda: fetch.state is not FetchState.UNDER_WAY)
    assert (fetch.state, fetch.num_blocks) == (FetchState.DONE, 2)
    assert fetch.done()
    assert same(content(target, 1), content(source, 5))
    assert same(content(target, 4), content(source, 2))
    for block in (0, 2, 3, 5):
        assert not any(tensor.any() for tensor in content(target, block))


def test_a_source_cannot_write_when_the_sink_has_closed_its_inbox(api, source) -> None:
    target = rank_cache(gives=False)
    giver, taker = nixl.NixlMovers(source), nixl.NixlMovers(target)
    inbox = taker.receive()
    caches = giver.attach(hello(inbox.ranks))
    source.signals.set(1)
    before = caches.begin()
    before.submit(move(2, 3))
    wait(lambda: before.num_moved == 1)
    inbox.close()
    for tensors in target.tensors:
        for tensor in tensors:
            tensor.view(torch.uint8).zero_()
    late = caches.begin()
    late.submit(move(2, 3))
    wait(lambda: late.error is not None)
    assert late.done()
    assert late.num_moved == 0
    assert not any(tensor.any() for tensor in content(target, 3))
    giver.close()
    giver.close()


def move(source: int, target: int) -> Move:
    return Move((source,), (target,), 0)


def hello(ranks: tuple[str, ...], backend: str = "nixl") -> Hello:
    return Hello(PROTOCOL, "engine", "model", "layout", (backend,), False, ranks)


def test_agents_end_when_they_are_closed(monkeypatch) -> None:
    monkeypatch.setattr(nixl, "_load", lambda: IMITATED)
    movers = nixl.NixlMovers(rank_cache(gives=False))
    gc.collect()
    num_before = len(ImitatedAgent.agents)
    inbox = movers.receive()
    assert len(ImitatedAgent.agents) == num_before + 1
    inbox.close()
    assert len(ImitatedAgent.agents) == num_before  # without waiting for a collection


def test_what_nixl_cannot_move_is_lost(create, source, monkeypatch) -> None:
    def refuse(*args):
        raise RuntimeError("no")

    target = rank_cache(gives=False)
    giver, taker = create(source), create(target)
    source.signals.set(1)
    giver.leases.open("a")
    giver.leases.fill("a", 0, [5], KEYS[:1], 0)
    monkeypatch.setattr(nixl, "_pieces", refuse)
    fails(taker.fetch(reference_to(giver), 0, [1], KEYS[:1]), LossReason.NOT_MOVED)


def test_what_a_sink_says_is_checked(api, source) -> None:
    movers = nixl.NixlMovers(source)
    inbox = nixl.NixlMovers(rank_cache(gives=False)).receive()
    good = json.loads(inbox.ranks[0])
    wrong = [
        "",
        "[]",
        json.dumps(good | {"agent": 3}),
        json.dumps(good | {"num_blocks": 0}),
        json.dumps(good | {"num_blocks": True}),
        json.dumps(good | {"addresses": good["addresses"][:1]}),
        json.dumps(good | {"addresses": [[-8, 8], [8]]}),
    ]
    for text in wrong:
        with pytest.raises(TransferError, match="makes no sense"):
            movers.attach(hello((text,)))
    with pytest.raises(TransferError, match="is at 7"):
        movers.attach(hello((json.dumps(good | {"addresses": [[8, 8], [7]]}),)))
    with pytest.raises(TransferError, match="by other"):
        movers.attach(hello(inbox.ranks, "other"))
    with pytest.raises(TransferError, match="2 ranks"):
        movers.attach(hello(inbox.ranks * 2))
    with pytest.raises(TransferError, match="cannot reach"):
        movers.attach(hello((json.dumps(good | {"agent": "AAAA"}),)))
    inbox.close()


def test_what_it_would_move_wrongly_or_slowly_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(nixl, "_load", lambda: IMITATED)
    with pytest.raises(ConfigError, match="this one has 2"):
        nixl.NixlMovers(rank_cache(gives=True, shard=Shard(0, 2)))
    with pytest.raises(ConfigError, match="is in a GPU's"):
        nixl.NixlMovers(rank_cache(gives=True, device="meta"))


@pytest.mark.parametrize(
    ("ways", "is_good"),
    [("tcp,rc", True), ("all", False), ("sm,tcp", False), ("^cma", False), ("^cma,knem,xpmem", True)],
)
def test_ways_past_an_agent_are_refused(monkeypatch, ways, is_good) -> None:
    monkeypatch.setenv("UCX_TLS", ways)
    monkeypatch.setattr(nixl.importlib, "import_module", lambda name: IMITATED)
    if is_good:
        assert nixl._load() is IMITATED
    else:
        with pytest.raises(ConfigError, match="UCX_TLS"):
            nixl._load()


def test_where_it_is_not_installed_that_is_said(monkeypatch) -> None:
    def missing(name: str):
        raise ImportError(name)

    monkeypatch.setenv("UCX_TLS", "tcp")
    monkeypatch.setattr(nixl.importlib, "import_module", missing)
    with pytest.raises(ConfigError, match="pip install nixl"):
        nixl.NixlMovers(rank_cache(gives=False))
