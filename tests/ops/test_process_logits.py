from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from slot_fixtures import SamplingSettings, side_buffers, slot_lines
from torch import Tensor
from transformers.generation import logits_process

from stepgraph import ops
from stepgraph.abi import slot_line as line
from stepgraph.graph.cpu import CpuBackend
from stepgraph.ops.process_logits import cpu, reference
from stepgraph.ops.process_logits import triton as kernels
from stepgraph.step.program import StepOutput

VOCAB_SIZE = kernels.CHUNK + 37
TOKENS = (0, 1, 5, kernels.CHUNK - 1, kernels.CHUNK, kernels.CHUNK + 31, VOCAB_SIZE - 1)
"""Those that settings name: the borders of chunks and of mask words."""
MAX_LEN, MAX_DRAFTS = 20, 3

Process = Callable[..., Tensor]


def _apply(
    process: Callable[..., None],
    logits: Tensor,
    row_slot: Tensor,
    slots: Sequence[SamplingSettings],
    offset: Tensor | None = None,
    *,
    device: str = "cpu",
) -> Tensor:
    """What a kernel makes of the logits, on the CPU. `slots` start at slot 1; the buffers have two rows more than the step."""
    num_rows, vocab_size = logits.shape
    max_len = max([MAX_LEN, *(len(asked.history) for asked in slots)])
    offset = torch.zeros_like(row_slot) if offset is None else offset
    lines = slot_lines(*(asked.line() for asked in slots))
    counts = torch.zeros(num_rows + 2, vocab_size, dtype=torch.int32, device=device)
    out = torch.full((num_rows + 2, vocab_size), 777.0, device=device)
    inputs = (logits, row_slot, offset, lines, *side_buffers(slots, vocab_size, max_len))
    process(*(tensor.to(device) for tensor in inputs), counts, out)
    assert not counts.any()
    assert (out[num_rows:] == 777).all()
    return out[:num_rows].cpu()


def _define(*inputs) -> Tensor:
    return _apply(reference.process_logits, *inputs)


@pytest.fixture(params=["cpu", "triton"])
def process(request: pytest.FixtureRequest, device: str) -> Process:
    """Either kernel."""
    if request.param == "cpu":
        return lambda *inputs: _apply(cpu.process_logits, *inputs)
    return lambda *inputs: _apply(kernels.process_logits, *inputs, device=device)


def _one(process: Process, logits: Sequence[float], **asked) -> list[float]:
    """The processed logits of one row."""
    return process(torch.tensor([logits]), _rows(1), [SamplingSettings(**asked)])[0].tolist()


def _rows(count: int) -> Tensor:
    return torch.arange(1, count + 1, dtype=torch.int32)


@st.composite
def _settings(draw: st.DrawFn) -> SamplingSettings:
    token = st.sampled_from(TOKENS)
    unknown = st.sampled_from([VOCAB_SIZE, 2**31 - 1])
    drafts = tuple(draw(st.lists(token, max_size=MAX_DRAFTS)))
    history = tuple(draw(st.lists(token | unknown, min_size=1, max_size=MAX_LEN - len(drafts))))
    known = (*history, *drafts)
    return SamplingSettings(
        history=history,
        drafts=drafts,
        prompt_length=draw(st.integers(1, len(history))),
        allowed=draw(st.none() | st.frozensets(token)),
        allowed_after=tuple(draw(st.lists(st.frozensets(token), min_size=MAX_DRAFTS, max_size=MAX_DRAFTS))),
        bad_words=tuple(
            draw(st.lists(st.lists(token | unknown, min_size=1, max_size=line.BAD_WORD_WIDTH).map(tuple), max_size=4))
            + [
                (*known[-n - skipped :][:n], draw(token))
                for n, skipped in draw(st.lists(st.tuples(st.integers(1, 7), st.integers(0, len(drafts))), max_size=2))
            ]
        ),
        biases=tuple(draw(st.lists(st.tuples(token | unknown, st.floats(-8, 8, width=16)), max_size=5))),
        stop_tokens=tuple(draw(st.lists(token, max_size=line.MAX_STOP_TOKENS))),
        min_length=draw(st.just(0) | st.integers(len(history), len(known) + 1)),
        repetition_penalty=draw(st.sampled_from([0.0, 1.0, 0.5, 1.3])),
        presence_penalty=draw(st.sampled_from([0.0, 1.5, -0.7])),
        frequency_penalty=draw(st.sampled_from([0.0, 0.3, -2.0])),
    )


