"""The comparison of ranks with each other and with one rank finds what it is there for."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
from random_engines import Arrival, Case, check_ranks, count_ties, keep_hidden_states, serve, serve_reference
from random_models import save_model
from ranked_engines import add_by_another_rule
from test_ranked_answers import MODEL, SETTINGS

from stepgraph.config import EngineConfig
from stepgraph.engine.build import build_engine
from stepgraph.engine.request import Request
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.layers.experts import Experts, MixtureMLP

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


WITH_EXPERTS = replace(
    CASE,
    model=MODEL._replace(architecture="qwen2 moe", num_mtp_modules=0, experts=(8, 2, 24, True, 0)),
    settings=CASE.settings | {"enable_expert_parallel": True},
)


def experts_of(executor):
    return [module for module in executor.runner.model.modules() if isinstance(module, Experts)]


def forget_the_offset_of_experts(executor) -> None:
    """Every rank takes its experts for the first ones."""
    for experts in experts_of(executor):
        experts.first = 0


def take_experts_for_another_ranks(executor) -> None:
    """Each rank has what the other has, and knows nothing of it."""
    for experts in experts_of(executor):
        experts.first = experts.count - experts.first


def leave_an_expert_out(executor) -> None:
    """Rank 1 ends its range one too early."""
    if executor.group.shard.rank == 1:
        for experts in experts_of(executor):
            experts.count -= 1


def add_all_that_all_tokens_take(executor) -> None:
    """The gate of the shared expert is applied by rank 0 alone."""
    if executor.group.shard.rank == 1:
        for module in executor.runner.model.modules():
            if isinstance(module, MixtureMLP):
                module.shared_expert_gate = None


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


class Expected(NamedTuple):
    """A case, and what one rank says to it."""

    case: Case
    folder: Path
    answers: list[Request]

    @classmethod
    def of(cls, case: Case, folder: Path) -> Expected:
        save_model(case.model, folder)
        return cls(case, folder, serve_reference(case, folder, build_engine))

    def count_ties(self, found: list[Request]) -> int:
        return count_ties(self.case, self.folder, build_engine, found, self.answers)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return Expected.of(CASE, tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def with_experts(tmp_path_factory):
    return Expected.of(WITH_EXPERTS, tmp_path_factory.mktemp("experts"))


@pytest.fixture
def serve_spoilt(create_ranked):
    """Serves a case with ranks that something is done to; compares them at the end."""

    def serve_case(expected: Expected, *spoil):
        case = expected.case
        settings = case.settings | {"tensor_parallel_size": 2}
        engine = create_ranked(EngineConfig.from_settings(model=str(expected.folder), **settings))
        for change in (keep_hidden_states, *spoil):
            engine.executor.on_all(change)
        return serve(engine, case, expected.folder, check_ranks)

    return serve_case


@pytest.mark.parametrize("name", ["dense", "with_experts"])
def test_ranks_that_nothing_was_done_to_pass(serve_spoilt, name, request) -> None:
    expected = request.getfixturevalue(name)
    assert expected.count_ties(serve_spoilt(expected)) == 0


@pytest.mark.parametrize("spoil", [add_by_another_rule, miss_an_admission, draw_other_numbers])
def test_mutant_a_rank_of_its_own_mind_differs_from_the_others(serve_spoilt, dense, spoil) -> None:
    with pytest.raises(AssertionError, match="ranks differ"):
        serve_spoilt(dense, spoil)


@pytest.mark.parametrize("spoil", [leave_a_part_out, swap_parts_of_the_head])
def test_mutant_ranks_that_agree_on_something_wrong_differ_from_one_rank(serve_spoilt, dense, spoil) -> None:
    found = serve_spoilt(dense, spoil)
    with pytest.raises(AssertionError, match=re.escape("Parting(request=")):
        dense.count_ties(found)


@pytest.mark.parametrize(
    "spoil",
    [
        forget_the_offset_of_experts,
        take_experts_for_another_ranks,
        leave_an_expert_out,
        add_all_that_all_tokens_take,
    ],
)
def test_mutant_ranks_with_wrong_experts_differ_from_one_rank(serve_spoilt, with_experts, spoil) -> None:
    found = serve_spoilt(with_experts, spoil)
    with pytest.raises(AssertionError, match=re.escape("Parting(request=")):
        with_experts.count_ties(found)
