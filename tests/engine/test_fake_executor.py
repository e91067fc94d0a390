"""The engine over a device in plain Python, which fails and takes time as it is told."""

import pytest
from adder import VOCAB, Adder, engine_over, fake_executor
from tiny import drain

from stepgraph.engine.engine import Engine
from stepgraph.engine.request import FinishReason
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import DeviceMemoryError, EngineDeadError, ModelError
from stepgraph.executor.fake import FakeExecutor

GREEDY = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
EXTENDED = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True, allowed_token_ids=tuple(range(VOCAB)))


def sums(prompt: list[int], count: int) -> list[int]:
    """The answer to a prompt."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(sum(tokens) % VOCAB)
    return tokens[len(prompt) :]


class Faulty(Adder):
    """Raises what it is given, in turn: in admissions, and in steps."""

    def __init__(self, *, admit=(), run=()) -> None:
        super().__init__()
        self.admit_errors, self.run_errors = list(admit), list(run)

    def admit(self, admission) -> None:
        if self.admit_errors:
            raise self.admit_errors.pop(0)
        super().admit(admission)

    def run(self, plan):
        if self.run_errors:
            raise self.run_errors.pop(0)
        return super().run(plan)


# Time


@pytest.mark.parametrize("run_ahead", [0, 1, 2])
def test_reports_tell_the_devices_time_and_admissions_the_clocks(run_ahead) -> None:
    executor = fake_executor(run_ahead=run_ahead)
    engine, reports = engine_over(executor), []
    engine.on_step = reports.append
    executor.clock.now = 7.0
    request = engine.add_request("a", [1, 2, 3], GREEDY)
    drain(engine)
    assert request.output_token_ids == sums([1, 2, 3], 6)
    assert request.admitted_at == 7.0
    assert [report.seconds for report in reports] == pytest.approx([0.003] + [0.001] * 5)
    assert {report.host_seconds for report in reports} == {0.0}


@pytest.mark.parametrize("run_ahead", [0, 1, 2])
def test_as_many_steps_are_under_way_as_may_be_and_no_more(run_ahead) -> None:
    executor = fake_executor(run_ahead=run_ahead)
    engine = engine_over(executor)
    engine.add_request("a", [1, 2, 3], GREEDY)
    depths = []
    while engine.has_work:
        engine.step()
        depths.append(executor.num_in_flight)
    assert max(depths) == run_ahead
    assert depths[-1] == 0


# Failures


def test_a_failed_step_stops_the_engine_which_says_why_from_then_on() -> None:
    device = Faulty()
    engine = engine_over(fake_executor(device))
    engine.add_request("a", [1], GREEDY)
    engine.step()
    device.run_errors.append(RuntimeError("the device fell over"))
    with pytest.raises(EngineDeadError, match="the device fell over") as caught:
        engine.step()
    assert isinstance(caught.value.__cause__, RuntimeError)
    for later in (engine.step, lambda: engine.add_request("b", [1], GREEDY)):
        with pytest.raises(EngineDeadError, match="stopped on an earlier error: the device fell over"):
            later()


def test_an_admission_that_fails_ends_its_request_and_the_others_go_on() -> None:
    device = Faulty()
    engine = engine_over(fake_executor(device))
    running = engine.add_request("running", [1, 2], GREEDY)
    engine.step()
    device.admit_errors.append(ZeroDivisionError("a bug in the admission"))
    broken = engine.add_request("broken", [3], GREEDY)
    drain(engine)
    assert (broken.finish_reason, broken.error.message) == (FinishReason.ERROR, "a bug in the admission")
    assert running.output_token_ids == sums([1, 2], 6)
    assert running.num_preemptions == 1


def test_a_device_that_fails_while_a_request_is_admitted_stops_the_engine() -> None:
    class Broken(FakeExecutor):
        def recover(self) -> None:
            raise RuntimeError("the device fell over")

    engine = engine_over(fake_executor(Faulty(admit=[RuntimeError("no copy")]), kind=Broken))
    engine.add_request("a", [1], GREEDY)
    with pytest.raises(EngineDeadError, match="the device fell over"):
        engine.step()


def test_memory_that_does_not_suffice_for_a_plain_step_is_the_engines_end() -> None:
    engine = engine_over(fake_executor(Faulty(run=[DeviceMemoryError("out of memory")])))
    engine.add_request("r", [1, 2, 3], GREEDY)
    with pytest.raises(EngineDeadError, match="the engine stopped on an error: out of memory"):
        engine.step()
    with pytest.raises(EngineDeadError, match="stopped on an earlier error: out of memory"):
        engine.step()


def test_memory_that_does_not_suffice_ends_those_who_ask_for_more_than_a_plain_step() -> None:
    class Small(Adder):
        def run(self, plan):
            if plan.variant:
                raise DeviceMemoryError("out of memory")
            return super().run(plan)

    engine = engine_over(fake_executor(Small()))
    plain = engine.add_request("plain", [1, 2], GREEDY)
    engine.step()
    asking = engine.add_request("asking", [3, 4], EXTENDED)
    drain(engine)
    assert plain.output_token_ids == sums([1, 2], 6)
    assert asking.finish_reason is FinishReason.ERROR
    assert asking.error.message.startswith("the device has no memory left for a step with what the request asks for")


# Life


def test_after_the_end_every_call_says_so_and_requests_can_be_aborted() -> None:
    engine = engine_over(fake_executor(max_adapters=1))
    file = engine.read_adapter("folder")
    engine.add_request("a", [1, 2, 3], GREEDY)
    engine.shutdown()
    engine.shutdown()
    calls = {
        "add_request": lambda: engine.add_request("b", [1], GREEDY),
        "forget_adapter": lambda: engine.forget_adapter("folder"),
        "holds_adapter": lambda: engine.holds_adapter("folder"),
        "load_adapter": lambda: engine.load_adapter(file),
        "pause": engine.pause,
        "prepare": engine.prepare,
        "read_adapter": lambda: engine.read_adapter("folder"),
        "reset_prefix_cache": engine.reset_prefix_cache,
        "resume": engine.resume,
        "sleep": engine.sleep,
        "step": engine.step,
        "update_weights": lambda: engine.update_weights([]),
        "wake_up": engine.wake_up,
    }
    public = {name for name, value in vars(Engine).items() if callable(value) and not name.startswith("_")}
    assert public == {*calls, "abort", "shutdown"}
    for call in calls.values():
        with pytest.raises(EngineDeadError, match="the engine was shut down; create another one"):
            call()
    assert engine.abort("a").finish_reason is FinishReason.ABORT


@pytest.mark.parametrize("level", [1, 2])
def test_requests_go_on_after_sleep_with_the_answers_they_would_have_got(level) -> None:
    executor = fake_executor()
    engine = engine_over(executor)
    request = engine.add_request("a", [1, 2, 3], GREEDY)
    got = [update for _ in range(4) for update in engine.step()]
    engine.sleep(level)
    assert executor.num_in_flight == 0
    assert engine.idle_reason == "it sleeps; call wake_up()"
    got += engine.step()
    engine.wake_up()
    if level == 2:
        assert not engine.has_work
        engine.update_weights([])
    while engine.has_work:
        got += engine.step()
    assert [token for update in got for token in update.new_token_ids] == sums([1, 2, 3], 6)
    assert request.num_preemptions == 1


def test_weights_that_fail_while_they_are_written_leave_the_engine_without_any() -> None:
    class Damaged(FakeExecutor):
        def write_weights(self) -> None:
            super().write_weights()
            if self.weights == ["damaged"]:
                raise ModelError("a file is damaged")

    engine = engine_over(fake_executor(kind=Damaged))
    request = engine.add_request("a", [1], GREEDY)
    engine.step()
    with pytest.raises(ModelError, match="a file is damaged"):
        engine.update_weights(["damaged"])
    engine.step()  # delivers what was under way
    assert engine.idle_reason == "it has no weights; call update_weights()"
    assert not engine.has_work
    engine.update_weights(["whole"])
    drain(engine)
    assert request.output_token_ids == sums([1], 6)
