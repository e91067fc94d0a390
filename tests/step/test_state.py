"""SlotState: admitting a request writes its slot and nothing else; captures leave no trace."""

import pytest
import torch

from stepgraph.ops import slot_line
from stepgraph.platforms import create_platform
from stepgraph.step.shape import StepShape
from stepgraph.step.state import RING_DEPTH, SlotState

REQUEST = {
    "prompt": [5, 6, 7],
    "generation": 3,
    "max_length": 40,
    "temperature": 0.7,
    "top_k": 50,
    "top_p": 0.9,
    "seed": 0xFEDCBA9876543210,
    "stop_token_ids": (2, 11),
}


@pytest.fixture
def state(device) -> SlotState:
    return SlotState(
        max_num_seqs=4, max_model_len=50, block_size=16, max_shape=StepShape(32, 4), platform=create_platform(device)
    )


def test_every_buffer_is_there_at_birth_and_zero(state) -> None:
    assert state.lines.shape == (5, slot_line.LINE_WIDTH)
    assert state.tokens.shape == (5, 50)
    assert state.block_table.shape == (5, 4)
    assert state.plan.shape == (StepShape(32, 4).plan_length(16),)
    assert state.ring.shape == (RING_DEPTH, 4, slot_line.OUTPUT_WIDTH)
    for tensor in (state.lines, state.tokens, state.block_table, state.plan, state.counter, state.ring):
        assert tensor.dtype == torch.int32
        assert not tensor.any()


def test_admit_writes_the_requests_line_and_prompt(state) -> None:
    state.admit(2, **REQUEST)
    line = state.lines[2].cpu()
    assert line[slot_line.LENGTH] == 3
    assert line[slot_line.COMPUTED] == 0
    assert line[slot_line.ACTIVE] == 1
    assert line[slot_line.GENERATION] == 3
    assert line[slot_line.MAX_LENGTH] == 40
    assert line[slot_line.TOP_K] == 50
    assert line.view(torch.float32)[[slot_line.TEMPERATURE, slot_line.TOP_P]].tolist() == pytest.approx([0.7, 0.9])
    low, high = (int(line[column]) & 0xFFFFFFFF for column in (slot_line.SEED_LOW, slot_line.SEED_HIGH))
    assert (low, high) == (0x76543210, 0xFEDCBA98)
    assert line[slot_line.STOP_TOKENS :].tolist() == [2, 11] + [-1] * (slot_line.MAX_STOP_TOKENS - 2)
    assert state.tokens[2, :3].tolist() == [5, 6, 7]


def test_admit_touches_no_other_slot(state) -> None:
    state.lines.fill_(8)
    state.tokens.fill_(8)
    state.admit(2, **REQUEST)
    others = [0, 1, 3, 4]
    assert (state.lines[others] == 8).all()
    assert (state.tokens[others] == 8).all()


def test_a_slots_next_request_inherits_nothing(state) -> None:
    state.admit(2, **REQUEST)
    state.lines[2, slot_line.COMPUTED] = 17
    state.admit(2, **REQUEST | {"prompt": [9], "generation": 4, "stop_token_ids": (), "seed": 1, "top_k": 0})
    line = state.lines[2].cpu()
    assert (line[slot_line.LENGTH], line[slot_line.COMPUTED], line[slot_line.TOP_K]) == (1, 0, 0)
    assert (line[slot_line.SEED_LOW], line[slot_line.SEED_HIGH]) == (1, 0)
    assert (line[slot_line.STOP_TOKENS :] == -1).all()


def test_the_null_slot_and_slots_that_do_not_exist_admit_nobody(state) -> None:
    for slot in (0, 5, -1):
        with pytest.raises(AssertionError):
            state.admit(slot, **REQUEST)


def test_what_runs_untraced_leaves_counter_and_ring_as_they_were_even_if_it_fails(state) -> None:
    state.counter.fill_(6)
    state.ring.fill_(7)

    def run_and_fail() -> None:
        with state.untraced():
            state.counter.add_(1)
            state.ring.zero_()
            raise KeyError

    with pytest.raises(KeyError):
        run_and_fail()
    assert state.counter.tolist() == [6]
    assert (state.ring == 7).all()
