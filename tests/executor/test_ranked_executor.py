"""Two ranks on CPU: the answers of one, and what happens when something fails. Workers serve all tests of this module."""

from collections.abc import Callable, Iterator

import pytest
from tiny import TINY_SETTINGS, drain

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.engine import Engine
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.executor.ranked import build_ranked_executor
from stepgraph.executor.workers import Workers
from stepgraph.models.source import resolve

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


def test_answers_are_those_of_one_rank(engine) -> None:
    two, one = engine(2), engine(1)
    assert two.executor.specs.num_ranks == 2
    assert answers(two) == answers(one)
    reports = two.executor.rank_reports()
    assert [report.rank for report in reports] == [0, 1]
    assert len({report.pid for report in reports}) == 2
    assert reports[0].num_graphs == reports[1].num_graphs > 0
