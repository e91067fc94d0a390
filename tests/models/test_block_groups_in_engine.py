"""Gemma 3, of whose layers some have a sliding window, in an engine that keeps keys and values by groups of layers."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import HF_CONFIGS, WINDOW, random_hf_model
from tiny import TINY_SETTINGS, drain, save_tiny_model, set_run_ahead

from stepgraph.abi.block_groups import BlockGroups
from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.engine.kv_events import Cleared, KVEvents, Removed
from stepgraph.engine.request import Request
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.step import groups
from stepgraph.step.shape import StepShape
from stepgraph.verify.compositions import Composition, Row
from stepgraph.verify.graphs import verify_shape

BLOCK_SIZE = 16
GROUPED = BlockGroups(1, 2, WINDOW)
"""A layer that sees all tokens, two with a window."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("grouped")
    random_hf_model(HF_CONFIGS["gemma 3"]()).save_pretrained(path)
    return str(path)


def create(folder: str, device: str, **options) -> Engine:
    settings = TINY_SETTINGS | {"dtype": "float32", "block_size": BLOCK_SIZE, "num_kv_blocks": 80} | options
    return build_engine(EngineConfig.from_settings(model=folder, device=device, **settings))


def in_one_group(folder: str, device: str, **options) -> Engine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(groups, "MAX_GROUPS", 1)
        engine = create(folder, device, **options)
    assert engine.executor.specs.groups == BlockGroups()
    return engine


def watch(engine: Engine) -> list[int]:
    """Before each step, all is NaN that nobody holds, the null block included. Returns how many blocks were held at each."""
    launch, counts = engine.executor.launch, []
    tensors = {t.data_ptr(): t for cache in engine.executor.runner.caches for t in cache.block_tensors}.values()

    def launch_over_poison(plan):
        held = {block for request in engine.scheduler.running() for block in request.blocks if block}
        counts.append(len(held))
        for tensor in tensors:
            tensor[[block for block in range(tensor.shape[0]) if block not in held]] = torch.nan
        return launch(plan)

    engine.executor.launch = launch_over_poison
    return counts


def add_all(engine: Engine) -> list[Request]:
    requests = []
    for index, (prompt_len, max_tokens, temperature) in enumerate([(70, 90, 0.0), (9, 120, 0.0), (40, 60, 1.0)]):
        prompt = [(7 * i * (index + 1)) % 90 + 3 for i in range(prompt_len)]
        params = SamplingParams(temperature=temperature, max_tokens=max_tokens, seed=5, ignore_eos=True, logprobs=2)
        requests.append(engine.add_request(f"r{index}", prompt, params))
    drain(engine)
    return requests


def assert_alike(requests: list[Request], expected: list[Request]) -> None:
    for request, other in zip(requests, expected, strict=True):
        assert request.output_token_ids == other.output_token_ids
        for position, as_expected in zip(request.output_logprobs, other.output_logprobs, strict=True):
            assert position.logprob == pytest.approx(as_expected.logprob, abs=1e-4)


@pytest.fixture(scope="module")
def expected(folder, device) -> list[Request]:
    return add_all(in_one_group(folder, device))


@pytest.mark.parametrize(
    ("run_ahead", "options"),
    [
        (0, {}),
        (1, {}),
        (0, {"speculative_method": "ngram", "num_speculative_tokens": 3}),
        (0, {"max_num_batched_tokens": 16, "capture_sizes": None}),
    ],
)
def test_answers_are_those_of_one_group(folder, device, expected, run_ahead, options) -> None:
    engine = create(folder, device, enable_prefix_caching=False, **options)
    assert engine.executor.specs.groups == GROUPED
    set_run_ahead(engine, run_ahead)
    if run_ahead == 0:
        watch(engine)
    assert_alike(add_all(engine), expected)
    assert engine.scheduler.num_free_blocks == 3 * 79


