"""Blocks of an engine of so many ranks become those of an engine of others, and its answers do not change."""

import os
import random
import signal
import time
from collections.abc import Callable

import numpy as np
import pytest
from checkpoints import HF_CONFIGS, random_hf_model
from random_models import save_model
from test_latents_of_ranks import MODEL as LATENT_MODEL
from tiny import TINY_SETTINGS, VOCAB_SIZE, drain, save_tiny_model

from stepgraph.config import EngineConfig
from stepgraph.engine.engine import Engine
from stepgraph.engine.request import Request
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import EngineDeadError
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


def add(source: Engine, sink: Engine) -> tuple[Request, Request]:
    """The prompt, to both."""
    where = source.transfers
    reference = Reference(where.engine_id, where.host, where.port, "lease")
    offered = source.add_request("r", PROMPT, FIRST_TOKEN, transfer=Offer("lease"))
    return offered, sink.add_request("r", PROMPT, GREEDY, transfer=reference)


def run_until(condition: Callable[[], bool], *engines: Engine) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, [engine.transfers.counts() for engine in engines]
        for engine in engines:
            engine.step() if engine.has_work else engine.prepare()


def has_ended(*engines: Engine) -> bool:
    return not any(engine.has_work or engine.exchange.is_active for engine in engines)


def is_at_rest(engine: Engine) -> bool:
    counts, blocks = engine.transfers.counts(), engine.scheduler.blocks
    return (counts.num_leases, counts.num_fetches, blocks.num_free) == (0, 0, blocks.num_usable)


@pytest.mark.parametrize(
    ("model", "num_sources", "num_sinks"),
    [("heads", 1, 2), ("heads", 2, 1), ("heads", 2, 4), ("latents", 1, 2), ("latents", 2, 1)],
)
def test_engines_of_other_numbers_of_ranks_go_on_with_a_prompt(create, model, num_sources, num_sinks) -> None:
    check_that_one_goes_on(create(model, num_sources, "prefill"), create(model, num_sinks, "decode"))


@pytest.mark.parametrize(("num_sources", "num_sinks"), [(1, 2), (2, 1)])
def test_layers_that_differ_in_their_heads_are_cut_each_by_its_own(create_ranked, tmp_path, num_sources, num_sinks):
    """Of Gemma 4: two key/value heads of 16, which ranks share, and one of 32, which both have."""
    config = HF_CONFIGS["gemma 4 12b"]()
    config.vocab_size = VOCAB_SIZE
    random_hf_model(config).save_pretrained(tmp_path)
    settings = TINY_SETTINGS | {"model": str(tmp_path), "device": "cpu", "num_kv_blocks": 65, "graph_backend": "eager"}
    ranks = {"prefill": num_sources, "decode": num_sinks}
    engines = [
        create_ranked(EngineConfig.from_settings(**settings, splitwise_role=role, tensor_parallel_size=number))
        for role, number in ranks.items()
    ]
    check_that_one_goes_on(*engines)


def check_that_one_goes_on(source: Engine, sink: Engine) -> None:
    """With a prompt that the other has computed, and has the same keys and values."""
    offered, request = add(source, sink)
    run_until(lambda: has_ended(source, sink), source, sink)
    assert request.num_cached_tokens == 96  # all full blocks of the prompt
    assert request.output_token_ids[0] == offered.output_token_ids[0]
    keys = request.block_keys[:6]
    for mine, theirs in zip(joined(sink, keys), joined(source, keys), strict=True):
        assert np.array_equal(mine, theirs)
    alone = source.add_request("alone", PROMPT, GREEDY)
    drain(source)
    assert request.output_token_ids == alone.output_token_ids
    for engine in (source, sink):
        assert is_at_rest(engine)
        assert engine.transfers.counts().failures == {}


def test_a_sink_of_which_a_rank_is_killed_ends_and_leaves_nothing_with_its_source(create) -> None:
    source, sink = create("heads", 1, "prefill"), create("heads", 2, "decode")
    add(source, sink)
    source.step()  # a part of the prompt
    (lease,) = source.transfers.leases._leases.values()
    run_until(lambda: lease.tell is not None, sink)  # somebody reads it
    (worker,) = (report.pid for report in sink.executor.rank_reports()[1:])
    os.kill(worker, signal.SIGKILL)
    with pytest.raises(EngineDeadError, match="rank 1 was ended by SIGKILL"):
        run_until(lambda: False, sink)
    sink.shutdown()
    run_until(lambda: has_ended(source), source)
    assert is_at_rest(source)
    assert source.transfers.counts().leases_ended == {"dropped": 1}
