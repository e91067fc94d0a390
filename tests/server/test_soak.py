"""Hundreds of requests of all kinds at once, many of them abandoned: nothing is lost, nothing leaks.

`scripts/soak.py` sends thousands, of ever new schemas.
"""

import asyncio

import aiohttp
import pytest
from soak_traffic import TOOL_KINDS, Reply, ask, fault, kind_of, leaves_after, rss_mib

NUMBERS = [number for number in range(100) if kind_of(number) not in TOOL_KINDS]
CONCURRENT, PASSES = 32, 3
ALONE = [number for number in NUMBERS if leaves_after(number) is None][::7]
LEVEL_MIB = 4.0
"""Requests that were there before leave nothing new behind: 160 more of them, less than 26 KiB each."""


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_leaks(tiny_server) -> None:
    pids = tiny_server.process.pid, tiny_server.engine_pid()
    memory: list[list[float]] = []

    async def run() -> tuple[list[Reply | None], list[Reply | None]]:
        gate = asyncio.Semaphore(CONCURRENT)
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as http:

            async def one(number: int) -> Reply | None:
                async with gate:
                    return await ask(http, tiny_server.url, number, leaves=leaves_after(number))

            alone = [await ask(http, tiny_server.url, number, leaves=None) for number in ALONE]
            together: list[Reply | None] = []
            for _ in range(PASSES):
                together += await asyncio.gather(*map(one, NUMBERS))
                memory.append([rss_mib(pid) for pid in pids])
            return alone, together

    alone, together = asyncio.run(run())
    for number, reply in zip(NUMBERS * PASSES, together, strict=True):
        assert leaves_after(number) is not None if reply is None else fault(number, reply) is None, (number, reply)
    for number, reply in zip(
        ALONE, alone, strict=True
    ):  # greedy or with a seed, an answer does not depend on its neighbours
        assert together[NUMBERS.index(number) :: len(NUMBERS)] == [reply] * PASSES, number
    tiny_server.wait_idle()
    assert tiny_server.metric("kv_cache_usage_perc") == 0
    assert tiny_server.metric("num_requests_waiting") == 0
    assert tiny_server.metric("steps_total", mode="eager") == 0
    assert tiny_server.metric("steps_total", mode="graph") > 100
    growth = [after - before for before, after in zip(memory[0], memory[-1], strict=True)]
    assert max(growth) < LEVEL_MIB, memory