@st.composite
def _batches(draw: st.DrawFn) -> tuple[Tensor, Tensor, list[SamplingSettings], Tensor]:
    """Rows of slots in any order with padding between them, some slots with a row for the token after each of their proposals.
    Only the logits that settings can name have any values."""
    slots = draw(st.lists(_settings() | st.just(SamplingSettings()), min_size=1, max_size=4))
    samples = [(0, 0)]
    for slot, asked in enumerate(slots, start=1):
        samples += [(slot, offset) for offset in range(1 + draw(st.integers(0, len(asked.drafts))))]
    samples = draw(st.permutations(samples))
    rows, offset = zip(*samples, strict=True)
    value = st.floats(-30, 30, width=16) | st.sampled_from([0.0, -torch.inf, torch.inf, torch.nan])
    logits = torch.randn(len(rows), VOCAB_SIZE, generator=torch.Generator().manual_seed(len(rows)))
    for row in logits:
        row[list(TOKENS)] = torch.tensor(draw(st.lists(value, min_size=len(TOKENS), max_size=len(TOKENS))))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
    return logits.to(dtype), torch.tensor(rows, dtype=torch.int32), slots, torch.tensor(offset, dtype=torch.int32)


def _check(actual: Tensor, batch: tuple[Tensor, Tensor, list[SamplingSettings], Tensor]) -> None:
    expected = _define(*batch)
    ran = batch[1] != line.NULL_SLOT
    torch.testing.assert_close(actual[ran], expected[ran], rtol=1e-6, atol=1e-6, equal_nan=True)


@settings(max_examples=60)
@given(_batches())
def test_cpu_processes_every_batch_as_defined(batch) -> None:
    _check(_apply(cpu.process_logits, *batch), batch)


@settings(max_examples=40)
@given(batch=_batches())
def test_triton_processes_every_batch_as_defined(device: str, batch) -> None:
    _check(_apply(kernels.process_logits, *batch, device=device), batch)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_row_that_asks_for_nothing_is_copied_exactly_and_samples_the_same_token(process: Process, dtype) -> None:
    logits = (4 * torch.randn(3, 70, generator=torch.Generator().manual_seed(3))).to(dtype)
    logits[1, 4] = torch.nan
    slots = [SamplingSettings(), SamplingSettings(repetition_penalty=2.0), SamplingSettings(stop_tokens=(3, 4))]
    processed = process(logits, _rows(3), slots)
    assert torch.equal(processed[[0, 2]], logits[[0, 2]].float())
    lines = slot_lines(*(asked.line(temperature=1.3, top_p=0.8, seed=5) for asked in slots))
    found, expected = (ops.sample(x, _rows(3), torch.zeros_like(_rows(3)), lines) for x in (processed, logits))
    assert torch.equal(found[[0, 2]], expected[[0, 2]])


def test_frequency_and_presence_count_the_output_and_repetition_the_prompt_as_well(process: Process) -> None:
    logits = [1.0, 2.0, 3.0, -4.0, 5.0]
    seen = {"history": (0, 3, 1, 1, 1, 3), "prompt_length": 2}
    assert _one(process, logits, **seen, frequency_penalty=0.5) == [1.0, 0.5, 3.0, -4.5, 5.0]
    assert _one(process, logits, **seen, presence_penalty=0.25) == [1.0, 1.75, 3.0, -4.25, 5.0]
    assert _one(process, logits, **seen, repetition_penalty=2.0) == [0.5, 1.0, 3.0, -8.0, 5.0]
    everything = {"repetition_penalty": 2.0, "frequency_penalty": -1.0, "presence_penalty": 0.5}
    assert _one(process, logits, **seen, **everything) == [0.5, 1 + 3 - 0.5, 3.0, -8 + 1 - 0.5, 5.0]


def test_logits_after_proposals_are_those_of_a_history_which_holds_them(process: Process) -> None:
    """Counts, ends of bad words, the least length and the mask all move on with each proposal."""
    asked = SamplingSettings(
        history=(1, 2, 3),
        drafts=(4, 5, 4),
        prompt_length=2,
        allowed=frozenset(range(10)),
        allowed_after=tuple(frozenset(range(10)) - {j} for j in (7, 8, 9)),
        bad_words=((3, 4, 6), (5, 4, 1), (4, 5, 0)),
        stop_tokens=(2,),
        min_length=5,
        repetition_penalty=1.5,
        presence_penalty=0.25,
        frequency_penalty=0.5,
    )
    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(5))
    found = process(logits, torch.ones(4, dtype=torch.int32), [asked], torch.arange(4, dtype=torch.int32))
    for j in range(4):
        settled = replace(
            asked,
            history=(*asked.history, *asked.drafts[:j]),
            drafts=(),
            allowed=(asked.allowed, *asked.allowed_after)[j],
            allowed_after=(),
        )
        assert torch.equal(found[j], process(logits[j : j + 1], _rows(1), [settled])[0])
    banned = [{token for token, value in enumerate(row) if value == -torch.inf} for row in found.tolist()]
    assert banned == [{2}, {2, 6, 7}, {0, 8}, {1, 9}]


