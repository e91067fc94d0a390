"""Hundreds of requests of all kinds at once, many of them abandoned: nothing is lost, nothing leaks."""

import asyncio
import random
import re
from pathlib import Path

import openai
import pytest

REQUESTS, CONCURRENT = 300, 32
REGEX = "[a-z]{3,12}"


def fields_of(number: int) -> dict:
    """Of request `number`: lengths, sampling, guidance."""
    rng = random.Random(number)
    fields = {
        "model": "tiny",
        "prompt": [rng.randrange(1, 257) for _ in range(rng.choice((1, 5, 30, 120)))],
        "max_tokens": rng.choice((1, 8, 24, 60)),
        "temperature": rng.choice((0, 0, 0.7, 1.2)),
        "seed": number,
        "extra_body": {},
    }
    kind = number % 6
    if kind == 1:
        fields |= {"n": 3}
    elif kind == 2:
        fields |= {"logprobs": 3, "presence_penalty": 0.5, "logit_bias": {"65": 5.0}}
    elif kind == 3:
        fields["max_tokens"] = 40
        fields["extra_body"] |= {"structured_outputs": {"regex": REGEX}}
    elif kind == 4:
        fields["extra_body"] |= {"top_k": 20, "min_p": 0.01, "repetition_penalty": 1.2, "min_tokens": 1}
    elif kind == 5:
        fields |= {"stop": ["\n", "ab"], "echo": True}
    return fields


async def answer(client: openai.AsyncOpenAI, number: int, *, leave: bool) -> list[tuple[str, str | None]] | None:
    """Texts and finish reasons of a streamed answer; None if it was left after its first chunks."""
    found: dict[int, list] = {}
    async with await client.completions.create(**fields_of(number), stream=True) as stream:
        count = 0
        async for chunk in stream:
            for choice in chunk.choices:
                entry = found.setdefault(choice.index, ["", None])
                entry[0] += choice.text
                entry[1] = choice.finish_reason or entry[1]
            count += 1
            if leave and count >= 1 + number % 3:
                return None
    return [tuple(entry) for _, entry in sorted(found.items())]


def rss_mib(pid: int) -> float:
    """Memory of a process."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024


@pytest.mark.slow
def test_nothing_is_lost_and_nothing_leaks(tiny_server) -> None:
    pids = tiny_server.process.pid, tiny_server.engine_pid()

    async def run() -> tuple[list, list, list[list[float]]]:
        async with openai.AsyncOpenAI(base_url=f"{tiny_server.url}/v1", api_key="none", max_retries=0) as client:
            alone = [await answer(client, number, leave=False) for number in range(0, REQUESTS, 25)]
            gate = asyncio.Semaphore(CONCURRENT)

            async def one(number: int):
                async with gate:
                    return await answer(client, number, leave=number % 3 == 0)

            memory, together = [], []
            for begin in range(0, REQUESTS, 100):
                together += await asyncio.gather(*(one(number) for number in range(begin, begin + 100)))
                memory.append([rss_mib(pid) for pid in pids])
            return alone, together, memory

    alone, together, memory = asyncio.run(run())
    for number, result in enumerate(together):
        if number % 3 == 0:
            continue
        assert len(result) == fields_of(number).get("n", 1), number
        assert all(reason in ("stop", "length") for _, reason in result), (number, result)
        if number % 6 == 3:
            assert all(re.fullmatch(REGEX, text) for text, reason in result if reason == "stop"), (number, result)
    checked = 0
    for number, result in zip(range(0, REQUESTS, 25), alone, strict=True):
        if number % 3:  # sampled with a seed or greedy, an answer does not depend on its neighbours
            assert together[number] == result, number
            checked += 1
    assert checked >= 6
    tiny_server.wait_idle()
    assert tiny_server.metric("kv_cache_usage_perc") == 0
    assert tiny_server.metric("num_requests_waiting") == 0
    assert tiny_server.metric("steps_total", mode="eager") == 0
    assert tiny_server.metric("steps_total", mode="graph") > 100
    growth = [after - before for before, after in zip(memory[0], memory[-1], strict=True)]
    assert max(growth) < 40, memory