def test_answers_under_pressure_and_from_the_prefix_cache_are_those_of_one_group(folder, device, expected) -> None:
    engine = create(folder, device, num_kv_blocks=12)  # of 33 blocks, two of the requests take 20 of the full layers
    first = add_all(engine)
    assert engine.scheduler.statistics.preemptions
    assert_alike(first, expected)
    again = add_all(create_again := create(folder, device))
    before = create_again.scheduler.statistics.cached_prompt_tokens
    assert_alike(again, expected)
    assert_alike(add_all(create_again), expected)
    assert create_again.scheduler.statistics.cached_prompt_tokens - before >= 64 + 32


def test_at_each_step_others_know_what_the_first_group_has(folder, device) -> None:
    """With preemptions, new weights and a cache that is forgotten."""
    engine = create(folder, device, num_kv_blocks=12, graph_backend="eager")
    engine.scheduler.prefixes.tell(events := KVEvents(10_000))
    known, kinds, step = set(), set(), engine.step

    def step_and_listen():
        updates = step()
        while not events._queue.empty():
            event = events._queue.get_nowait()
            kinds.add(type(event))
            if isinstance(event, Cleared):
                known.clear()
                continue
            keys = set(event.keys)
            assert keys.isdisjoint(known) != isinstance(event, Removed)
            known.symmetric_difference_update(keys)
        assert known == {key for key in engine.scheduler.blocks._blocks_by_key if len(key) == 32}
        return updates

    engine.step = step_and_listen
    add_all(engine)
    assert engine.scheduler.statistics.preemptions
    for lose in (lambda: engine.update_weights(folder), engine.reset_prefix_cache):
        assert known
        lose()
        add_all(engine)
    assert len(kinds) == 3


def test_a_long_context_holds_blocks_of_the_full_layer_and_of_windows(folder, device) -> None:
    engine = create(folder, device, max_num_batched_tokens=32, capture_sizes=None, enable_prefix_caching=False)
    counts = watch(engine)
    request = engine.add_request(
        "long", [i % 90 + 3 for i in range(150)], SamplingParams(max_tokens=90, ignore_eos=True)
    )
    drain(engine)
    assert len(request.output_token_ids) == 90
    assert max(counts) == counts[-1] <= 15 + 2 * (-(-(WINDOW + 1) // BLOCK_SIZE) + 1) < 3 * 15


def test_engines_whose_blocks_travel_keep_all_layers_in_one(folder, device) -> None:
    assert create(folder, device, kv_host_cache_gib=0.01).executor.specs.groups == BlockGroups()


def save_with_modules(folder: Path, num_modules: int) -> str:
    """A model of two layers of each sort, and draft modules with a window."""
    save_tiny_model(folder, num_layers=4, num_mtp_modules=num_modules)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "ministral", "architectures": ["MinistralForCausalLM"], "sliding_window": WINDOW}
    config |= {"layer_types": ["full_attention", "sliding_attention"] * 2}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(
    ("num_modules", "expected"), [(1, BlockGroups(2, 3, WINDOW)), (2, BlockGroups(1, 2, WINDOW + 1))]
)
def test_draft_modules_find_their_entries_in_a_group_of_their_own(tmp_path, device, num_modules, expected) -> None:
    folder = save_with_modules(tmp_path, num_modules)
    engine = create(folder, device, speculative_method="mtp", num_speculative_tokens=3)
    assert engine.executor.specs.groups == expected
    watch(engine)
    assert_alike(add_all(engine), add_all(in_one_group(folder, device)))


def test_graphs_of_groups_are_as_their_eager_twins(tmp_path, device) -> None:
    engine = create(save_with_modules(tmp_path, 1), device, speculative_method="mtp", num_speculative_tokens=3)
    rows = (Row(20, 1, 21), Row(0, 17, 17), Row(33, 4, 34, num_drafts=3), Row(7, 1, 8, active=False), Row(0, 3, 3))
    shape = StepShape(48, 8, num_drafts=3)
    found = verify_shape(engine.executor.runner, shape, [Composition(rows, seed=1)], alone_rows=8)
    assert found.mismatches == []
