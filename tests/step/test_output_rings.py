"""What another process reads of a rank's steps: none before it is done, each from its own place."""

import pytest
import torch

from stepgraph.abi import slot_line
from stepgraph.step.output_rings import RING_DEPTH, OutputReader, OutputRings
from stepgraph.step.plan import StepPlan
from stepgraph.step.shape import StepShape


@pytest.fixture
def rings() -> OutputRings:
    return OutputRings.create(StepShape(8, 2), lambda *size: torch.zeros(size, dtype=torch.int32))


def test_a_step_is_done_once_as_many_steps_are(rings) -> None:
    reader = OutputReader(rings)
    for step in range(3 * RING_DEPTH):
        for num_launched in range(step + 1, step + RING_DEPTH):
            for num_done in range(step, num_launched + 1):  # those before are known to be done
                rings.counter.fill_(num_done % RING_DEPTH)
                assert reader.is_done(step, num_launched) is (num_done > step), (step, num_launched, num_done)


def test_results_are_those_of_the_step_and_stay_what_they_were(rings) -> None:
    reader, plan, found = OutputReader(rings), StepPlan(((1, 1), (2, 1)), (), 0), []
    for step in range(2 * RING_DEPTH):
        rings.rows[step % RING_DEPTH, :, slot_line.OUT_TOKENS] = torch.tensor([step, 100 + step], dtype=torch.int32)
        found.append(reader.read(step, plan))
    for step, results in enumerate(found):
        assert results.table[:, slot_line.OUT_TOKENS].tolist() == [step, 100 + step]