def test_what_follows_the_history_in_its_buffer_is_not_counted(process: Process) -> None:
    asked = SamplingSettings(history=(1, 2), repetition_penalty=2.0, frequency_penalty=1.0)  # and then 3, 3, 3 …
    assert process(torch.ones(1, 5), _rows(1), [asked])[0].tolist() == [1, 0.5, -0.5, 1, 1]


def test_biases_come_before_penalties_and_bans_beat_both(process: Process) -> None:
    asked = {"history": (0, 1), "repetition_penalty": 2.0, "biases": ((0, 3.0), (1, 100.0), (1, -0.5), (1, 0.5))}
    assert _one(process, [-1.0, 0.0, 5.0], **asked) == [1.0, 50.0, 5.0]
    for ban in ({"allowed": frozenset({0, 2})}, {"bad_words": ((1,),)}, {"stop_tokens": (1,), "min_length": 3}):
        assert _one(process, [-1.0, 0.0, 5.0], **asked, **ban) == [1.0, -torch.inf, 5.0]


def test_a_bad_word_is_banned_where_it_would_be_completed(process: Process) -> None:
    words = ((4,), (7, 8, 0), (8, 1), (9, 2), (6, 7, 8, 3), (1, 2, 3, 4, 5, 6, 7, 5))
    banned = _one(process, [0.0] * 10, history=(7, 8), bad_words=words)
    assert [token for token, value in enumerate(banned) if value == -torch.inf] == [0, 1, 4]


def test_a_bad_word_longer_than_the_history_is_not_banned(process: Process) -> None:
    words = tuple((token, 7, 0) for token in range(10))
    assert _one(process, [0.0] * 10, history=(7,), bad_words=words) == [0.0] * 10


def test_a_bad_word_of_full_width_and_the_last_of_all_are_seen(process: Process) -> None:
    history = tuple(range(10, 10 + line.BAD_WORD_WIDTH))
    words = tuple((30 + i % 7,) for i in range(line.MAX_BAD_WORDS - 2))
    words += ((*history[1:], 2), (99, *history[2:], 3))
    banned = _one(process, [0.0] * 40, history=history, bad_words=words)
    assert [token for token, value in enumerate(banned) if value == -torch.inf] == [2, *range(30, 37)]


def test_stop_tokens_are_banned_below_the_least_length(process: Process) -> None:
    stops = tuple(range(line.MAX_STOP_TOKENS))
    for min_length, banned in ((6, 16), (5, 0), (0, 0)):
        row = _one(process, [1.0] * 20, history=(1,) * 5, stop_tokens=stops, min_length=min_length)
        assert row == [-torch.inf] * banned + [1.0] * (20 - banned)


def test_a_full_list_of_biases_is_added(process: Process) -> None:
    biases = tuple((2 * i, float(i)) for i in range(line.MAX_BIASES))
    row = process(torch.ones(1, VOCAB_SIZE), _rows(1), [SamplingSettings(biases=biases)])[0]
    assert row[: 2 * line.MAX_BIASES : 2].tolist() == [1.0 + i for i in range(line.MAX_BIASES)]
    assert (row[1::2] == 1).all()
    assert (row[2 * line.MAX_BIASES :] == 1).all()


def test_every_bit_of_a_mask_word_is_read(process: Process) -> None:
    allowed = frozenset({0, 31, 32, 63, 64, 66})
    row = _one(process, [0.0] * 67, allowed=allowed)
    assert {token for token, value in enumerate(row) if value == 0} == allowed


def test_tokens_outside_the_vocabulary_are_passed_over_and_touch_no_other_row(process: Process) -> None:
    for outside in (10, 11, kernels.CHUNK - 1, 2**31 - 1):
        asked = SamplingSettings(
            history=(1, outside),
            biases=((outside, 5.0), (3, 1.0)),
            bad_words=((outside,),),
            stop_tokens=(outside,),
            min_length=9,
            frequency_penalty=1.0,
        )
        last_first = torch.tensor([2, 1], dtype=torch.int32)
        row = [0, 0, 0, 1, 0, 0, 0, 0, 0, 0]
        assert process(torch.zeros(2, 10), last_first, [asked, asked]).tolist() == [row, row]


def test_a_history_of_many_blocks_is_counted(process: Process) -> None:
    length = kernels.COUNTERS * kernels.COUNT_BLOCK + 70
    history = torch.randint(0, 5, (length,), generator=torch.Generator().manual_seed(7))
    asked = SamplingSettings(history=tuple(history.tolist()), prompt_length=1500, frequency_penalty=0.125)
    expected = -0.125 * history[1500:].bincount(minlength=7)
    assert process(torch.zeros(1, 7), _rows(1), [asked])[0].tolist() == expected.tolist()


