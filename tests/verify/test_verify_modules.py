"""The check of captured graphs with several modules that draft: each writes where it should, from what its request carries on."""

import pytest
from tiny import save_tiny_model

from stepgraph.abi import slot_line
from stepgraph.spec import mtp
from stepgraph.spec.mtp_levels import carry, next_level
from stepgraph.step.shape import StepShape
from stepgraph.verify.compositions import Composition, Row
from stepgraph.verify.graphs import verify_graphs, verify_shape

ROUND = StepShape(48, 8, num_drafts=3)
PROPOSED = Composition(
    (
        Row(20, 4, 21, num_drafts=3),
        Row(9, 2, 10, num_drafts=1),
        Row(0, 7, 7),
        Row(33, 3, 34, num_drafts=3),
        Row(15, 4, 16, active=False, num_drafts=3),
        Row(1, 4, 2, num_drafts=3),
        Row(40, 5, 60),
        Row(47, 1, 48),
    ),
    seed=5,
)


@pytest.fixture(scope="module", params=[2, 3])
def model(request, tmp_path_factory) -> str:
    return save_tiny_model(tmp_path_factory.mktemp("model"), num_mtp_modules=request.param)


@pytest.fixture
def executor(create_engine, model):
    speculative = {"method": "mtp", "num_speculative_tokens": 3}
    return create_engine(model=model, capture="lazy", speculative_config=speculative).executor


def check(executor) -> list[str]:
    return verify_shape(executor.runner, ROUND, [PROPOSED], alone_rows=0).mismatches


def test_right_graphs_pass_with_several_modules_and_any_number_of_proposals(executor) -> None:
    reports = verify_graphs(executor, rounds=6, seed=0, draft_levels=(0, 1, 3))
    assert [(str(report.shape), report.mismatches) for report in reports] == [
        (f"{size}x8{drafts}", []) for drafts in ("", "+1", "+3") for size in (48, 8)
    ]
    assert check(executor) == []


def test_mutant_module_that_leaves_the_positions_before_as_they_were_is_caught(executor, monkeypatch) -> None:
    """What it did there with proposals, in graph and eager alike."""

    def mutant(previous, step, k, lines, *rest):
        lines = lines.clone()
        lines[step.row_slot, slot_line.START] = step.kv_len - step.query_start.diff()
        return next_level(previous, step, k, lines, *rest)

    monkeypatch.setattr(mtp, "next_level", mutant)
    assert any("or did not write one" in mismatch for mismatch in check(executor))


def test_mutant_module_that_rewrites_what_others_may_share_is_caught(executor, monkeypatch) -> None:
    def mutant(previous, step, k, lines, *rest):
        lines = lines.clone()
        lines[:, slot_line.START] = 0
        return next_level(previous, step, k, lines, *rest)

    monkeypatch.setattr(mtp, "next_level", mutant)
    assert any("cache entries of no token of the step were written" in mismatch for mismatch in check(executor))


def test_mutant_module_that_starts_from_what_another_slot_carries_on_is_caught(executor, monkeypatch) -> None:
    def mutant(*args):
        *rest, carried_SE, block_size = args
        return next_level(*rest, carried_SE.roll(1, 0), block_size)

    monkeypatch.setattr(mtp, "next_level", mutant)
    assert any("read a poisoned entry" in mismatch for mismatch in check(executor))


def test_mutant_module_that_writes_one_position_too_far_is_caught(executor, monkeypatch) -> None:
    def mutant(previous, step, k, lines, *rest):
        lines = lines.clone()
        lines[:, slot_line.COMPUTED] += 1
        return next_level(previous, step, k, lines, *rest)

    monkeypatch.setattr(mtp, "next_level", mutant)
    assert any("cache entries of no token of the step were written" in mismatch for mismatch in check(executor))


def test_mutant_that_carries_nothing_on_is_caught_in_the_graph(executor, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(mtp, "carry", lambda *args: None)
        assert executor.runner.graphs.store.graph(ROUND) is not None
    assert any("layers' state of slots" in mismatch for mismatch in check(executor))


def test_mutant_that_carries_on_for_rows_that_did_not_run_is_caught(executor, monkeypatch) -> None:
    def mutant(level, k, lines, hidden_TE, carried_SE):
        carry(level, k, lines, hidden_TE, carried_SE)
        carried_SE[5] = hidden_TE[0]

    monkeypatch.setattr(mtp, "carry", mutant)
    assert any("cache entries of no token of the step were written" in mismatch for mismatch in check(executor))
