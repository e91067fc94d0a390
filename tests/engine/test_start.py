"""What goes on side by side while an engine starts."""

import threading

import pytest

from stepgraph import SamplingParams
from stepgraph.engine.engine import Engine
from stepgraph.errors import ModelError
from stepgraph.executor import build
from stepgraph.executor.in_background import in_background
from stepgraph.platforms import create_platform
from stepgraph.step.graphs import StepGraphs

PROMPT = [5, 9, 2, 7, 7, 1]


def answer(engine: Engine) -> list[int]:
    engine.add_request("a", PROMPT, SamplingParams(max_tokens=12, ignore_eos=True))
    tokens = []
    while engine.has_work:
        for update in engine.step():
            tokens += update.new_token_ids
    return tokens


def test_graphs_captured_before_the_weights_came_answer_as_others(create_engine, monkeypatch) -> None:
    expected = answer(create_engine())
    captured = threading.Event()
    capture_all, fill = StepGraphs.capture_all, build.fill

    def capture_all_first(graphs: StepGraphs, *, progress: bool) -> None:
        capture_all(graphs, progress=progress)
        captured.set()

    def fill_late(*args, **settings):
        weights = fill(*args, **settings)
        assert captured.wait(60)
        yield from weights

    monkeypatch.setattr(type(create_platform("auto")), "captures_addresses", True)
    monkeypatch.setattr(StepGraphs, "capture_all", capture_all_first)
    monkeypatch.setattr(build, "fill", fill_late)
    engine = create_engine(capture="all")
    assert captured.is_set()
    assert answer(engine) == expected
    assert engine.executor.statistics.num_eager_steps == 0


def test_weights_that_do_not_fit_are_refused_while_graphs_are_captured(create_engine, monkeypatch) -> None:
    def damaged(*_, **__):
        yield
        raise ModelError("a file is damaged")

    monkeypatch.setattr(type(create_platform("auto")), "captures_addresses", True)
    monkeypatch.setattr(build, "fill", damaged)
    with pytest.raises(ModelError, match="damaged"):
        create_engine()


def test_work_beside_a_body_that_fails_is_left() -> None:
    begun = threading.Event()

    def endless():
        while True:
            begun.set()
            yield

    def fail() -> None:
        with in_background(endless(), create_platform("cpu")):
            begun.wait()
            raise KeyError

    with pytest.raises(KeyError):
        fail()


def test_work_beside_a_body_is_done_at_its_end() -> None:
    done = []

    def work():
        for number in range(5):
            done.append(number)
            yield

    with in_background(work(), create_platform("cpu")):
        pass
    assert done == [0, 1, 2, 3, 4]
