"""Blocks come over from memory of other processes, and what is said of that memory is checked."""

import json
import time
from dataclasses import replace

import pytest
import torch

from stepgraph.errors import ConfigError
from stepgraph.layers.cache import LatentSpec, PagedSpec
from stepgraph.parallel.shard import Shard
from stepgraph.platforms import create_platform
from stepgraph.step.memory import CacheLayout
from stepgraph.step.signals import KVSignals
from stepgraph.transfer.base import Move, TransferError
from stepgraph.transfer.create import create_backend, export_cache
from stepgraph.transfer.layout import BlockLayout
from stepgraph.transfer.messages import PROTOCOL, Hello
from stepgraph.transfer.mover import Mover, heads_of
from stepgraph.transfer.rank_cache import RankCache

HEADS, NUM_BLOCKS = 4, 5


def rank_cache(shard: Shard, *, shared: bool) -> RankCache:
    cut = shard.heads(HEADS)
    layout = CacheLayout(
        (PagedSpec(cut.length, 3, torch.float32, heads=cut), LatentSpec(5, torch.bfloat16)), (), 2, 2, 0
    )
    platform = create_platform("cpu")
    memory = platform.memory(layout.sizes(NUM_BLOCKS), sleepable=False, shared=shared)
    caches = layout.allocate(NUM_BLOCKS, memory)
    signals = KVSignals(2, platform) if shared else None
    return RankCache(BlockLayout.of(layout), shard, tuple(cache.block_tensors for cache in caches), memory, signals)


def hello(ranks: tuple[str, ...], *, is_cut: bool) -> Hello:
    return Hello(PROTOCOL, "engine", "model", "layout", ("shared_memory",), is_cut, ranks)


@pytest.fixture
def sources() -> list[RankCache]:
    """Two ranks. Each head is filled with its number, each latent with 9."""
    made = [rank_cache(Shard(rank, 2), shared=True) for rank in range(2)]
    for cache in made:
        for tensor in cache.tensors[0]:
            tensor[3] = torch.arange(2.0).view(2, 1) + 2 * cache.shard.rank
        cache.tensors[1][0][3] = 9
    return made


def test_blocks_come_from_two_ranks_once_both_have_written_them(sources) -> None:
    sink = rank_cache(Shard(), shared=False)
    backend = create_backend("shared_memory", sink)
    assert backend.describe() == ""
    peer = hello(tuple(create_backend("shared_memory", cache).describe() for cache in sources), is_cut=True)
    memory = backend.attach(peer)
    mover = Mover(sink.layout, sink.tensors, sink.shard.heads, 0, backend.copy)
    try:
        moving = mover.begin(memory, heads_of(peer))
        moving.submit(Move((3,), (1,), 0))
        for count, cache in enumerate(sources):
            time.sleep(0.01)
            assert moving.num_moved == 0
            assert not sink.tensors[0][0][1].any(), count
            cache.signals.set(1)
        while not moving.num_moved:
            assert moving.error is None
            time.sleep(1e-4)
        assert torch.equal(sink.tensors[0][0][1], torch.arange(4.0).view(4, 1).expand(2, 4, 3))
        assert (sink.tensors[1][0][1] == 9).all()
        memory.tensors(0)[0][0][3] = 7  # nobody else's
        assert not (sources[0].tensors[0][0] == 7).any()
    finally:
        mover.close()


def test_what_makes_no_sense_is_not_mapped(sources) -> None:
    backend = create_backend("shared_memory", rank_cache(Shard(), shared=False))
    source = rank_cache(Shard(), shared=True)
    good = json.loads(create_backend("shared_memory", source).describe())
    memory = good["memory"]
    wrong = [
        "",
        "[]",
        json.dumps(good | {"num_blocks": True}),
        json.dumps(good | {"num_blocks": 0}),
        json.dumps(good | {"offsets": good["offsets"][:1]}),
        json.dumps(good | {"memory": memory[:3]}),
        json.dumps(good | {"memory": [*memory[:3], 5]}),
        json.dumps(good | {"words": memory}),
    ]
    for text in wrong:
        with pytest.raises(TransferError, match="makes no sense"):
            backend.attach(hello((text,), is_cut=False))
    beyond = [
        good | {"num_blocks": 10**15},
        good | {"offsets": [[-8, 0], [0]]},
        good | {"offsets": [[0, memory[2]], [0]]},
    ]
    for said in beyond:
        with pytest.raises(TransferError, match="beyond"):
            backend.attach(hello((json.dumps(said),), is_cut=False))
    backend.attach(hello((json.dumps(good),), is_cut=False))
    source.memory.free()
    with pytest.raises(TransferError, match="cannot be mapped"):
        backend.attach(hello((json.dumps(good),), is_cut=False))
    with pytest.raises(TransferError, match="by other"):
        backend.attach(replace(hello(("",), is_cut=False), backends=("other",)))


def test_caches_that_lie_elsewhere_are_refused_by_name() -> None:
    cache = rank_cache(Shard(), shared=False)
    on_device = replace(cache, tensors=tuple(tuple(tensor.to("meta") for tensor in of) for of in cache.tensors))
    for name, given in (("shared_memory", on_device), ("cuda", cache)):
        with pytest.raises(ConfigError, match=f"kv_transfer_backend='{name}'.*use auto"):
            export_cache(name, given)
