"""Blocks come over from the memory of another engine's GPU: here on an imitated driver, on a GPU with the real one too."""

import gc
import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection

import pytest
import torch
from imitated_cuda import imitate_cuda

from stepgraph import ops
from stepgraph.layers.cache import LatentSpec, PagedSpec
from stepgraph.parallel.shard import Shard
from stepgraph.platforms import create_platform
from stepgraph.platforms.cuda_memory import SleepableMemory
from stepgraph.step.memory import CacheLayout
from stepgraph.step.signals import KVSignals
from stepgraph.transfer import cuda_peer
from stepgraph.transfer.base import BlockCopy, Move, TransferError
from stepgraph.transfer.create import create_backend
from stepgraph.transfer.cuda_peer import CudaBackend
from stepgraph.transfer.layout import BlockLayout
from stepgraph.transfer.messages import PROTOCOL, Hello
from stepgraph.transfer.mover import Mover, heads_of
from stepgraph.transfer.rank_cache import RankCache

HEADS, NUM_BLOCKS = 4, 5
CPU = torch.device("cpu")


@pytest.fixture
def driver(monkeypatch):
    return imitate_cuda(monkeypatch)


def rank_cache(shard: Shard, *, shared: bool = True, device: torch.device = CPU) -> RankCache:
    cut = shard.heads(HEADS)
    layout = CacheLayout(
        (PagedSpec(cut.length, 8, torch.bfloat16, heads=cut), LatentSpec(6, torch.bfloat16)), (), 2, 2, 0
    )
    memory = SleepableMemory(layout.sizes(NUM_BLOCKS), device, is_shared=shared)
    caches = layout.allocate(NUM_BLOCKS, memory)
    signals = KVSignals(2, create_platform(device.type)) if shared else None
    return RankCache(BlockLayout.of(layout), shard, tuple(cache.block_tensors for cache in caches), memory, signals)


def hello(*backends: CudaBackend, is_cut: bool = False) -> Hello:
    ranks = tuple(backend.describe() for backend in backends)
    return Hello(PROTOCOL, "engine", "model", "layout", ("cuda",), is_cut, ranks)


@pytest.fixture
def create(driver) -> Iterator:
    """Makes back ends, and closes them."""
    made: list[tuple[CudaBackend, RankCache]] = []

    def create(shard: Shard = Shard(), **options) -> tuple[CudaBackend, RankCache]:  # noqa: B008  # frozen
        cache = rank_cache(shard, **options)
        backend = create_backend("cuda", cache)
        assert isinstance(backend, CudaBackend)
        made.append((backend, cache))
        return backend, cache

    yield create
    for backend, cache in made:
        backend.close()
        cache.memory.free()


def moved_once_written(backend: CudaBackend, sink: RankCache, peer: Hello, sources: list[RankCache]) -> None:
    """Block 3 of two ranks that have half of the heads each comes to block 1, and not before both say that it is there."""
    for cache in sources:
        for tensor in cache.tensors[0]:
            tensor[3] = torch.arange(2.0).view(2, 1) + 2 * cache.shard.rank
        cache.tensors[1][0][3] = 9
    memory = backend.attach(peer)
    mover = Mover(sink.layout, sink.tensors, sink.shard.heads, 0, backend.copy)
    moving = mover.begin(memory, heads_of(peer))
    moving.submit(Move((3,), (1,), 0))
    for cache in sources:
        time.sleep(0.01)
        assert moving.num_moved == 0
        assert not sink.tensors[0][0][1].any()
        cache.signals.set(1)
    deadline = time.monotonic() + 30
    while not moving.num_moved:
        assert moving.error is None
        assert time.monotonic() < deadline
        time.sleep(1e-4)
    heads = torch.arange(4.0).view(4, 1).expand(2, 4, 8).bfloat16()
    assert torch.equal(sink.tensors[0][0][1].cpu(), heads)
    assert torch.equal(sink.tensors[0][1][1].cpu(), heads)
    assert (sink.tensors[1][0][1] == 9).all()
    assert not sink.tensors[0][0][[0, 2, 3, 4]].any()
    mover.close()
    memory.close()
    memory.close()


def test_blocks_come_from_two_ranks_once_both_have_written_them(create, driver) -> None:
    backend, sink = create(shared=False)
    assert backend.describe() == ""
    made = [create(Shard(rank, 2)) for rank in range(2)]
    num_mapped = len(driver.mappings)
    moved_once_written(backend, sink, hello(*(b for b, _ in made), is_cut=True), [cache for _, cache in made])
    assert len(driver.mappings) == num_mapped
    assert driver.handles == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the real driver needs a GPU")
def test_on_a_gpu_blocks_come_from_two_ranks_once_both_have_written_them() -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    sink = rank_cache(Shard(), shared=False, device=device)
    sources = [rank_cache(Shard(rank, 2), device=device) for rank in range(2)]
    backends = [CudaBackend(cache) for cache in sources]
    backend = CudaBackend(sink)
    moved_once_written(backend, sink, hello(*backends, is_cut=True), sources)
    for made in (backend, *backends):
        made.close()


