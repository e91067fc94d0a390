"""``bench busy``: engines that wait differently, in turn, alone and beside processes that take their cores."""

import json
import os
import subprocess
import time
from contextlib import contextmanager

import pytest
from tiny import TINY_SETTINGS

from stepgraph import bench
from stepgraph.bench import busy
from stepgraph.bench.busy import Case, ways_to_wait
from stepgraph.bench.busy_process import step_ms
from stepgraph.errors import ConfigError, StepgraphError


class Recorded:
    """An engine that takes 10 ms a step, and `slow_ms` beside a load; notes when it was asked."""

    def __init__(self, name: str, slow_ms: float, log: list) -> None:
        self.name, self.slow_ms, self.log = name, slow_ms, log

    def begin(self, rows) -> dict:
        return {"device": "some machine", "threads": 2}

    def step_ms(self, rows: int, seconds: float) -> float:
        loaded = self.log[-1] if self.log and isinstance(self.log[-1], list) else None
        self.log.append((self.name, rows))
        return self.slow_ms if loaded else 10.0


def test_every_way_takes_its_turn_in_every_case_and_each_round_begins_with_another() -> None:
    log: list = []
    engines = {name: Recorded(name, 10, log) for name in "abc"}
    cases = [Case(1, False), Case(8, False)]
    samples = busy.measure(engines, cases, [], rounds=2, seconds=1)
    assert log == [(name, rows) for order in ("abc", "bca") for rows in (1, 8) for name in order]
    assert {key: len(ms) for key, ms in samples.items()} == {(name, case): 2 for name in "abc" for case in cases}


def test_the_table_holds_idle_speed_against_gnus_and_busy_time_against_the_best(tmp_path, monkeypatch, capsys) -> None:
    loads = []

    @contextmanager
    def running_engine(way, settings):
        slow = {"as it comes": 45.0, "passive": 30.0}.get(way.name, 300.0)
        ms = {"passive": 12.5}.get(way.name, 10.0)

        class Engine(Recorded):
            def step_ms(self, rows: int, seconds: float) -> float:
                return slow if loads[-1] else ms

        yield Engine(way.name, slow, [])

    @contextmanager
    def load(pins):
        loads.append(pins)
        yield []
        loads.append(())

    monkeypatch.setattr(busy, "running_engine", running_engine)
    monkeypatch.setattr(busy, "load", load)
    file = tmp_path / "busy.json"
    flags = ["--rounds=3", "--rows", "8", "--spins", "500", "--load-processes=3", f"--json={file}"]
    assert bench.main(["busy", "smollm2", *flags]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["as", "it", "comes", "800.0", "100%", "45.0", "1.50"] in lines
    assert ["passive", "640.0", "80%", "30.0", "1.00"] in lines
    assert ["500", "spins", "800.0", "100%", "300.0", "10.00"] in lines
    assert [pins for pins in loads if pins] == [[-1, -1, -1]] * 3
    result = json.loads(file.read_text())
    assert [way["environment"] for way in result["series"]][:2] == [{}, {"GOMP_SPINCOUNT": "300000"}]
    assert result["series"][0]["cases"] == [
        {"rows": 8, "busy": False, "step_ms": [10.0] * 3},
        {"rows": 8, "busy": True, "step_ms": [45.0] * 3},
    ]


def test_an_engine_sees_the_variables_of_its_way_and_none_of_the_users(monkeypatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    monkeypatch.setenv("GOMP_SPINCOUNT", "5")
    real, seen = subprocess.Popen, []

    def popen(command, env, **options):
        seen.append({name: env[name] for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT") if name in env})
        return real(["true"], env=env, **options)

    monkeypatch.setattr(subprocess, "Popen", popen)
    for way in ways_to_wait([7]):
        with busy.running_engine(way, {}):
            pass
    assert seen == [{}, {"GOMP_SPINCOUNT": "300000"}, {"OMP_WAIT_POLICY": "passive"}, {"GOMP_SPINCOUNT": "7"}, {}]


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores can be chosen on Linux only")
def test_a_load_stays_on_its_core_and_ends_with_the_block() -> None:
    core = max(os.sched_getaffinity(0))
    with busy.load([core, -1]) as (pinned, free):
        deadline = time.monotonic() + 30
        while os.sched_getaffinity(pinned.pid) != {core}:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert os.sched_getaffinity(free.pid) == os.sched_getaffinity(0)
    assert None not in (pinned.returncode, free.returncode)


def test_only_steps_in_which_all_rows_decode_are_timed(create_engine) -> None:
    engine, kinds = create_engine(), []
    engine.on_step = lambda step: kinds.append((step.record.kind.name, step.record.num_tokens))
    assert step_ms(engine, 3, 0.0) > 0
    assert kinds.count(("DECODE", 3)) == 4
    assert not engine.has_work


def test_an_engines_process_answers_until_it_is_ended(tiny_model) -> None:
    settings = {"model": tiny_model, "device": "cpu"} | TINY_SETTINGS
    with busy.running_engine(ways_to_wait([])[0], settings) as engine:
        assert engine.begin([1])["threads"] >= 1
        assert engine.step_ms(1, 0.001) > 0


def test_an_engine_that_ends_is_told_and_not_waited_for() -> None:
    process = subprocess.Popen(["false"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    process.wait()
    with pytest.raises(StepgraphError, match="ended with code 1"):
        busy.EngineProcess(process).begin([1])
    process.communicate()


@pytest.mark.parametrize("flags", [["--rounds=0"], ["--seconds=0"], ["--rows", "0"], ["--device=cuda"]])
def test_what_cannot_be_measured_is_refused(flags) -> None:
    with pytest.raises(ConfigError, match=r"above 0|threads of a CPU"):
        bench.main(["busy", "smollm2", *flags])
