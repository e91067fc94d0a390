"""The comparison of ranks with each other and with one rank finds what it is there for."""

import re
from dataclasses import replace

import pytest
from random_engines import Arrival, Case, check_ranks, count_ties, keep_hidden_states, serve, serve_reference
from random_models import save_model
from ranked_engines import add_by_another_rule
from test_ranked_answers import MODEL, SETTINGS

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.sampling_params import SamplingParams

ARRIVALS = tuple(
    Arrival(
        step,
        tuple(range(1 + step, 30 + step)),
        SamplingParams(temperature=0.5 * (step % 2), seed=step, max_tokens=12, ignore_eos=True),
        priority=0,
        adapter=None,
        abort_step=None,
    )
    for step in range(6)
)
CASE = Case(0, 2, MODEL, SETTINGS | {"graph_backend": "eager"}, ARRIVALS, event=None)


def leave_a_part_out(executor) -> None:
    """What rank 1 adds is lost, on all ranks alike."""
    group = executor.group
    right = group.add_sum

    def wrong(part_TE, residual_TE, **options):
        return right(part_TE.zero_() if group.shard.rank == 1 else part_TE, residual_TE, **options)

    group.add_sum = wrong


def swap_parts_of_the_head(executor) -> None:
    """Logits lie in the order 1, 0, on all ranks alike."""
    group = executor.group
    right = group.gather

    def wrong(part_RW, out_RV):
        right(part_RW, out_RV)
        return out_RV.copy_(out_RV.roll(part_RW.shape[1], 1))

    group.gather = wrong


def miss_an_admission(executor) -> None:
    """Rank 1 is not told of the fourth request."""
    right = executor.admit
    if executor.group.shard.rank == 1:
        executor.admit = lambda admission: None if admission.tokens[0] == 4 else right(admission)


def draw_other_numbers(executor) -> None:
    """Rank 1 takes other seeds than it is told."""
    right = executor.admit
    if executor.group.shard.rank == 1:
        executor.admit = lambda admission: right(
            replace(admission, sampling=replace(admission.sampling, seed=admission.sampling.seed + 1))
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    save_model(MODEL, folder)
    return folder


@pytest.fixture(scope="module")
def expected(folder):
    return serve_reference(CASE, folder, build_engine)


@pytest.fixture
def serve_spoilt(folder, create_ranked):
    """Serves the case with ranks that something is done to; compares them at the end."""

    def serve_case(*spoil):
        settings = CASE.settings | {"tensor_parallel_size": 2}
        engine = create_ranked(EngineConfig.from_settings(model=str(folder), **settings))
        for change in (keep_hidden_states, *spoil):
            engine.executor.on_all(change)
        return serve(engine, CASE, folder, check_ranks)

    return serve_case


def test_ranks_that_nothing_was_done_to_pass(serve_spoilt, folder, expected) -> None:
    assert count_ties(CASE, folder, build_engine, serve_spoilt(), expected) == 0


@pytest.mark.parametrize("spoil", [add_by_another_rule, miss_an_admission, draw_other_numbers])
def test_mutant_a_rank_of_its_own_mind_differs_from_the_others(serve_spoilt, spoil) -> None:
    with pytest.raises(AssertionError, match="ranks differ"):
        serve_spoilt(spoil)


@pytest.mark.parametrize("spoil", [leave_a_part_out, swap_parts_of_the_head])
def test_mutant_ranks_that_agree_on_something_wrong_differ_from_one_rank(serve_spoilt, folder, expected, spoil) -> None:
    found = serve_spoilt(spoil)
    with pytest.raises(AssertionError, match=re.escape("Parting(request=")):
        count_ties(CASE, folder, build_engine, found, expected)
