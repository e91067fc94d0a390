"""Groups of ranks on GPUs: what they compute, bit by bit, by either way."""

import pytest
import torch

from stepgraph.bench.collectives import Bench, Options
from stepgraph.bench.ranks import run_ranks
from stepgraph.parallel.exchange import Exchange
from stepgraph.parallel.nccl import NcclGroup
from stepgraph.parallel.shard import Shard
from stepgraph.platforms import create_platform

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def both_ways(shard: Shard, exchange: Exchange) -> list[tuple[str, str]]:
    platform = create_platform("cuda", shard.rank)
    torch.cuda.set_device(platform.device)
    bench = Bench(shard, exchange, platform, Options("cuda", 1536, 3001, 1))
    names = [(bench.group.name, "")]
    bench.check()
    part, residual = bench._random(shard.rank, 3), bench._random(3, 3)
    bench.time(lambda: bench.group.add_sum(part, residual, norm=bench.norm))
    bench.group.close()
    bench.group = NcclGroup(shard, exchange, platform.device, time_limit_s=60.0)
    bench.check()
    with bench.group.loop_back():
        residual = bench._random(3, 2)
        bench.group.add_sum(residual, residual.clone())
    bench.group.abort()
    assert bench.group.fault_flag is not None
    names.append((bench.group.name, str(bench.group.fault_flag.item())))
    return names


def test_pushed_and_gathered_parts_give_the_defined_value() -> None:
    ranks = run_ranks(both_ways, 2)
    assert ranks[0] == ranks[1]
    assert ranks[0][1] == ("nccl", "1")
