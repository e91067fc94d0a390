"""SlotState: admitting a request writes its slot and nothing else; captures leave no trace."""

from functools import partial

import numpy as np
import pytest
import torch

from stepgraph.abi import slot_line
from stepgraph.layers.inputs import LineRows
from stepgraph.platforms import create_platform
from stepgraph.step.admission import Admission
from stepgraph.step.output_rings import RING_DEPTH
from stepgraph.step.plan import BlockTables
from stepgraph.step.shape import StepShape
from stepgraph.step.slot_sampling import SlotSampling
from stepgraph.step.state import SlotState

SAMPLING = SlotSampling(
    seed=0xFEDCBA9876543210,
    temperature=0.7,
    top_k=50,
    top_p=0.9,
    min_p=0.1,
    stop_token_ids=(2, 11),
    repetition_penalty=1.25,
    presence_penalty=-0.5,
    frequency_penalty=1.5,
    min_tokens=4,
    logit_bias=((7, -2.5), (9, 1.0)),
    bad_words=((3,), (4, 5, 6)),
    masked=True,
    max_num_drafts=5,
    num_logprobs=6,
    num_prompt_logprobs=1,
)
REQUEST = {
    "tokens": [5, 6, 7, 8],
    "prompt_len": 3,
    "generation": 3,
    "max_length": 40,
    "sampling": SAMPLING,
}
VOCAB_SIZE = 70
SHAPE = StepShape(32, 4, num_drafts=2)


@pytest.fixture
def create_state(device):
    return partial(
        SlotState,
        max_num_seqs=4,
        max_model_len=50,
        tables=BlockTables(16),
        vocab_size=VOCAB_SIZE,
        max_shape=SHAPE,
        platform=create_platform(device),
    )


@pytest.fixture
def state(create_state) -> SlotState:
    return create_state()


def buffers(state) -> tuple[torch.Tensor, ...]:
    """Those with a line per slot."""
    return state.lines, state.tokens, state.block_tables[0], state.biases, state.bad_words, state.masks


def test_every_buffer_is_there_at_birth_and_zero(state) -> None:
    assert state.lines.shape == (5, slot_line.LINE_WIDTH)
    assert state.tokens.shape == (5, 50)
    assert state.block_tables[0].shape == (5, 4)
    assert state.masks.shape == (5, 3, 3)
    assert state.plan.shape == (SHAPE.plan_length(16),)
    assert state.ring.shape == (RING_DEPTH, 4, slot_line.OUTPUT_WIDTH)
    assert state.logprob_ring.shape == (RING_DEPTH, 12, slot_line.LOGPROB_WIDTH)
    assert state.prompt_logprob_ring.shape == (RING_DEPTH, 32, slot_line.LOGPROB_WIDTH)
    rings = (state.ring, state.logprob_ring, state.prompt_logprob_ring)
    for tensor in (*buffers(state), state.plan, state.counter, *rings):
        assert tensor.dtype == torch.int32
        assert not tensor.any()


def test_admit_writes_the_requests_line_and_tokens(state) -> None:
    state.admit(Admission(2, **REQUEST))
    line = state.lines[2].cpu()
    whole = {
        slot_line.LENGTH: 4,
        slot_line.COMPUTED: 0,
        slot_line.ACTIVE: 1,
        slot_line.GENERATION: 3,
        slot_line.MAX_LENGTH: 40,
        slot_line.TOP_K: 50,
        slot_line.PROMPT_LENGTH: 3,
        slot_line.MIN_LENGTH: 7,
        slot_line.NUM_BIASES: 2,
        slot_line.NUM_BAD_WORDS: 2,
        slot_line.MASKED: 1,
        slot_line.NUM_LOGPROBS: 6,
        slot_line.NUM_PROMPT_LOGPROBS: 1,
        slot_line.NUM_DRAFTS: 0,
        slot_line.MAX_NUM_DRAFTS: 5,
    }
    assert {column: int(line[column]) for column in whole} == whole
    floats = {
        slot_line.TEMPERATURE: 0.7,
        slot_line.TOP_P: 0.9,
        slot_line.MIN_P: 0.1,
        slot_line.REPETITION_PENALTY: 1.25,
        slot_line.PRESENCE_PENALTY: -0.5,
        slot_line.FREQUENCY_PENALTY: 1.5,
    }
    assert line.view(torch.float32)[list(floats)].tolist() == pytest.approx(list(floats.values()))
    low, high = (int(line[column]) & 0xFFFFFFFF for column in (slot_line.SEED_LOW, slot_line.SEED_HIGH))
    assert (low, high) == (0x76543210, 0xFEDCBA98)
    assert line[slot_line.STOP_TOKENS :].tolist() == [2, 11] + [-1] * (slot_line.MAX_STOP_TOKENS - 2)
    assert state.tokens[2, :4].tolist() == [5, 6, 7, 8]
    biases = state.biases[2, :2].cpu()
    assert biases[:, 0].tolist() == [7, 9]
    assert biases[:, 1].contiguous().view(torch.float32).tolist() == [-2.5, 1.0]
    assert state.bad_words[2, :2].tolist() == [[-1] * 7 + [3], [-1] * 5 + [4, 5, 6]]


