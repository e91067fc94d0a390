"""Two ranks on CPU: the answers of one, and what happens when something fails. One worker serves most tests of this module."""

import gc
import os
import shutil
import signal
import sys
import weakref
from collections.abc import Callable, Iterator
from types import ModuleType, SimpleNamespace

import pytest
import rank_faults
import torch
from lora_folders import matrices, save_adapter
from safetensors.torch import load_file, save_file
from tiny import TINY_SETTINGS, drain, set_run_ahead

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.engine.sampling_params import SamplingParams, StructuredOutputs
from stepgraph.errors import ConfigError, EngineDeadError, ModelError, RequestError, StepgraphError
from stepgraph.executor.ranked import build_ranked_executor
from stepgraph.executor.workers import Workers
from stepgraph.models.source import resolve
from stepgraph.server.engine_report import graphs_of
from stepgraph.step.output_rings import RING_DEPTH

PROMPTS = [list(range(1, 60)), [7, 7, 7], list(range(100, 132)), [250, 3, 9]]


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    """One worker, which serves one engine after another."""
    workers = Workers(2)
    yield workers
    workers.close()


@pytest.fixture
def engine(tiny_model, workers) -> Iterator[Callable[..., Engine]]:
    """Makes engines of one rank or two; those of two one after another."""
    made: list[Engine] = []

    def create(num_ranks: int = 2, **settings) -> Engine:
        settings = TINY_SETTINGS | {"model": tiny_model, "device": "cpu", "tensor_parallel_size": num_ranks} | settings
        config, executor = EngineConfig.from_settings(**settings), None
        if num_ranks > 1:
            executor = build_ranked_executor(config, resolve(tiny_model), workers=workers)
        made.append(build_engine(config, executor=executor))
        return made[-1]

    yield create
    for engine in made:
        engine.shutdown()


def answers(engine: Engine, prompts=PROMPTS, **settings) -> list[list[int]]:
    """Of all prompts at once."""
    params = SamplingParams(**{"temperature": 0, "max_tokens": 12, "ignore_eos": True} | settings)
    requests = [engine.add_request(f"{i}", prompt, params) for i, prompt in enumerate(prompts)]
    drain(engine)
    assert all(request.error is None for request in requests), [request.error for request in requests]
    return [list(request.output_token_ids) for request in requests]


CASES = {
    "in graphs, prompts in chunks": ({}, {}),
    "no graphs": ({"graph_backend": "eager"}, {}),
    "no graphs where rows decode": ({"cudagraph_only_prefill": True, "insertion_policy": "gather"}, {}),
    "sampled": ({}, {"temperature": 1.0, "seed": 3, "top_p": 0.9}),
    "penalties and log-probabilities": ({}, {"repetition_penalty": 1.3, "logprobs": 3, "prompt_logprobs": 2}),
    "few blocks, so that requests wait and start anew": ({"num_kv_blocks": 12, "block_size": 8}, {"max_tokens": 24}),
    "proposals that are looked up": ({"speculative_method": "suffix", "num_speculative_tokens": 3}, {"max_tokens": 24}),
    "a grammar": ({}, {"structured_outputs": StructuredOutputs(regex="[a-f]{4}(one|two)"), "ignore_eos": False}),
    "deterministic": ({"deterministic": True}, {}),
}


@pytest.mark.parametrize("case", CASES)
def test_answers_are_those_of_one_rank(engine, case) -> None:
    settings, params = CASES[case]
    two, one = engine(2, **settings), engine(1, **settings)
    assert answers(two, **params) == answers(one, **params)
    assert answers(two, **params) == answers(one, **params)  # of cached prefixes
    assert two.scheduler.statistics == one.scheduler.statistics
    two.executor.check_alike()


def test_ranks_have_the_same_graphs_and_say_how_they_do(engine) -> None:
    two = engine(2)
    os.kill(two.executor.rank_reports()[1].pid, signal.SIGTTOU)  # by a terminal, for its log
    answers(two)
    reports = two.executor.rank_reports()
    assert [report.rank for report in reports] == [0, 1]
    assert len({report.pid for report in reports}) == 2
    assert reports[0].num_graphs == reports[1].num_graphs > 0
    assert reports[1].cpu_share > 0
    assert 0 < reports[1].waiting_share < 1
    assert two.executor.specs.num_ranks == 2
    assert [rank["rank"] for rank in graphs_of(two)["ranks"]] == [0, 1]


def test_what_is_closed_keeps_nothing_of_its_device(engine) -> None:
    two = engine(2)
    state = weakref.ref(two.executor.runner.state)
    answers(two)
    two.shutdown()
    gc.collect()
    assert state() is None
    assert two.executor is not None


