from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_fixtures import slot_line, slot_lines
from torch import Tensor

from stepgraph.abi import slot_line as line
from stepgraph.ops.force_acceptance import reference
from stepgraph.ops.force_acceptance import triton as kernels

VOCAB_SIZE, MAX_LEN = 50, 4096

Force = Callable[[Tensor, Tensor, list[tuple[int, int]], float], list[int]]
"""Lines, what was sampled, rows of (slot, number of proposals), probability → what comes out."""


def _tokens(num_slots: int) -> Tensor:
    return torch.randint(
        VOCAB_SIZE, (num_slots, MAX_LEN), dtype=torch.int32, generator=torch.Generator().manual_seed(1)
    )


def _samples(rows: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Slots and offsets of packed rows, and three samples of padding."""
    slots = [slot for slot, num_drafts in rows for _ in range(1 + num_drafts)]
    offsets = [offset for _, num_drafts in rows for offset in range(1 + num_drafts)]
    return tuple(torch.tensor([*column, 0, 0, 0], dtype=torch.int32) for column in (slots, offsets))


def _run(
    kernel: Callable[..., Tensor],
    device: str,
    lines: Tensor,
    sampled: Tensor,
    rows: list[tuple[int, int]],
    chance: float,
) -> list[int]:
    inputs = (lines, _tokens(len(lines)), *_samples(rows), sampled)
    return kernel(*(tensor.to(device) for tensor in inputs), chance, VOCAB_SIZE).tolist()


@pytest.fixture(params=["reference", "triton"])
def force(request: pytest.FixtureRequest, device: str) -> Force:
    """Either kernel."""
    if request.param == "reference":
        return lambda *inputs: _run(reference.force_acceptance, "cpu", *inputs)
    return lambda *inputs: _run(kernels.force_acceptance, device, *inputs)


def _case(seeds: list[int], rows: list[tuple[int, int]]) -> tuple[Tensor, Tensor]:
    """Lines of one slot per seed, and samples that are sometimes those proposed."""
    lines = slot_lines(*(slot_line(length=3 + 5 * i, seed=seed) for i, seed in enumerate(seeds)))
    slot_S, offset_S = _samples(rows)
    sampled = torch.randint(VOCAB_SIZE, slot_S.shape, dtype=torch.int32, generator=torch.Generator().manual_seed(2))
    drafts = _tokens(len(lines))[slot_S, lines[slot_S, line.LENGTH] + offset_S]
    sampled[::3] = drafts[::3]
    return lines, sampled


SEEDS = [0, 7, 2**63 + 5, 2**32 - 1]
ROWS = [(2, 3), (4, 0), (1, 8), (3, 1)]


def _proposed(rows: list[tuple[int, int]]) -> list[bool]:
    """Which samples have a proposal to be compared with: all of a row but the last."""
    return [offset < num_drafts for _, num_drafts in rows for offset in range(1 + num_drafts)] + [False] * 3


def _drafts(lines: Tensor, rows: list[tuple[int, int]]) -> list[int]:
    slot_S, offset_S = _samples(rows)
    return _tokens(len(lines))[slot_S, lines[slot_S, line.LENGTH] + offset_S].tolist()


def test_with_certainty_every_proposal_stands_and_other_samples_stay(force: Force) -> None:
    lines, sampled = _case(SEEDS, ROWS)
    drafts = _drafts(lines, ROWS)
    expected = [d if p else s for d, p, s in zip(drafts, _proposed(ROWS), sampled.tolist(), strict=True)]
    assert force(lines, sampled, ROWS, 1.0) == expected


def test_without_a_chance_every_proposal_falls_and_samples_that_differ_anyway_stay(force: Force) -> None:
    lines, sampled = _case(SEEDS, ROWS)
    found = force(lines, sampled, ROWS, 0.0)
    changed = [a != b for a, b in zip(found, sampled.tolist(), strict=True)]
    fell = [p and d == s for d, p, s in zip(_drafts(lines, ROWS), _proposed(ROWS), sampled.tolist(), strict=True)]
    assert changed == fell
    assert any(fell)
    assert all(0 <= token < VOCAB_SIZE for token in found)


def test_the_fate_of_a_requests_proposals_is_the_same_alone_and_in_any_batch(force: Force) -> None:
    lines, sampled = _case(SEEDS, ROWS)
    batched = force(lines, sampled, ROWS, 0.5)
    start = 0
    for slot, num_drafts in ROWS:
        end = start + 1 + num_drafts
        alone = torch.cat((sampled[start:end], torch.zeros(3, dtype=torch.int32)))
        assert force(lines, alone, [(slot, num_drafts)], 0.5)[: end - start] == batched[start:end]
        start = end


@pytest.mark.parametrize("chance", [0.3, 0.7])
def test_proposals_stand_as_often_as_asked_whatever_stood_before(force: Force, chance: float) -> None:
    """Over positions and over seeds. Draws are deterministic, so a test that passes keeps passing."""
    along = [(1, 3000)], [12]
    across = [(slot, 1) for slot in range(1, 1001)], list(range(1000))
    for rows, seeds in (along, across):
        lines = slot_lines(*(slot_line(length=3, seed=seed) for seed in seeds))
        sampled = torch.full_like(_samples(rows)[0], line.NO_TOKEN)
        stood = torch.tensor(
            [
                found == d
                for found, d, p in zip(
                    force(lines, sampled, rows, chance), _drafts(lines, rows), _proposed(rows), strict=True
                )
                if p
            ]
        )
        share, pairs = stood.float().mean(), (stood[1:] & stood[:-1]).float().mean()
        assert share == pytest.approx(chance, abs=4 * (chance * (1 - chance) / len(stood)) ** 0.5)
        assert pairs == pytest.approx(chance**2, abs=0.05)


@settings(max_examples=20)
@given(
    seeds=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=4),
    num_drafts=st.lists(st.integers(0, line.MAX_DRAFTS), min_size=4, max_size=4),
    chance=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
)
def test_triton_forces_what_the_reference_forces(device: str, seeds, num_drafts, chance: float) -> None:
    rows = [(slot, num_drafts[slot - 1]) for slot in range(1, 1 + len(seeds))]
    lines, sampled = _case(seeds, rows)
    expected = _run(reference.force_acceptance, "cpu", lines, sampled, rows, chance)
    assert _run(kernels.force_acceptance, device, lines, sampled, rows, chance) == expected
