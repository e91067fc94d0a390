"""Time what brings KV blocks from one process's GPU memory to another's, by the number of thread blocks that copy.

    python scripts/time_block_copies.py --devices 0 1 --json copies.json

The source fills its cache, block by block with different bytes, and stands by. The sink maps that memory and copies a
prompt's blocks, scattered at both ends, as a mover does; what arrived is compared. By numbers of programs it is the device's
time, "waited" is a mover's, eight layers at a time. What torch takes for as many bytes within the sink's memory is beside them:
there, as with one GPU for both, a byte is read from and written to the same memory.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

import torch

from stepgraph import ops
from stepgraph.bench.report import machine, table, write_json
from stepgraph.layers.cache import PagedSpec
from stepgraph.parallel.shard import Cut, Shard
from stepgraph.platforms import create_platform
from stepgraph.step.memory import CacheLayout
from stepgraph.step.signals import KVSignals
from stepgraph.transfer.base import BlockCopy
from stepgraph.transfer.cuda_peer import NUM_PROGRAMS, CudaBackend
from stepgraph.transfer.layout import BlockLayout
from stepgraph.transfer.messages import PROTOCOL, Hello
from stepgraph.transfer.rank_cache import RankCache

PROGRAMS = (4, 8, 16, 24, 32, 64, 132)
LAYERS_AT_ONCE = 8


def rank_cache(arguments: argparse.Namespace) -> RankCache:
    """Of a model of the shape asked for, in this process's current GPU."""
    spec = PagedSpec(arguments.heads, arguments.head_dim, torch.bfloat16, heads=Cut.whole(arguments.heads))
    layout = CacheLayout((spec,) * arguments.layers, (), arguments.block_size, 2, 0)
    platform = create_platform("cuda")
    num_blocks = 2 * arguments.blocks
    memory = platform.memory(layout.sizes(num_blocks), sleepable=False, shared=True)
    caches = layout.allocate(num_blocks, memory)
    signals = KVSignals(arguments.layers, platform)
    return RankCache(BlockLayout.of(layout), Shard(), tuple(cache.block_tensors for cache in caches), memory, signals)


def see(device: int) -> None:
    """Make a GPU the only one of this process, before CUDA is used."""
    seen = os.environ.get("CUDA_VISIBLE_DEVICES")
    os.environ["CUDA_VISIBLE_DEVICES"] = str(device) if seen is None else seen.split(",")[device]


def give(pipe: Connection, device: int, arguments: argparse.Namespace) -> None:
    """Be the source, until the pipe is closed."""
    see(device)
    cache = rank_cache(arguments)
    for number, tensor in enumerate(tensor for tensors in cache.tensors for tensor in tensors):
        blocks = torch.arange(tensor.shape[0], device=tensor.device) + number
        tensor.copy_((blocks % 251).view(-1, 1, 1, 1).expand_as(tensor))
    torch.cuda.synchronize()
    backend = CudaBackend(cache)
    pipe.send(Hello(PROTOCOL, "source", "model", "layout", ("cuda",), False, (backend.describe(),)))
    pipe.recv()


def device_ms(work: Any) -> float:
    """What the device takes, launched at once."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(20_000_000)
    start.record()
    work()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def waited_ms(work: Any) -> float:
    """What the host waits."""
    started = time.perf_counter()
    work()
    return 1e3 * (time.perf_counter() - started)


def take(arguments: argparse.Namespace, peer: Hello) -> dict[str, Any]:
    """Be the sink: map, copy, compare, time."""
    cache = rank_cache(arguments)
    backend = CudaBackend(cache)
    started = time.perf_counter()
    memory = backend.attach(peer)
    attach_ms = 1e3 * (time.perf_counter() - started)
    generator = torch.Generator().manual_seed(0)
    source, target = (
        tuple(torch.randperm(2 * arguments.blocks - 1, generator=generator)[: arguments.blocks].add(1).tolist())
        for _ in range(2)
    )
    theirs, ours = ([t for of in tensors for t in of] for tensors in (memory.tensors(0), cache.tensors))
    copies = [BlockCopy(a, source, b, target) for a, b in zip(theirs, ours, strict=True)]
    numbers = [torch.tensor(blocks, dtype=torch.int32, device=ours[0].device) for blocks in (source, target)]

    def launch(programs: int) -> None:
        for a, _, b, _ in copies:
            ops.copy_blocks(a, numbers[0], b, numbers[1], programs)

    def move() -> None:
        per_layer = len(copies) // arguments.layers
        for begin in range(0, len(copies), LAYERS_AT_ONCE * per_layer):
            backend.copy(copies[begin : begin + LAYERS_AT_ONCE * per_layer])

    move()
    for number, tensor in enumerate(ours):
        expected = ((numbers[0] + number) % 251).to(tensor.dtype).view(-1, 1, 1, 1)
        assert (tensor[numbers[1].long()] == expected).all(), number
        assert not tensor[0].any(), number
    num_bytes = arguments.blocks * sum(tensor[0].nbytes for tensor in ours)
    rows: dict[str, float] = {}
    for programs in PROGRAMS:
        launch(programs)
        rows[f"{programs} programs"] = median(device_ms(partial(launch, programs)) for _ in range(arguments.repeats))
    half = ours[0].shape[0] // 2
    whole = [(tensor[:half], tensor[half : 2 * half]) for tensor in ours]
    local = median(device_ms(lambda: [b.copy_(a) for a, b in whole]) for _ in range(arguments.repeats))
    moved = [waited_ms(move) for _ in range(5 + arguments.repeats)][5:]
    result = {
        "bytes": num_bytes,
        "attach_ms": attach_ms,
        "kernels_ms": rows,
        "waited_ms": median(moved),
        "torch_local_ms": local * num_bytes / sum(a.nbytes for a, _ in whole),
    }
    torch.cuda.synchronize()
    memory.close()
    backend.close()
    return result


def main() -> None:
    """Start the source, be the sink, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, nargs=2, default=[0, 1], help="GPU of the source and of the sink")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--block-size", type=int, default=16)
    parser.add_argument("--blocks", type=int, default=512, help="of the prompt")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=give, args=(there, arguments.devices[0], arguments), daemon=True
    )
    process.start()
    there.close()
    see(arguments.devices[1])
    result = take(arguments, here.recv())
    process.kill()
    times = result["kernels_ms"] | {
        f"waited, {NUM_PROGRAMS} programs": result["waited_ms"],
        "torch, within the sink": result["torch_local_ms"],
    }
    print(f"{result['bytes'] / 1e9:.2f} GB, mapped in {result['attach_ms']:.1f} ms; right\n")
    print(
        table(
            ("copy", "ms", "GB/s"), [(n, f"{ms:.2f}", f"{result['bytes'] / ms / 1e6:.0f}") for n, ms in times.items()]
        )
    )
    if arguments.json:
        where = machine("cuda:0")
        write_json(arguments.json, {"machine": where, "devices": arguments.devices, "shape": str(arguments), **result})


if __name__ == "__main__":
    main()
