"""Ctrl-C in a call of `LLM`: it ends after the step under way, and the engine is usable."""

import signal
import threading
from collections.abc import Iterator
from itertools import count

import pytest
from tiny import TINY_SETTINGS

from stepgraph import LLM, SamplingParams
from stepgraph.engine.interrupts import interrupts_held

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)


@pytest.fixture
def ctrl_c_interrupts() -> Iterator[None]:
    """As in a terminal: what a script runs in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupting(llm: LLM, monkeypatch, at_step: int, presses: int = 1) -> list[str]:
    """Have Ctrl-C pressed in the middle of a step; returns what happened there."""
    launch, log = llm.engine.executor.runner.launch, []

    def press(plan):
        ticket = launch(plan)
        log.append("step")
        if len(log) == at_step:
            for _ in range(presses):
                signal.raise_signal(signal.SIGINT)
                log.append("held")
        return ticket

    monkeypatch.setattr(llm.engine.executor.runner, "launch", press)
    return log


@pytest.fixture(scope="module")
def llm(tiny_model, device) -> LLM:
    return LLM(tiny_model, progress=False, device=device, **TINY_SETTINGS)


@pytest.mark.usefixtures("ctrl_c_interrupts")
@pytest.mark.parametrize("stream", [False, True], ids=["generate", "stream"])
def test_ctrl_c_ends_the_call_after_its_step_and_leaves_a_usable_engine(llm, monkeypatch, stream) -> None:
    def call():
        if stream:
            return list(llm.stream([1, 2], GREEDY))[-1]
        return llm.generate([[1, 2], [3]], GREEDY, use_tqdm=False)[0]

    handler, tokens = signal.getsignal(signal.SIGINT), call().outputs[0].token_ids
    with monkeypatch.context() as patch:
        log = interrupting(llm, patch, at_step=4)
        with pytest.raises(KeyboardInterrupt):
            call()
    assert log == ["step"] * 4 + ["held"]
    assert signal.getsignal(signal.SIGINT) is handler
    assert not llm.engine.scheduler.has_requests
    assert call().outputs[0].token_ids == tokens


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_presses_of_an_impatient_finger_are_one_ctrl_c(llm, monkeypatch) -> None:
    monkeypatch.setattr("stepgraph.engine.interrupts.monotonic", lambda: 7.0)
    with monkeypatch.context() as patch:
        log = interrupting(llm, patch, at_step=2, presses=3)
        with pytest.raises(KeyboardInterrupt):
            llm.generate([1], GREEDY, use_tqdm=False)
    assert log == ["step", "step", "held", "held", "held"]
    assert llm.generate([1], GREEDY, use_tqdm=False)[0].finished


@pytest.mark.usefixtures("ctrl_c_interrupts")
def test_a_ctrl_c_some_time_after_the_first_interrupts_a_step_that_hangs(tiny_model, monkeypatch) -> None:
    clock = count()
    monkeypatch.setattr("stepgraph.engine.interrupts.monotonic", lambda: float(next(clock)))
    llm = LLM(tiny_model, progress=False, **TINY_SETTINGS)
    log = interrupting(llm, monkeypatch, at_step=2, presses=3)
    with pytest.raises(KeyboardInterrupt):
        llm.generate([1], GREEDY, use_tqdm=False)
    assert log == ["step", "step", "held"]


def test_interrupts_are_held_for_whoever_handled_them_before_and_in_the_main_thread_only() -> None:
    pressed = []
    before = signal.signal(signal.SIGINT, lambda *_: pressed.append("handled"))
    try:
        with interrupts_held():
            signal.raise_signal(signal.SIGINT)
            assert pressed == []
        assert pressed == ["handled"]
        inside = signal.getsignal(signal.SIGINT)

        def elsewhere() -> None:
            with interrupts_held():
                pressed.append(signal.getsignal(signal.SIGINT))

        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        assert pressed[1:] == [inside]
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        with interrupts_held():
            assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)