def test_layers_at_equal_distances_are_copied_by_one_launch(create, monkeypatch) -> None:
    launches = []

    def counted(*args) -> None:
        launches.append(args)
        ops.copy_blocks(*args)

    backend, _ = create(shared=False)
    monkeypatch.setattr(cuda_peer, "copy_blocks", counted)
    layout = CacheLayout((PagedSpec(HEADS, 8, torch.bfloat16),) * 3 + (LatentSpec(6, torch.bfloat16),) * 2, (), 2, 2, 0)
    caches = []
    for num_blocks in (NUM_BLOCKS, NUM_BLOCKS + 4):
        memory = SleepableMemory(layout.sizes(num_blocks), CPU, is_shared=False)
        caches.append([tensor for cache in layout.allocate(num_blocks, memory) for tensor in cache.block_tensors])
    for number, tensor in enumerate(caches[0]):
        tensor[:] = torch.arange(NUM_BLOCKS).view(-1, *[1] * (tensor.dim() - 1)) + 10 * number
    pairs = list(zip(*caches, strict=True))
    whole = [BlockCopy(source, (3, 1), target, (2, 8)) for source, target in pairs]
    heads = [BlockCopy(source[:, :, 1:3], (4,), target[:, :, 2:], (6,)) for source, target in pairs[:6]]
    backend.copy([*whole, *heads, BlockCopy(pairs[0][0], (2,), pairs[0][1], (1,)), whole[3], whole[1]])
    # Keys and values of three layers; latents of two, whose distance is no whole number of blocks; heads; and three in no order.
    assert len(launches) == 1 + 2 + 1 + 3
    for number, (_, target) in enumerate(pairs):
        expected = torch.zeros_like(target)
        expected[2], expected[8] = 3 + 10 * number, 1 + 10 * number
        if number < 6:
            expected[6, :, 2:] = 4 + 10 * number
        if number == 0:
            expected[1] = 2
        assert torch.equal(target, expected)


def test_what_makes_no_sense_is_not_mapped(create, driver) -> None:
    backend, _ = create(shared=False)
    source, cache = create()
    peer = hello(source)
    good = json.loads(peer.ranks[0])
    name, num_bytes = good["memory"]
    num_mapped = len(driver.mappings)

    def refuse(match: str, **changes) -> None:
        ranks = (peer.ranks[0], json.dumps(good | changes))  # the first one, which is mapped, must be let go of
        with pytest.raises(TransferError, match=match):
            backend.attach(Hello(PROTOCOL, "engine", "model", "layout", ("cuda",), False, ranks))
        assert len(driver.mappings) == num_mapped
        assert driver.handles == {}

    for memory in ([], [name], [num_bytes, name], [name, True], None):
        refuse("makes no sense", memory=memory)
    for num_blocks in (0, -1, True, "5"):
        refuse("makes no sense", num_blocks=num_blocks)
    refuse("makes no sense", offsets=good["offsets"][:1])
    refuse("not to be had", memory=[name + "x", num_bytes])
    refuse("not to be had", memory=["x" * 200, num_bytes])
    for wrong in (num_bytes + 1, 2 * num_bytes, 0, -num_bytes, 1 << 62):
        refuse("cannot map", memory=[name, wrong])
    for num_blocks in (10**6, 1 << 60, 1 << 62):
        refuse("beyond", num_blocks=num_blocks)
    for offset in (-512, 1, num_bytes):
        refuse("beyond", offsets=[[offset, 0], [0]])
    for token in ("0" * 32, "\ud800"):
        refuse("other memory than was meant", words=[*good["words"][:3], token])
    with pytest.raises(TransferError, match="by other"):
        backend.attach(Hello(PROTOCOL, "engine", "model", "layout", ("other",), False, peer.ranks))
    memory = backend.attach(peer)
    assert memory.tensors(0)[1][0].shape == cache.tensors[1][0].shape
    memory.close()


def test_the_door_gives_to_this_user_alone_and_to_nobody_once_it_is_closed(create, monkeypatch) -> None:
    backend, _ = create(shared=False)
    source, _ = create()
    peer = hello(source)
    mine = os.getuid()
    with monkeypatch.context() as patch:
        patch.setattr(cuda_peer.os, "getuid", lambda: mine + 1)
        with pytest.raises(TransferError, match="another user's"):
            backend.attach(peer)
    with socket.socket(socket.AF_UNIX) as gone:
        gone.connect("\0" + json.loads(peer.ranks[0])["memory"][0])
    gc.collect()  # what other tests have left is not to go meanwhile
    descriptors = len(os.listdir("/proc/self/fd"))
    source.close()
    source.close()
    assert len(os.listdir("/proc/self/fd")) == descriptors - 1
    with pytest.raises(TransferError, match="not to be had"):
        backend.attach(peer)


def test_a_source_that_sleeps_gives_its_memory_back_and_another_one_when_it_wakes_up(create, driver) -> None:
    backend, _ = create(shared=False)
    source, cache = create()
    peer = hello(source)
    mapped = driver.in_use
    cache.memory.release(keep_content=False)
    assert driver.in_use < mapped
    with pytest.raises(TransferError, match="does it sleep"):
        backend.attach(peer)
    cache.memory.restore()
    cache.tensors[0][0][2] = 7
    memory = backend.attach(peer)
    assert (memory.tensors(0)[0][0][2] == 7).all()
    assert driver.handles == {}
    memory.close()


def _give(pipe: Connection) -> None:
    """An engine that has written block 2 and goes on until it is killed."""
    cache = rank_cache(Shard())
    cache.tensors[0][1][2] = 5
    cache.signals.set(1)
    backend = CudaBackend(cache)
    pipe.send(hello(backend))
    pipe.recv()


def test_what_was_mapped_of_a_process_that_is_killed_stays(create, driver) -> None:
    backend, sink = create(shared=False)
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=_give, args=(there,), daemon=True)
    process.start()
    there.close()
    peer = here.recv()
    memory = backend.attach(peer)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert memory.has_written(0, 0, 0)
    assert not memory.has_written(0, 0, 1)
    backend.copy([BlockCopy(memory.tensors(0)[0][1], (2, 0), sink.tensors[0][1], (4, 1))])
    assert (sink.tensors[0][1][4] == 5).all()
    assert not sink.tensors[0][1][1].any()
    memory.close()
    with pytest.raises(TransferError, match="not to be had"):
        backend.attach(peer)
