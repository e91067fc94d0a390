"""JSON schemas through the server: every finished answer is valid, streamed or whole, with several answers to a prompt."""

import asyncio
import json
import random
from typing import Any

import openai
import pytest
from json_schemas import check, random_schema
from tiny import EOS

pytest.importorskip("xgrammar", reason="guided answers need xgrammar")

NUM_SCHEMAS = 40
NUM_AT_ONCE = 4
N = 4
ENDINGS = {str(ord(sign) - 32): 4 for sign in '"}],'} | {str(EOS): 30}
"""A bias that keeps random answers short: of the tiny model's tokens, which are bytes."""


async def ask(client: openai.AsyncOpenAI, seed: int, schema: dict[str, Any]) -> list[tuple[str, str]]:
    """Text and finish reason of each answer. Every other request is streamed."""
    fields: dict[str, Any] = {
        "model": "tiny",
        "messages": [{"role": "user", "content": str(seed)}],
        "n": N,
        "seed": seed,
        "max_tokens": 200,
        "logit_bias": ENDINGS,
        "response_format": {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}},
    }
    if seed % 2:
        reply = await client.chat.completions.create(**fields)
        assert [choice.index for choice in reply.choices] == list(range(N))
        return [(choice.message.content, choice.finish_reason) for choice in reply.choices]
    texts, reasons = [""] * N, [""] * N
    async for chunk in await client.chat.completions.create(stream=True, **fields):
        [choice] = chunk.choices
        texts[choice.index] += choice.delta.content or ""
        reasons[choice.index] += choice.finish_reason or ""
    return list(zip(texts, reasons, strict=True))


@pytest.mark.slow
def test_answers_to_random_schemas_are_valid_with_n_whole_and_streamed(tiny_server) -> None:
    rng = random.Random(1)
    schemas = [random_schema(rng) for _ in range(NUM_SCHEMAS)]

    async def ask_all() -> list[list[tuple[str, str]]]:
        room = asyncio.Semaphore(NUM_AT_ONCE)

        async def ask_one(seed: int) -> list[tuple[str, str]]:
            async with room:
                return await ask(client, seed, schemas[seed])

        async with tiny_server.async_client() as client:
            return await asyncio.gather(*map(ask_one, range(NUM_SCHEMAS)))

    num_cut, valid = 0, set()
    for schema, answers in zip(schemas, asyncio.run(ask_all()), strict=True):
        assert len(answers) == N
        for text, reason in answers:
            assert reason in ("stop", "length")
            if reason == "stop":
                check(json.loads(text), schema)
                valid.add(text)
            num_cut += reason == "length"
    assert num_cut < NUM_SCHEMAS * N / 10
    assert len(valid) > NUM_SCHEMAS
    assert tiny_server.metric("steps_total", mode="eager") == 0