def test_cores_are_shared_out_and_given_back(engine, monkeypatch) -> None:
    before = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 6)
    two = engine(2)
    monkeypatch.undo()
    assert two.executor.on_all(rank_faults.threads) == [3, 3]
    two.shutdown()
    torch.set_num_threads(before)


def test_steps_are_numbered_beyond_what_a_word_of_an_order_holds(engine) -> None:
    two, one = engine(2), engine(1)
    expected = answers(one)
    two.executor.on_all(rank_faults.count_steps, 2**31 - RING_DEPTH)
    assert answers(two) == expected
    assert two.executor.runner.num_launched > 2**31


def test_an_aborted_request_leaves_the_others_alone(engine) -> None:
    two, one = engine(2), engine(1)
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    found = []
    for created in (two, one):
        kept = created.add_request("kept", PROMPTS[0], params)
        created.add_request("dropped", PROMPTS[2], params)
        for _ in range(8):
            created.step()
        created.abort("dropped")
        later = created.add_request("later", PROMPTS[3], params)
        drain(created)
        found.append([list(kept.output_token_ids), list(later.output_token_ids)])
    assert found[0] == found[1]


def test_requests_sleep_wake_and_pause_on_all_ranks(engine) -> None:
    two, one = engine(2), engine(1)
    expected = answers(one, max_tokens=30)
    requests = [
        two.add_request(f"{i}", prompt, SamplingParams(temperature=0, max_tokens=30, ignore_eos=True))
        for i, prompt in enumerate(PROMPTS)
    ]
    for _ in range(6):
        two.step()
    two.sleep(1)
    two.wake_up()
    two.step()
    two.pause()
    num_steps = two.executor.statistics.num_steps
    for _ in range(3):
        two.step()
        two.prepare()
    assert two.executor.statistics.num_steps == num_steps
    assert max(len(request.output_token_ids) for request in requests) < 30
    two.resume()
    drain(two)
    assert [list(request.output_token_ids) for request in requests] == expected


def test_no_rank_sleeps_where_one_cannot(engine) -> None:
    two, one = engine(2), engine(1)
    assert answers(two) == answers(one)
    two.executor.on_all(rank_faults.fail_sleeping, 1)
    with pytest.raises(StepgraphError, match="rank 1: no host memory"):
        two.sleep(1)
    assert not two.is_sleeping
    assert answers(two) == answers(one)


def test_a_process_that_is_forked_leaves_the_ranks_alone(engine) -> None:
    two, one = engine(2), engine(1)
    child = os.fork()
    if child == 0:  # a copy of this process, which must not come back into pytest
        status = 1
        try:
            two.add_request("theirs", [1, 2, 3], SamplingParams(temperature=0, max_tokens=4))
            drain(two)
        except EngineDeadError as error:
            status = 0 if "forked" in str(error) else 2
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert answers(two) == answers(one)


@pytest.mark.parametrize("given", ["folder", "tensors"])
def test_new_weights_reach_all_ranks_or_none(engine, tiny_model, tmp_path, given) -> None:
    two, one = engine(2), engine(1)
    old = answers(two)
    tensors = {name: values * 0.9 for name, values in load_file(f"{tiny_model}/model.safetensors").items()}
    shutil.copytree(tiny_model, tmp_path / "new")
    save_file(tensors, tmp_path / "new/model.safetensors")
    for created in (two, one):
        created.update_weights(tmp_path / "new" if given == "folder" else iter(tensors.items()))
    assert answers(two) == answers(one) != old
    lacking = {name: values for name, values in tensors.items() if name != "model.norm.weight"}
    with pytest.raises(ModelError, match=r"1 \(model.norm.weight\) missing"):
        two.update_weights(iter(lacking.items()))
    assert answers(two) == answers(one)


def test_each_rank_reads_its_part_of_an_adapter(engine, tmp_path) -> None:
    folder = save_adapter(tmp_path, matrices(0))
    two, one = engine(2, enable_lora=True, max_loras=1), engine(1, enable_lora=True, max_loras=1)
    found = []
    for created in (two, one):
        params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
        adapted = created.add_request("adapted", PROMPTS[0], params, adapter=folder)
        plain = created.add_request("plain", PROMPTS[0], params)
        drain(created)
        found.append([list(adapted.output_token_ids), list(plain.output_token_ids)])
    assert found[0] == found[1]
    assert found[0][0] != found[0][1]
    file = two.read_adapter(folder)
    save_adapter(tmp_path, matrices(1))
    with pytest.raises(RequestError, match=r"rank 1: .* was changed after rank 0 had read it; ask for it again"):
        two.load_adapter(file, replace=True)


