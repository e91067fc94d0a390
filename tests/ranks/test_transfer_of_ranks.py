"""Blocks of an engine of so many ranks become those of an engine of others, and its answers do not change."""

import random
import time
from collections.abc import Callable

import numpy as np
import pytest
from random_models import save_model
from test_latents_of_ranks import MODEL as LATENT_MODEL
from tiny import TINY_SETTINGS, VOCAB_SIZE, drain, save_tiny_model

from stepgraph.config import EngineConfig
from stepgraph.engine.engine import Engine
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.transfer.base import Move, Moves, TransferError
from stepgraph.transfer.messages import PROTOCOL, Hello
from stepgraph.transfer.rank_cache import ExportedCache

PROPOSING = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}}
PROMPT = [random.Random(5).randrange(1, VOCAB_SIZE) for _ in range(100)]
GREEDY = SamplingParams(max_tokens=12, temperature=0.0, ignore_eos=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    """A model with two key/value heads, and one with latents; both have a module to draft with."""
    heads, latents = tmp_path_factory.mktemp("heads"), tmp_path_factory.mktemp("latents")
    save_model(LATENT_MODEL, latents)
    return {"heads": save_tiny_model(heads), "latents": str(latents)}


@pytest.fixture
def create(create_ranked, folders):
    def create(model: str, num_ranks: int, role: str) -> Engine:
        given = TINY_SETTINGS | {"model": folders[model], "device": "cpu", "num_kv_blocks": 65} | PROPOSING
        sizes = {"tensor_parallel_size": num_ranks} if num_ranks > 1 else {}
        return create_ranked(EngineConfig.from_settings(**given, **sizes, splitwise_role=role))

    return create


def hello(exported: ExportedCache, ranks: tuple[str, ...] | None = None) -> Hello:
    layout = exported.layout.digest
    return Hello(PROTOCOL, "source", "model", layout, ("shared_memory",), exported.is_cut, ranks or exported.ranks)


def wait(condition: Callable[[], bool], moves: Moves) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert moves.error is None
        assert time.monotonic() < deadline, moves.num_moved
        time.sleep(1e-3)


def content(executor, blocks: list[int]) -> list[tuple[int, np.ndarray]]:
    """Of each tensor of a rank, the first of the heads that it has, and what it has of blocks."""
    runner = executor.runner
    return [
        (0 if spec.heads is None else spec.heads.begin, tensor[blocks].numpy())
        for spec, cache in zip(runner.layout.specs, runner.caches, strict=True)
        for tensor in cache.block_tensors
    ]


def joined(ranks: list[list[tuple[int, np.ndarray]]]) -> list[np.ndarray]:
    """All heads of each tensor. Those that several ranks have they must have alike."""
    whole = []
    for parts in zip(*ranks, strict=True):
        by_begin: dict[int, np.ndarray] = {}
        for begin, part in parts:
            assert np.array_equal(by_begin.setdefault(begin, part), part), begin
        whole.append(np.concatenate([by_begin[begin] for begin in sorted(by_begin)], axis=2))
    return whole


@pytest.mark.parametrize(
    ("model", "num_sources", "num_sinks"),
    [("heads", 1, 2), ("heads", 2, 1), ("heads", 2, 4), ("latents", 1, 2), ("latents", 2, 1)],
)
def test_blocks_of_other_ranks_are_as_good_as_those_of_ones_own(create, model, num_sources, num_sinks) -> None:
    source, sink = create(model, num_sources, "prefill"), create(model, num_sinks, "decode")
    given, taken = (engine.transfers._cache for engine in (source, sink))
    assert given.layout == taken.layout
    assert len(given.ranks) == num_sources
    num_blocks = (len(PROMPT) - sink.executor.specs.lookahead) // sink.executor.specs.block_size
    there = list(range(1, 1 + num_blocks))  # those that the source will take
    pool = sink.scheduler.blocks
    here = pool.take(7 + num_blocks)[7:]

    caches = taken.movers.attach(hello(given))
    assert caches.num_blocks == source.executor.specs.num_kv_blocks
    moves = caches.begin()
    moves.submit(
        Move(tuple(there[:4]), tuple(here[:4]), 1)
    )  # before it begins with the prompt, which takes steps 0, 1 and 2
    moves.submit(Move(tuple(there[4:]), tuple(here[4:]), 2))
    request = source.add_request("first", PROMPT, GREEDY)
    source.step()
    assert request.blocks[: len(there)] == there[: len(request.blocks)]
    time.sleep(0.02)
    assert moves.num_moved == 0
    drain(source)
    wait(lambda: moves.num_moved == num_blocks, moves)
    moves.cancel()
    wait(moves.done, moves)

    expected, found = (
        joined(engine.executor.on_all(content, blocks)) for engine, blocks in ((source, there), (sink, here))
    )
    assert all(np.array_equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    for block, key in zip(here, request.block_keys, strict=False):
        pool.publish(block, key)
    pool.release(here)
    again = sink.add_request("second", PROMPT, GREEDY)
    drain(sink)
    assert again.num_found == num_blocks
    assert again.output_token_ids == request.output_token_ids

    caches.close()
    with pytest.raises(TransferError, match="makes no sense here"):
        taken.movers.attach(hello(given, ("nonsense",) * num_sources))
