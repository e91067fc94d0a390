"""Ranks that go, hang or cannot be built: the engine says which, and no process stays."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import rank_faults
from tiny import TINY_SETTINGS, drain

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import EngineDeadError, ModelError
from stepgraph.executor.ranked import build_ranked_executor
from stepgraph.executor.workers import Workers
from stepgraph.models.source import resolve

PROMPTS = [list(range(1, 60)), [7, 7, 7]]


def run(engine: Engine, prompts=PROMPTS) -> None:
    for i, prompt in enumerate(prompts):
        engine.add_request(f"{i}", prompt, SamplingParams(temperature=0, max_tokens=4, ignore_eos=True))
    drain(engine)


def test_ranks_that_differ_are_noticed_where_the_engine_rests(tiny_model) -> None:
    with own_engine(tiny_model) as two:
        run(two)
        assert not two.prepare()
        two.executor.on_all(rank_faults.change_line, 1)
        assert not two.prepare()  # nothing ran since
        run(two, PROMPTS[:1])
        two.executor.on_all(rank_faults.change_line, 1)
        with pytest.raises(EngineDeadError, match="rank 1 has computed something else than rank 0"):
            two.prepare()


@contextmanager
def own_engine(model: str, **settings) -> Iterator[Engine]:
    """An engine whose worker is its own, since it will not outlive the test."""
    time_limit_s = settings.pop("time_limit_s", 30.0)
    config = EngineConfig.from_settings(
        **TINY_SETTINGS | {"model": model, "device": "cpu", "tensor_parallel_size": 2} | settings
    )
    executor = build_ranked_executor(config, resolve(model), time_limit_s=time_limit_s)
    engine = build_engine(config, executor=executor)
    pids = executor.on_all(rank_faults.pid)[1:]
    try:
        yield engine
    finally:
        engine.shutdown()
        assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("kill", "rank 1 was ended by SIGKILL"),
        ("stop", r"rank 1 did not come to collective \d+ \(\w+\) within 1 s"),
        ("raise", "rank 1 ended with exit status 1: no current"),
    ],
)
def test_a_worker_that_goes_while_it_serves_is_named(tiny_model, fault, said) -> None:
    with own_engine(tiny_model, time_limit_s=1.0 if fault == "stop" else 30.0) as two:
        run(two)
        _, worker = two.executor.on_all(rank_faults.pid)
        two.add_request("last", PROMPTS[0], SamplingParams(temperature=0, max_tokens=100, ignore_eos=True))
        two.step()
        if fault == "raise":
            two.executor.on_all(rank_faults.fail_launches, 1)
        else:
            os.kill(worker, signal.SIGKILL if fault == "kill" else signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(EngineDeadError, match=said):
            drain(two)
        assert time.monotonic() - started < 20  # not the time limit
        with pytest.raises(EngineDeadError, match=said):
            two.step()


def test_a_worker_that_takes_no_orders_is_named(tiny_model, monkeypatch) -> None:
    monkeypatch.setattr("stepgraph.executor.workers._ORDER_S", 1.0)
    with own_engine(tiny_model) as two:
        _, worker = two.executor.on_all(rank_faults.pid)
        os.kill(worker, signal.SIGSTOP)
        with pytest.raises(EngineDeadError, match="rank 1 has carried out no order for 1 s"):
            two.executor.set_masks(1, np.zeros((1, 1 << 20), dtype=np.int32))  # more than the ring holds


def stop_at_rest(two: Engine) -> None:
    run(two)
    os.kill(two.executor.on_all(rank_faults.pid)[1], signal.SIGSTOP)
    two.prepare()


def hang_in_a_capture(two: Engine) -> None:
    two.executor.on_all(rank_faults.capture_slowly, 1, 10.0)
    two.executor._workers._limit_s = 1.0
    two.add_request("extended", PROMPTS[1], SamplingParams(temperature=0, max_tokens=4, logprobs=1))
    try:
        drain(two)
    finally:
        assert two.executor.graph_counts().failed_captures == 0  # it is the engine that failed


def stay_away(two: Engine) -> None:
    two.executor.on_all(rank_faults.gather_alone, 1)
    two.executor.rank_reports()


def drop_weights_on_some(two: Engine) -> None:
    two.executor.on_all(rank_faults.fail_sleeping, 1)
    two.sleep(2)


def interrupt_an_order(two: Engine) -> None:
    write = two.executor._workers.ring._publish
    two.executor._workers.ring._publish = lambda: signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        two.executor.on_all(rank_faults.pid)
    two.executor._workers.ring._publish = write
    two.executor.rank_reports()


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (stop_at_rest, "rank 1 gave no answer within 1 s"),
        (hang_in_a_capture, "rank 1 gave no answer within 1 s"),
        (stay_away, r"rank 1.*: rank 0 did not come to collective \d+ \(all_gather\) in time"),
        (drop_weights_on_some, "not all ranks could drop their weights: rank 1: no host memory"),
        (interrupt_an_order, "an order was interrupted, of which other ranks have read a part"),
    ],
)
def test_what_leaves_ranks_in_different_states_ends_the_engine(tiny_model, fault, said) -> None:
    with own_engine(tiny_model, time_limit_s=1.0) as two:
        run(two)
        with pytest.raises(EngineDeadError, match=said):
            fault(two)
        with pytest.raises(EngineDeadError, match=said):
            run(two)


def test_a_worker_that_cannot_start_says_why(tiny_model, tmp_path, monkeypatch, capfd) -> None:
    monkeypatch.setattr("stepgraph.executor.workers.subprocess", subprocess)  # as users start them
    (tmp_path / "torch.py").write_text("raise ImportError('libtorch_cpu.so is not there')")
    monkeypatch.syspath_prepend(str(tmp_path))
    config = EngineConfig.from_settings(
        **TINY_SETTINGS | {"model": tiny_model, "device": "cpu", "tensor_parallel_size": 2}
    )
    with pytest.raises(
        EngineDeadError,
        match=r"^rank 1( ended with exit status 1)?: its process cannot start: libtorch_cpu.so is not there$",
    ):
        build_ranked_executor(config, resolve(tiny_model))
    assert "Traceback" not in capfd.readouterr().err


def test_workers_end_with_a_leader_that_is_killed(tiny_model) -> None:
    code = f"""
