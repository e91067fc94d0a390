"""Blocks of an engine of so many ranks become those of an engine of others, and its answers do not change."""

import random
import time

import numpy as np
import pytest
from random_models import save_model
from test_latents_of_ranks import MODEL as LATENT_MODEL
from tiny import TINY_SETTINGS, VOCAB_SIZE, drain, save_tiny_model

from stepgraph.config import EngineConfig
from stepgraph.engine.engine import Engine
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.transfer.reference import Offer, Reference

PROPOSING = {"speculative_config": {"method": "mtp", "num_speculative_tokens": 2}}
PROMPT = [random.Random(5).randrange(1, VOCAB_SIZE) for _ in range(100)]
FIRST_TOKEN = SamplingParams(max_tokens=1, temperature=0.0)
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


def content(executor, blocks: list[int]) -> list[tuple[int, np.ndarray]]:
    """Of each tensor of a rank, the first of the heads that it has, and what it has of blocks."""
    runner = executor.runner
    return [
        (0 if spec.heads is None else spec.heads.begin, tensor[blocks].numpy())
        for spec, cache in zip(runner.layout.specs, runner.caches, strict=True)
        for tensor in cache.block_tensors
    ]


def joined(engine: Engine, keys: list[bytes]) -> list[np.ndarray]:
    """Of each tensor, all heads of the blocks that the engine has by these names. Those that several ranks have they must have
    alike."""
    blocks = [engine.scheduler.blocks.find(key) for key in keys]
    whole = []
    for parts in zip(*engine.executor.on_all(content, blocks), strict=True):
        by_begin: dict[int, np.ndarray] = {}
        for begin, part in parts:
            assert np.array_equal(by_begin.setdefault(begin, part), part), begin
        whole.append(np.concatenate([by_begin[begin] for begin in sorted(by_begin)], axis=2))
    return whole


@pytest.mark.parametrize(
    ("model", "num_sources", "num_sinks"),
    [("heads", 1, 2), ("heads", 2, 1), ("heads", 2, 4), ("latents", 1, 2), ("latents", 2, 1)],
)
def test_engines_of_other_numbers_of_ranks_go_on_with_a_prompt(create, model, num_sources, num_sinks) -> None:
    source, sink = create(model, num_sources, "prefill"), create(model, num_sinks, "decode")
    there = source.transfers
    offered = source.add_request("r", PROMPT, FIRST_TOKEN, transfer=Offer("lease"))
    request = sink.add_request(
        "r", PROMPT, GREEDY, transfer=Reference(there.engine_id, there.host, there.port, "lease")
    )
    deadline = time.monotonic() + 60
    while any(engine.has_work or engine.exchange.is_active for engine in (source, sink)):
        assert time.monotonic() < deadline, sink.transfers.counts()
        for engine in (source, sink):
            engine.step() if engine.has_work else engine.prepare()
    assert request.num_cached_tokens == 96  # all full blocks of the prompt
    assert request.output_token_ids[0] == offered.output_token_ids[0]
    keys = request.block_keys[:6]
    for mine, theirs in zip(joined(sink, keys), joined(source, keys), strict=True):
        assert np.array_equal(mine, theirs)
    alone = source.add_request("alone", PROMPT, GREEDY)
    drain(source)
    assert request.output_token_ids == alone.output_token_ids
    for engine in (source, sink):
        counts = engine.transfers.counts()
        assert (counts.num_leases, counts.num_fetches, counts.failures) == (0, 0, {})
        assert engine.scheduler.blocks.num_free == engine.scheduler.blocks.num_usable
