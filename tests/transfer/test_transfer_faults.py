"""Whatever goes wrong between two engines: the answer is that of one engine, the reason is counted, and nothing is left over."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import replace

import pytest
from engine_pairs import failures
from faults import Change, without

from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.transfer.messages import (
    Arrived,
    Complete,
    Confirmed,
    Filled,
    Hello,
    Lost,
    Message,
    encode,
)


def changing(kind: type[Message], **changes) -> Change:
    """A link on which messages of a kind have other fields: values, or what makes one of the message."""

    def change(message: Message) -> Iterable[Message]:
        if not isinstance(message, kind):
            return (message,)
        values = {name: value(message) if callable(value) else value for name, value in changes.items()}
        return (replace(message, **values),)

    return change


def instead_of(kind: type[Message], *others: Message | bytes) -> Change:
    """A link on which something else comes."""
    return lambda message: others if isinstance(message, kind) else (message,)


def before(kind: type[Message], make) -> Change:
    """A link on which something comes too early."""
    return lambda message: (make(message), message) if isinstance(message, kind) else (message,)


def framed(content: bytes) -> bytes:
    return struct.pack("!I", len(content)) + content


CASES = {
    "a block beyond the source's memory": (
        changing(Filled, blocks=lambda m: tuple(b + 10**6 for b in m.blocks)),
        "out_of_range",
    ),
    "the block after its last one": (changing(Filled, blocks=lambda m: (257,) * len(m.blocks)), "out_of_range"),
    "a block before its memory": (changing(Filled, blocks=lambda m: (-1,) * len(m.blocks)), "out_of_range"),
    "no block": (changing(Filled, blocks=lambda m: (0,) * len(m.blocks)), "out_of_range"),
    "blocks of another prompt": (changing(Filled, keys=lambda m: ("ab" * 32,) * len(m.keys)), "other_blocks"),
    "blocks in another order": (changing(Filled, keys=lambda m: m.keys[::-1]), "other_blocks"),
    "blocks from elsewhere in the prompt": (changing(Filled, start=lambda m: m.start + 1), "protocol|other_blocks"),
    "an engine that was started anew": (changing(Hello, engine="another"), "stale"),
    "other weights": (changing(Hello, model="others"), "other_model"),
    "another cache": (changing(Hello, layout="another"), "other_layout"),
    "another protocol": (changing(Hello, protocol=2), "protocol"),
    "no way to move bytes": (changing(Hello, backends=()), "backend"),
    "nonsense": (instead_of(Filled, framed(b'{"kind": "Filled"}')), "protocol"),
    "no JSON": (instead_of(Filled, framed(b"\0" * 9)), "protocol"),
    "an endless message": (instead_of(Filled, struct.pack("!I", 1 << 31)), "protocol"),
    "half a message": (instead_of(Complete, framed(encode(Complete("lease", 4)))[:20]), "link"),
    "nothing more": (instead_of(Complete, b""), "link"),
    "a lost Filled": (without(Filled), "timeout|protocol|not_complete|other_blocks"),
    "a lost Complete": (without(Complete), "timeout"),
    "a lost Confirmed": (without(Confirmed), "timeout"),
    "Confirmed before anything was": (before(Complete, lambda m: Confirmed(m.lease)), "protocol"),
    "Arrived where the sink moves": (before(Complete, lambda m: Arrived(m.lease, m.num_blocks)), "protocol"),
    "Hello again": (before(Complete, lambda m: Hello(1, "a", "b", "c", (), False, ())), "protocol"),
    "a reason that nobody knows": (instead_of(Complete, Lost("lease", "whim")), "protocol|timeout"),
}


PROMPTS = [tuple((7 * i * (n + 3) + n * n) % 255 + 1 for i in range(100 + 20 * n)) for n in range(6)]
GREEDY = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
SAMPLED = SamplingParams(temperature=0.8, seed=7, max_tokens=8, ignore_eos=True, logprobs=2)
LATE_S = 0.5
"""Patience where nothing else helps."""


@pytest.mark.parametrize("case", CASES)
def test_what_a_link_does_to_messages_costs_a_computation_and_nothing_else(case, world, answer) -> None:
    change, reasons = CASES[case]
    before = failures(world.sink)
    with world.tapped(to_sink=change, **{"timeout_s": LATE_S} if "timeout" in reasons else {}):
        requests = [world.begin(f"{case} {n}", PROMPTS[n], GREEDY) for n in range(2)]
        world.run(*requests)
        assert [request.output_token_ids for request in requests] == [answer(prompt, GREEDY) for prompt in PROMPTS[:2]]
        counted = failures(world.sink) - before
        assert counted.total() == 2, counted
        assert {*counted} <= {*reasons.split("|")}, counted
        world.check_at_rest()