def test_a_graph_that_one_rank_cannot_capture_is_none_of_any(engine, caplog) -> None:
    two, one = engine(2), engine(1)
    two.executor.on_all(rank_faults.fail_captures, 1, "no room for a graph")
    assert answers(two) == answers(one)
    assert "rank 1: no room for a graph" in caplog.text
    assert two.executor.on_all(rank_faults.num_graphs) == [0, 0]
    assert two.executor.graph_counts().failed_captures > 0
    assert two.executor.statistics.num_eager_steps == two.executor.statistics.num_steps


@pytest.mark.parametrize("rank", [0, 1])
def test_a_request_whose_step_one_rank_has_no_memory_for_ends_alone(engine, rank) -> None:
    two, one = engine(2, graph_backend="eager"), engine(1)
    assert answers(two) == answers(one)
    two.executor.on_all(rank_faults.fail_eagerly, rank, "no room for logits")
    [bad] = [two.add_request("bad", PROMPTS[0], SamplingParams(temperature=0, logprobs=2, max_tokens=4))]
    drain(two)
    assert "no memory left for a step with what the request asks for" in bad.error.message
    two.executor.on_all(rank_faults.fail_eagerly, rank, "")
    assert answers(two) == answers(one)


@pytest.mark.parametrize("run_ahead", [0, 1])
def test_a_request_that_one_rank_cannot_admit_ends_alone(engine, run_ahead) -> None:
    two, one = engine(2), engine(1)
    set_run_ahead(two, run_ahead)
    params = SamplingParams(temperature=0.7, seed=1, max_tokens=30, ignore_eos=True)
    found = []
    for created in (one, two):
        others = [created.add_request(f"{i}", prompt, params) for i, prompt in enumerate(PROMPTS[:2])]
        for _ in range(8):
            created.step()
        if created is two:
            two.executor.on_all(rank_faults.fail_admissions, 1, "no room for a prompt")
            bad = two.add_request("bad", PROMPTS[2], params)
            while bad.error is None:
                two.step()
            two.executor.check_alike()
            two.executor.on_all(rank_faults.fail_admissions, 1, "")
            assert bad.error.message == "rank 1 could not take the request in; its log says why"
        drain(created)
        found.append([list(request.output_token_ids) for request in others])
    assert found[0] == found[1]
    assert answers(two) == answers(one)
    two.executor.check_alike()


def test_what_one_rank_raises_is_raised_with_its_number_and_all_go_on(engine) -> None:
    two = engine(2)
    with pytest.raises(ConfigError, match="rank 1: no such thing"):
        two.executor.on_all(rank_faults.raise_on, 1, ConfigError, "no such thing")
    with pytest.raises(KeyError):
        two.executor.on_all(rank_faults.raise_on, 0, KeyError, "here")
    assert two.executor.on_all(rank_faults.raise_on, 2, KeyError, "") == [0, 1]


def test_a_function_that_workers_do_not_have_is_refused_by_them_and_all_go_on(engine, monkeypatch) -> None:
    two = engine(2)
    here = ModuleType("only_here")
    exec("def rank(executor): return executor.group.shard.rank", vars(here))
    monkeypatch.setitem(sys.modules, "only_here", here)
    with pytest.raises(StepgraphError, match="rank 1: No module named 'only_here'"):
        two.executor.on_all(here.rank)
    assert two.executor.on_all(rank_faults.num_graphs) == [0, 0]


def test_numbers_of_ranks_that_do_not_divide_are_refused_before_a_process_starts(tiny_model, monkeypatch) -> None:
    monkeypatch.setattr("stepgraph.executor.ranked.Workers", None)
    config = EngineConfig.from_settings(model=tiny_model, device="cpu", tensor_parallel_size=3)
    with pytest.raises(ModelError, match=r"3 devices cannot share this .* evenly.* Numbers that can: 1, 2, 4"):
        build_ranked_executor(config, resolve(tiny_model))


def test_gpus_that_are_too_few_or_unequal_are_refused(tiny_model, monkeypatch) -> None:
    config = EngineConfig.from_settings(model=tiny_model, device="cuda", tensor_parallel_size=2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(
        ConfigError, match="tensor_parallel_size=2 needs as many GPUs, and torch sees 1; use 1, or make"
    ):
        build_ranked_executor(config, resolve(tiny_model))
    gpus = [SimpleNamespace(name="A", total_memory=80 << 30), SimpleNamespace(name="A", total_memory=40 << 30)]
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: gpus[index])
    with pytest.raises(ConfigError, match="GPU 0 is A with 80 GiB where GPU 1 is A with 40 GiB"):
        build_ranked_executor(config, resolve(tiny_model))


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/PID/maps is Linux's")
def test_memory_that_ranks_share_has_no_name_that_could_stay(engine) -> None:
    for pid in engine(2).executor.on_all(rank_faults.pid):
        with open(f"/proc/{pid}/maps") as maps:
            shared = [line for line in maps if "stepgraph-" in line]
        assert shared
        assert all(line.rstrip().endswith("(deleted)") for line in shared)
