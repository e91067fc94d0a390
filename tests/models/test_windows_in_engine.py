"""A model whose layers all have a sliding window, in an engine that releases the KV blocks behind it."""

import pytest
import torch
from checkpoints import HF_CONFIGS, WINDOW, random_hf_model
from tiny import TINY_SETTINGS, drain, set_run_ahead

from stepgraph.abi.block_groups import BlockGroups
from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.scheduler import Scheduler

BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("windowed")
    random_hf_model(HF_CONFIGS["mistral with windows"]()).save_pretrained(path)
    return str(path)


def create(folder: str, device: str, create_scheduler=Scheduler, **options) -> Engine:
    settings = TINY_SETTINGS | {"dtype": "float32", "block_size": BLOCK_SIZE} | options
    return build_engine(
        EngineConfig.from_settings(model=folder, device=device, **settings), create_scheduler=create_scheduler
    )


def keeping_all(*arguments, **options) -> Scheduler:
    return Scheduler(*arguments, **options | {"groups": BlockGroups()})


def poison_free_blocks(engine: Engine) -> None:
    """Nothing may be read that nobody holds, the null block included."""
    held = {block for request in engine.scheduler.running() for block in request.blocks if block}
    for cache in engine.executor.runner.caches:
        for tensor in cache.block_tensors:
            tensor[[block for block in range(tensor.shape[0]) if block not in held]] = torch.nan


def answers(engine: Engine, *, poisoned: bool = False) -> list[list[int]]:
    if poisoned:
        launch = engine.executor.launch

        def launch_over_poison(plan):
            poison_free_blocks(engine)
            return launch(plan)

        engine.executor.launch = launch_over_poison
    requests = []
    for index, (prompt_len, max_tokens, temperature) in enumerate([(70, 90, 0.0), (9, 120, 0.0), (40, 60, 1.0)]):
        prompt = [(7 * i * (index + 1)) % 90 + 3 for i in range(prompt_len)]
        params = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=5, ignore_eos=True)
        requests.append(engine.add_request(f"r{index}", prompt, params))
    drain(engine)
    assert [len(request.output_token_ids) for request in requests] == [90, 120, 60]
    return [request.output_token_ids for request in requests]


@pytest.mark.parametrize(
    ("run_ahead", "speculation"), [(0, {}), (1, {}), (0, {"speculative_method": "ngram", "num_speculative_tokens": 3})]
)
def test_answers_are_those_of_an_engine_that_keeps_all_blocks(folder, device, run_ahead, speculation) -> None:
    kept = create(folder, device, keeping_all, num_kv_blocks=80)
    expected = answers(kept)
    engine = create(folder, device, num_kv_blocks=80, enable_prefix_caching=False, **speculation)
    assert engine.executor.specs.groups == BlockGroups.one(WINDOW)
    set_run_ahead(engine, run_ahead)
    assert answers(engine, poisoned=run_ahead == 0) == expected
    assert engine.scheduler.num_free_blocks == 79


def test_answers_longer_than_the_cache_are_right(folder, device) -> None:
    expected = answers(create(folder, device, keeping_all, num_kv_blocks=80))
    assert answers(create(folder, device, num_kv_blocks=9, max_num_batched_tokens=32, capture_sizes=None)) == expected
