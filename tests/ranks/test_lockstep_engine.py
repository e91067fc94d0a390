"""Ranks with requests of their own, which share experts: the tokens of one device, whoever has how much to do, and their end."""

import os
import signal
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count, pairwise
from pathlib import Path

import pytest
from random_engines import random_case, run_case
from tiny import drain
from tiny_mixture import NUM_EXPERTS, save_tiny_mixture

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.engine.request import FinishReason
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.step_recorder import StepRecorder
from stepgraph.errors import ConfigError, EngineDeadError, ModelError
from stepgraph.executor.ranked import build_ranked_executor
from stepgraph.models.source import resolve
from stepgraph.server.engine_report import graphs_of, load_of, ranks_of, ready_of, step_info
from stepgraph.step.shape import Variant
from stepgraph.verify.graphs import verify_graphs

sys.path.append(str(Path(__file__).parents[1] / "executor"))
import rank_faults

CASES = [(number, 2 + number % 3) for number in (342, 1453)]
SETTINGS = {
    "device": "cpu",
    "dtype": "float32",
    "max_num_seqs": 3,
    "max_num_batched_tokens": 16,
    "capture_sizes": (4, 16),
    "capture_rows": (3,),
    "num_kv_blocks": 60,
    "block_size": 8,
}
TWO = {"data_parallel_size": 2, "enable_expert_parallel": True}
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [list(range(1, 60)), [7, 7, 7], list(range(20, 52)), [50, 3, 9], [4] * 20]


@pytest.mark.parametrize(("number", "num_ranks"), CASES)
def test_a_random_engine_gives_the_tokens_of_one_rank(number, num_ranks, tmp_path, create_ranked) -> None:
    outcome = run_case(random_case(number, num_ranks, lockstep=True), tmp_path, create_ranked)
    assert outcome.tokens > 0
    assert outcome.ties <= 1, outcome


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_tiny_mixture(tmp_path_factory.mktemp("mixture"))


@pytest.fixture(scope="module")
def one_layer(tmp_path_factory) -> str:
    """Where it is steps that count."""
    return save_tiny_mixture(tmp_path_factory.mktemp("one_layer"), num_layers=1)


def config_of(model: str, **settings) -> EngineConfig:
    return EngineConfig.from_settings(**SETTINGS | {"model": model} | settings)


def answers(engine: Engine, prompts=PROMPTS, params: SamplingParams = GREEDY) -> list[list[int]]:
    """Of all prompts at once."""
    requests = [engine.add_request(str(i), prompt, params) for i, prompt in enumerate(prompts)]
    drain(engine)
    assert [request.error for request in requests] == [None] * len(prompts)
    return [list(request.output_token_ids) for request in requests]


@pytest.mark.slow
def test_a_rank_without_requests_takes_part_in_a_thousand_steps(one_layer, create_ranked) -> None:
    params = SamplingParams(temperature=0, max_tokens=250, ignore_eos=True)
    [expected] = answers(create_ranked(config_of(one_layer)), [[5, 6, 7]], params)
    two = create_ranked(config_of(one_layer, **TWO))
    busy = []
    two.on_step = lambda report: busy.append([len(part.table) for part in report.results.ranks])
    for _ in range(4):
        assert answers(two, [[5, 6, 7]], params) == [expected]
    assert busy == [[1, 0]] * 1000
    assert not two.prepare()  # where ranks are asked whether they have run as many steps
    again = answers(two, [[5, 6, 7]] * 2, SamplingParams(temperature=0, max_tokens=9, ignore_eos=True))
    assert again == [expected[:9]] * 2
    assert busy[1000:] == [[1, 1]] * 9


def test_a_step_like_the_one_before_costs_16_bytes(model, create_ranked) -> None:
    two = create_ranked(config_of(model, **TWO, block_size=64))
    requests = [two.add_request(str(i), [3 + i], SamplingParams(max_tokens=40, ignore_eos=True)) for i in range(4)]
    ring, written = two.executor._workers.ring, []
    two.on_step = lambda report: written.append(ring._written)
    drain(two)
    assert all(len(request.output_token_ids) == 40 for request in requests)
    costs = [after - before for before, after in pairwise(written)]
    assert costs[4:] == [4] * len(costs[4:])  # int32


def test_reports_are_of_all_ranks_together_and_of_each(model, create_ranked) -> None:
    two, infos = create_ranked(config_of(model, **TWO)), []
    two.on_step = lambda report: infos.append(step_info(report))
    recorder = StepRecorder(two, count(1))
    for i in range(5):
        two.add_request(str(i), [3 + i] * (1 + i), GREEDY)
    two.step()
    assert (load_of(two).num_running, load_of(two).num_waiting) == (5, 0)
    assert sorted(rank.num_running for rank in ranks_of(two)) == [2, 3]
    assert [rank["num_running"] for rank in graphs_of(two)["ranks"]] == [rank.num_running for rank in ranks_of(two)]
    ready = ready_of(two)
    assert (ready.max_num_seqs, ready.num_kv_blocks, ready.num_ranks) == (6, 120, 2)
    drain(two)
    statistics = two.executor.statistics
    assert infos[0].num_ranks == 2
    assert sum(info.num_ranks * info.num_tokens - info.num_real_tokens for info in infos) == statistics.padding_tokens
    assert sum(info.num_real_tokens for info in infos) == statistics.real_tokens > 5 * 12
    assert load_of(two).kv_usage == 0
    steps, requests, _ = recorder.take()
    assert [(step.ranks, step.tokens) for step in steps] == [(info.num_ranks, info.num_real_tokens) for info in infos]
    computed, gained = Counter(), Counter()
    for step in steps:
        for row, (number, tokens) in enumerate(zip(step.ids, step.gained, strict=True)):
            (computed if row < step.prompts else gained)[number] += tokens
    names = {request.id: int(request.name) for request in requests}
    assert {names[number]: tokens for number, tokens in computed.items()} == {i: 1 + i for i in range(5)}
    assert gained == dict.fromkeys(names, 11)  # and one with the prompt