def test_admit_starts_a_request_after_the_blocks_that_are_cached(state) -> None:
    state.admit(Admission(3, **REQUEST | {"tokens": range(40), "blocks": [8, 5], "computed": 32}))
    assert state.lines[3, slot_line.COMPUTED] == 32
    assert state.block_tables[0][3].tolist() == [8, 5, 0, 0]


def test_admit_gives_each_block_group_its_own(create_state) -> None:
    state = create_state(tables=BlockTables(16, (1, 1), 5))
    state.admit(Admission(3, **REQUEST | {"tokens": range(40), "blocks": [8, 0, 5, 9], "computed": 32}))
    assert state.plan.shape == (SHAPE.plan_length(16, 2),)
    assert [table[3].tolist() for table in state.block_tables] == [[8, 5, 0, 0], [0, 9, 0, 0]]


def test_admit_says_which_lines_the_first_step_reads_and_writes(create_state, device) -> None:
    state = create_state(has_lines=True)
    for admission in (Admission(3, **REQUEST | {"lines": (7, 2)}), Admission(4, **REQUEST)):
        state.admit(admission)
    assert (state.block_tables[0].shape, state.line_table.shape) == ((5, 4), (5, 3))
    assert state.line_table.tolist() == [[0, 0, 0]] * 3 + [[7, 2, 2], [4, 4, 4]]
    assert not state.block_tables[0].any()
    for expected in ([7, 2, 9], [2, 9, 9], [9, 9, 9]):
        state.line_table[3, slot_line.NEXT_LINE] = 9
        lines = LineRows.take(state.line_table, torch.tensor([4, 3, 0, 0], dtype=torch.int32, device=device))
        assert (lines.read.tolist(), lines.write.tolist()) == ([4, expected[0], 0, 0], [4, expected[1], 0, 0])
    assert state.line_table.tolist() == [[0, 0, 0]] * 3 + [[9, 9, 9], [4, 4, 4]]


def test_masks_are_written_to_their_slot_only_and_those_not_given_stay(state) -> None:
    assert state.masks.shape == (5, 3, 3)
    given = np.array([[1, -1, 6], [2, 3, 4]], dtype=np.int32)
    state.set_masks(2, given)
    assert state.masks[2].tolist() == [*given.tolist(), [0] * 3]
    state.set_masks(2, given[1:])
    assert state.masks[2].tolist() == [[2, 3, 4], [2, 3, 4], [0] * 3]
    assert not state.masks[[0, 1, 3, 4]].any()


def test_admit_touches_no_other_slot(state) -> None:
    for buffer in buffers(state):
        buffer.fill_(8)
    state.admit(Admission(2, **REQUEST))
    for buffer in buffers(state):
        assert (buffer[[0, 1, 3, 4]] == 8).all()


def test_a_slots_next_request_inherits_nothing(state) -> None:
    state.admit(Admission(2, **REQUEST))
    state.lines[2, slot_line.COMPUTED] = 17
    state.lines[2, slot_line.NUM_DRAFTS] = 4
    state.admit(
        Admission(2, **REQUEST | {"tokens": [9], "prompt_len": 1, "generation": 4, "sampling": SlotSampling(seed=1)})
    )
    line = state.lines[2].cpu()
    assert (line[slot_line.LENGTH], line[slot_line.COMPUTED], line[slot_line.TOP_K]) == (1, 0, 0)
    assert not line[slot_line.MIN_LENGTH : slot_line.MAX_NUM_DRAFTS].any()
    assert line[slot_line.MAX_NUM_DRAFTS] == slot_line.MAX_DRAFTS
    assert (line[slot_line.SEED_LOW], line[slot_line.SEED_HIGH]) == (1, 0)
    assert (line[slot_line.STOP_TOKENS :] == -1).all()


def test_the_null_slot_and_slots_that_do_not_exist_admit_nobody(state) -> None:
    for slot in (0, 5, -1):
        with pytest.raises(AssertionError):
            state.admit(Admission(slot, **REQUEST))


def test_what_runs_preserved_leaves_counter_and_ring_as_they_were_even_if_it_fails(state) -> None:
    state.counter.fill_(6)
    rings = (state.ring, state.logprob_ring, state.prompt_logprob_ring)
    for ring in rings:
        ring.fill_(7)

    def run_and_fail() -> None:
        with state.preserved():
            state.counter.add_(1)
            for ring in rings:
                ring.zero_()
            raise KeyError

    with pytest.raises(KeyError):
        run_and_fail()
    assert state.counter.tolist() == [6]
    assert all((ring == 7).all() for ring in rings)