from stepgraph import LLM
import sys, time
sys.path.insert(0, {os.path.dirname(__file__)!r})
import rank_faults
if __name__ == "__main__":
    llm = LLM({tiny_model!r}, device="cpu", tensor_parallel_size=2, progress=False)
    print(*llm.engine.executor.on_all(rank_faults.pid), flush=True)
    time.sleep(600)
"""
    leader = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    [_, worker] = map(int, leader.stdout.readline().split())
    leader.kill()
    leader.wait()
    leader.stdout.close()
    deadline = time.monotonic() + 20
    while os.path.exists(f"/proc/{worker}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{worker}")


def test_what_keeps_a_worker_from_building_its_part_is_said_with_its_rank(tiny_model, tmp_path, monkeypatch) -> None:
    config = EngineConfig.from_settings(
        **TINY_SETTINGS | {"model": tiny_model, "device": "cpu", "tensor_parallel_size": 2}
    )
    source, workers = resolve(tiny_model), Workers(2)
    workers.build = lambda build, told=workers.build: told(  # the worker finds another model than the leader
        build._replace(config=replace(config, model=replace(config.model, model=str(tmp_path))))
    )
    with pytest.raises(ModelError, match=r"rank 1: .* has no config.json"):
        build_ranked_executor(config, source, workers=workers)
    assert not [pid for pid in workers.pids if os.path.exists(f"/proc/{pid}")]


def test_a_model_that_is_not_found_leaves_no_process_that_was_started_for_it(tmp_path, monkeypatch) -> None:
    started: list[Workers] = []
    monkeypatch.setattr("stepgraph.executor.ranked.Workers", lambda size: started.append(Workers(size)) or started[-1])
    config = EngineConfig.from_settings(model=str(tmp_path), device="cpu", tensor_parallel_size=2)
    with pytest.raises(ModelError, match=r"has no config.json"):
        build_engine(config)
    assert len(started) == 1
    assert not [pid for pid in started[0].pids if os.path.exists(f"/proc/{pid}")]