def test_graphs_are_right_on_all_ranks(model, create_ranked) -> None:
    executor = create_ranked(config_of(model, **TWO)).executor
    for report in verify_graphs(executor, rounds=3, seed=0, variants=(Variant.PLAIN, Variant.EXTENDED)):
        assert report.mismatches == []
        assert len(report.digests) == 3


def test_a_rank_that_has_no_memory_for_a_request_fails_it_alone(model, create_ranked) -> None:
    expected = answers(create_ranked(config_of(model)))
    two = create_ranked(config_of(model, **TWO))
    two.executor.on_all(rank_faults.fail_admissions, 1, "none left")
    requests = [two.add_request(str(i), prompt, GREEDY) for i, prompt in enumerate(PROMPTS)]
    ranks = [[rank.has(str(i)) for rank in two.scheduler.ranks].index(True) for i in range(len(PROMPTS))]
    assert set(ranks) == {0, 1}
    drain(two)
    two.executor.on_all(rank_faults.fail_admissions, 1, "")
    for request, rank, tokens in zip(requests, ranks, expected, strict=True):
        if rank == 1:
            assert request.finish_reason is FinishReason.ERROR
            assert request.error.message == "rank 1 could not take the request in; its log says why"
        else:
            assert request.output_token_ids == tokens
    assert answers(two) == expected


@contextmanager
def own_engine(model: str, **settings) -> Iterator[Engine]:
    """An engine whose worker is its own, since it will not outlive the test; a collective waits for a second."""
    config = config_of(model, **TWO, **settings)
    engine = build_engine(config, executor=build_ranked_executor(config, resolve(model), time_limit_s=1.0))
    pids = engine.executor.on_all(rank_faults.pid)[1:]
    try:
        yield engine
    finally:
        engine.shutdown()
        assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


def skip_empty_steps(executor) -> None:
    """Rank 1 does not launch what it has no rows for."""
    runner = executor.runner
    right = runner.run

    def wrong(graph):
        if runner.state.plan.any():
            return right(graph)
        runner.num_launched += 1
        return runner.num_launched - 1

    if executor.group.shard.rank == 1:
        runner.run = wrong


def launch_another_shape(executor) -> None:
    """Rank 1 launches its largest graph, whatever it was told."""
    store = executor.runner.graphs.store
    right = store.captured_graph
    if executor.group.shard.rank == 1:
        largest = executor.runner.policy.max_shape
        store.captured_graph = lambda shape: right(largest)


def keep_results_back(executor) -> None:
    """Rank 1 does not say when a step is done."""
    if executor.group.shard.rank == 1:
        executor.runner._tell_done = lambda: None


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (skip_empty_steps, r"rank 1 did not come to collective \d+ \(gather_tokens\) within 1 s"),
        (launch_another_shape, r"rank 1 did not come to collective \d+ \(\w+\) within 1 s"),
        (keep_results_back, r"rank 1 has not ended step \d+ within 2 s, and rank 0 has"),
    ],
)
def test_mutant_a_rank_out_of_step_ends_the_engine_and_is_named(one_layer, spoil, said) -> None:
    with own_engine(one_layer) as two:
        answers(two)
        two.executor.on_all(spoil)
        with pytest.raises(EngineDeadError, match=said):
            answers(two, PROMPTS[1:2])


def test_a_rank_that_goes_is_named_also_if_it_had_nothing_to_do(one_layer) -> None:
    with own_engine(one_layer) as two:
        answers(two)
        [_, worker] = two.executor.on_all(rank_faults.pid)
        two.add_request("last", PROMPTS[1], SamplingParams(max_tokens=100, ignore_eos=True))
        two.step()
        os.kill(worker, signal.SIGKILL)
        with pytest.raises(EngineDeadError, match="rank 1 was ended by SIGKILL"):
            drain(two)


def test_what_cannot_run_in_lockstep_is_refused_before_anything_is_loaded(model, tiny_model) -> None:
    with pytest.raises(
        ConfigError, match=r"enable_expert_parallel=True needs a native model with experts, and this is a"
    ):
        build_engine(config_of(tiny_model, **TWO))
    with pytest.raises(ModelError, match=rf"3 devices cannot share the {NUM_EXPERTS} experts .* can: 1, 2, 4, 8\.$"):
        build_engine(config_of(model, **TWO | {"data_parallel_size": 3}))
    with pytest.raises(
        ConfigError, match="tensor_parallel_size=2 and data_parallel_size=2 with enable_expert_parallel"
    ):
        config_of(model, **TWO, tensor_parallel_size=2)
    with pytest.raises(ConfigError, match="data_parallel_size=2 without enable_expert_parallel gives independent repl"):
        config_of(model, data_parallel_size=2)


def test_the_cases_have_many_features() -> None:
    features = {name for number, num_ranks in CASES for name in random_case(number, num_ranks, lockstep=True).features}
    expected = {
        "lockstep",
        "experts",
        "enable_expert_parallel",
        "2 ranks",
        "3 ranks",
        "eager",
        "auto",
        "latents",
        "mtp",
    }
    assert not expected - features
