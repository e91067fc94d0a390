"""What administrators ask of several engines is done by all of them, or an error names the one that could not."""

import asyncio
from collections.abc import Coroutine

import pytest
from fakes import FakeEngine, FakeFronts

from stepgraph.errors import EngineDeadError, RequestError, StepgraphError
from stepgraph.server.administrator import Administrator
from stepgraph.server.engine_observer import EngineState
from stepgraph.server.errors import APIError
from stepgraph.server.messages import ForgetAdapter, LoadAdapter, ResetPrefixCache, Sleep, UpdateWeights, WakeUp
from stepgraph.server.rest import Rest


class Two:
    """Two engines and their administrator."""

    def __init__(self, *states: EngineState):
        self.engines = [FakeEngine(number, state) for number, state in enumerate(states or (EngineState.READY,) * 2)]
        self.fronts, self.rest, self.adapters = FakeFronts(self.engines), Rest(), {}
        self.administrator = Administrator(self.engines, self.fronts, self.rest, self.adapters)

    def fail(self, engine: int, question: type, error: Exception) -> None:
        self.engines[engine].failures[question] = error

    def do(self, work: Coroutine):
        return asyncio.run(work)

    def heard(self, engine: int) -> list[str]:
        return [type(message).__name__ for message in self.engines[engine].heard]


@pytest.fixture
def two() -> Two:
    return Two()


def test_an_engine_that_cannot_sleep_keeps_the_others_awake(two) -> None:
    two.fail(1, Sleep, RequestError("sleep level 2 drops the weights", param="level"))
    with pytest.raises(RequestError, match=r"^engine 1: sleep level 2 drops") as error:
        two.do(two.administrator.sleep(2, "keep"))
    assert error.value.param == "level"
    assert (two.heard(0), two.heard(1)) == (["Sleep", "WakeUp"], ["Sleep"])
    assert (two.rest.sleep_level, two.rest.coming) == (0, None)


def test_an_engine_that_cannot_wake_up_lets_the_others_sleep_on(two) -> None:
    two.do(two.administrator.sleep(1, "keep"))
    two.fail(0, WakeUp, RequestError("others use the memory"))
    with pytest.raises(APIError, match="the engine sleeps on: engine 0: others use the memory") as error:
        two.do(two.administrator.wake_up())
    assert error.value.status == 503
    assert (two.heard(0), two.heard(1)) == (["Sleep", "WakeUp"], ["Sleep", "WakeUp", "Sleep"])
    assert two.engines[1].heard[-1].level == two.rest.sleep_level == 1


@pytest.mark.parametrize("work", ["sleep", "update_weights"])
def test_nothing_is_begun_while_an_engine_is_not_there(work, tmp_path) -> None:
    two = Two(EngineState.READY, EngineState.RESTARTING)
    administrator = two.administrator
    asked = administrator.sleep(1, "keep") if work == "sleep" else administrator.update_weights(str(tmp_path))
    with pytest.raises(EngineDeadError, match=r"^engine 1: the engine stopped and is being started again"):
        two.do(asked)
    assert two.heard(0) == []


def test_weights_that_some_engines_take_become_those_of_all(two, tmp_path) -> None:
    two.fail(0, UpdateWeights, RequestError("a file is damaged"))
    with pytest.raises(EngineDeadError, match="engine 0: a file is damaged; it is started again with the weights"):
        two.do(two.administrator.update_weights(str(tmp_path)))
    assert [engine.weights for engine in two.engines] == [str(tmp_path)] * 2
    assert [engine.num_replaced for engine in two.engines] == [1, 0]
    assert two.fronts.forgotten == [0, 1]


def test_weights_that_no_engine_takes_are_refused(two, tmp_path) -> None:
    for engine in (0, 1):
        two.fail(engine, UpdateWeights, RequestError("they are of another model"))
    with pytest.raises(APIError, match="engine 0: they are of another model") as error:
        two.do(two.administrator.update_weights(str(tmp_path)))
    assert (error.value.status, error.value.param) == (400, "model_path")
    assert [(engine.weights, engine.num_replaced) for engine in two.engines] == [(None, 0)] * 2


def test_an_adapter_that_one_engine_refuses_is_nobodys(two) -> None:
    two.fail(1, LoadAdapter, RequestError("its rank is 8"))
    with pytest.raises(APIError, match="engine 1: its rank is 8"):
        two.do(two.administrator.load_adapter("poet", "/poet", inplace=False))
    assert two.adapters == {}
    assert [ForgetAdapter("/poet") in engine.heard for engine in two.engines] == [True, True]


def test_an_adapter_is_loaded_by_those_that_are_there() -> None:
    two = Two(EngineState.RESTARTING, EngineState.READY)
    assert two.do(two.administrator.load_adapter("poet", "/poet", inplace=False)) == "poet is loaded"
    assert (two.heard(0), two.heard(1)) == ([], ["LoadAdapter"])


def test_blocks_that_stay_are_counted_over_all_and_routing_forgets(two) -> None:
    for engine, kept in zip(two.engines, (3, 4), strict=True):
        engine.answers[ResetPrefixCache] = kept
    assert two.do(two.administrator.reset_prefix_cache(preempt=False)) == 7
    assert two.fronts.forgotten == [0, 1]


def test_engines_that_slept_have_no_prefixes(two) -> None:
    two.do(two.administrator.sleep(1, "keep"))
    assert two.fronts.forgotten == [0, 1]


def test_a_fault_of_ours_is_no_ones_answer(two) -> None:
    two.fail(0, ResetPrefixCache, StepgraphError("a bug"))
    with pytest.raises(StepgraphError, match="engine 0: a bug"):
        two.do(two.administrator.reset_prefix_cache(preempt=False))
    two.fail(0, ResetPrefixCache, KeyError("a bug"))
    with pytest.raises(KeyError):
        two.do(two.administrator.reset_prefix_cache(preempt=False))