@pytest.mark.parametrize("penalty", [0.7, 1.0, 1.9])
def test_penalty_bad_words_and_least_length_are_those_of_transformers(process: Process, penalty: float) -> None:
    generator = torch.Generator().manual_seed(11)
    histories = torch.randint(0, 30, (3, 12), generator=generator)
    logits = 3 * torch.randn(3, 50, generator=generator)
    words = [[*histories[0, -1:].tolist(), 7], [9], [*histories[2, -3:].tolist(), 8], [1, 2]]
    slots = [
        SamplingSettings(
            history=tuple(history.tolist()),
            prompt_length=4,
            bad_words=tuple(map(tuple, words)),
            stop_tokens=(40, 41),
            min_length=13,
            repetition_penalty=penalty,
        )
        for history in histories
    ]
    expected = logits
    for processor in (
        logits_process.NoBadWordsLogitsProcessor(words),
        logits_process.MinLengthLogitsProcessor(13, torch.tensor([40, 41])),
        logits_process.RepetitionPenaltyLogitsProcessor(penalty),
    ):
        expected = processor(histories, expected)
    torch.testing.assert_close(process(logits, _rows(3), slots), expected, rtol=1e-6, atol=0)


def test_sampling_with_everything_is_captured_as_opaque_calls_and_follows_its_buffers() -> None:
    """The extended part of a step: the graph is captured on an empty plan and replayed on requests."""
    asked = [SamplingSettings(history=(1, 2), frequency_penalty=9.0), SamplingSettings(biases=((3, 100.0),))]
    max_len, vocab_size = 8, 10
    side = side_buffers(asked, vocab_size, max_len)
    lines = torch.zeros(3, line.LINE_WIDTH, dtype=torch.int32)
    logits = torch.zeros(3, vocab_size)
    row_slot, query_start, kv_len, sample_start, sample_slot, offset = (
        torch.zeros(size, dtype=torch.int32) for size in (3, 4, 3, 4, 3, 3)
    )
    counts, processed = torch.zeros(4, vocab_size, dtype=torch.int32), torch.zeros(4, vocab_size)
    counter, ring = torch.zeros(1, dtype=torch.int32), torch.zeros(2, 4, line.OUTPUT_WIDTH, dtype=torch.int32)
    logprob_ring = torch.zeros(2, 4, line.LOGPROB_WIDTH, dtype=torch.int32)

    def program() -> StepOutput:
        ops.process_logits(logits, sample_slot, offset, lines, *side, counts[:3], processed[:3])
        sampled = ops.sample(processed[:3], sample_slot, offset, lines)
        count = lines.index_select(0, sample_slot)[:, line.NUM_LOGPROBS].contiguous()
        ops.logprobs(logits, sampled, count, counter, logprob_ring, 0)
        ops.commit(lines, side.tokens, counter, ring, row_slot, query_start, kv_len, sample_start, sampled, 1)
        return StepOutput(logits, sampled)

    graph = CpuBackend().capture(program, warmups=1)
    namespace = torch.ops.stepgraph
    for operator in (namespace.process_logits.default, namespace.sample.default, namespace.logprobs.default):
        assert graph.calls.count(operator) == 1

    counter.zero_()
    logits.copy_(torch.tensor([[0.0] * 9 + [1.0], [0.0, 5.0, 6.0] + [0.0] * 7, [0.0] * 4 + [2.0] + [0.0] * 5]))
    row_slot.copy_(torch.tensor([2, 0, 1]))
    query_start.copy_(torch.tensor([0, 1, 1, 3]))
    kv_len.copy_(torch.tensor([1, 0, 3]))
    sample_start.copy_(torch.tensor([0, 1, 1, 3]))
    sample_slot.copy_(torch.tensor([2, 1, 1]))
    offset.copy_(torch.tensor([0, 0, 1]))
    lines[1], lines[2] = asked[0].line(computed=1, num_drafts=1), asked[1].line(computed=0)
    lines[2, line.NUM_LOGPROBS] = 2
    side.tokens[1, 2] = 1
    assert graph.replay().sampled.tolist() == [3, 1, 4]
    assert ring[0, [0, 2], line.OUT_NUM_TOKENS].tolist() == [1, 2]
    assert ring[0, 0, line.OUT_TOKENS] == 3
    assert ring[0, 2, line.OUT_TOKENS : line.OUT_TOKENS + 2].tolist() == [1, 4]
    assert logprob_ring[0, 0, :3].view(torch.float32)[0] == pytest.approx(-float(torch.tensor(9 + torch.e).log()))
    assert logprob_ring[0, 0, 1:3].tolist() == [2, 9]
    assert not logprob_ring[:, 1:].any()
