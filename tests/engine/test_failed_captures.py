"""Captures that fail, and memory that runs out, while requests are served: who asked for it gets an answer or a sentence, and
nobody else notices."""

import pytest
import torch
from tiny import drain

from stepgraph.engine.engine import Engine
from stepgraph.engine.request import FinishReason
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import CaptureError, DeviceMemoryError
from stepgraph.step.eager_reason import EagerReason
from stepgraph.step.shape import Variant

NEIGHBOUR = SamplingParams(temperature=0.8, seed=1, max_tokens=24, ignore_eos=True)
ASKING = {
    Variant.PLAIN: SamplingParams(temperature=0, max_tokens=8, ignore_eos=True),
    Variant.EXTENDED: SamplingParams(
        temperature=0.9, seed=2, logprobs=2, presence_penalty=0.5, max_tokens=8, ignore_eos=True
    ),
    Variant.PROMPT_LOGPROBS: SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=8, ignore_eos=True),
}


class FailingBackend:
    """A back end that fails to capture what `fails` says, in the middle of a capture, after its warm-up, or before."""

    def __init__(self, backend, fails, how: str):
        self.name, self.memory_bytes = backend.name, backend.memory_bytes
        self._backend, self._fails, self._how = backend, fails, how

    def capture(self, program, warmups):
        if not self._fails(program.shape):
            return self._backend.capture(program, warmups)
        if self._how == "no memory in the warm-up":
            raise DeviceMemoryError("no memory")
        self._backend.capture(program, warmups)
        if self._how == "no memory in the capture":
            raise DeviceMemoryError("no memory")
        raise CaptureError("a fault")


def break_captures(engine: Engine, how: str, fails=lambda shape: True) -> None:
    """From now on, captures fail; there are no graphs of before."""
    graphs = engine.executor.runner.graphs
    graphs.store._backend = FailingBackend(graphs.store._backend, fails, how)
    graphs.store._captured.clear()
    graphs._last = None


def answers(engine: Engine, variant: Variant, *, before=lambda engine: None) -> list:
    """What a neighbour and a request that comes in the middle of its answer get; `before` is called between the two."""
    neighbour = engine.add_request("neighbour", range(5, 15), NEIGHBOUR)
    for _ in range(4):
        engine.step()
    before(engine)
    asking = engine.add_request("asking", [7, 8, 9, 7, 8, 9, 7, 8], ASKING[variant])
    drain(engine)
    return [
        neighbour.output_token_ids,
        asking.output_token_ids,
        asking.output_logprobs,
        asking.prompt_logprobs,
        asking.finish_reason,
    ]


def settings(num_drafts: int) -> dict:
    return {"speculative_config": {"method": "suffix", "num_speculative_tokens": num_drafts}} if num_drafts else {}


@pytest.fixture(scope="module")
def expected(create_engine):
    """What `answers` gives without failures."""
    known = {}

    def look_up(variant: Variant, num_drafts: int) -> list:
        if (variant, num_drafts) not in known:
            known[variant, num_drafts] = answers(create_engine(capture="lazy", **settings(num_drafts)), variant)
        return known[variant, num_drafts]

    return look_up


@pytest.mark.parametrize(
    ("how", "num_drafts"),
    [
        ("no memory in the warm-up", 0),
        ("no memory in the warm-up", 2),
        ("no memory in the capture", 0),
        ("a fault in the capture", 2),
    ],
)
@pytest.mark.parametrize("variant", list(Variant))
def test_a_capture_that_fails_while_serving_changes_no_answer_and_is_counted(
    create_engine, expected, how, variant, num_drafts
) -> None:
    engine = create_engine(capture="lazy", **settings(num_drafts))
    found = answers(engine, variant, before=lambda engine: break_captures(engine, how))
    assert found == expected(variant, num_drafts)
    statistics = engine.executor.statistics
    assert engine.executor.graph_counts().failed_captures > 0
    assert {reason for _, reason in statistics.steps} == {None, EagerReason.CAPTURE_FAILED}


def test_a_graph_of_more_than_what_could_not_be_captured_serves_the_step(create_engine) -> None:
    engine = create_engine(capture="lazy")
    engine.add_request("first", [1, 2, 3], ASKING[Variant.PROMPT_LOGPROBS])
    drain(engine)
    store = engine.executor.runner.graphs.store
    break_captures(engine, "no memory in the warm-up", fails=lambda shape: shape.variant < Variant.PROMPT_LOGPROBS)
    for shape in engine.executor.runner.policy.shapes(Variant.PROMPT_LOGPROBS):
        store.graph(shape)
    answers(engine, Variant.EXTENDED)
    assert engine.executor.statistics.num_eager_steps == 0
    assert engine.executor.graph_counts().failed_captures > 0


class LateFailure:
    """A program that finds no memory at its very end."""

    def __init__(self, program):
        self.shape, self._program = program.shape, program

    def __call__(self):
        self._program()
        raise torch.OutOfMemoryError("out of memory")


def run_out_of_memory(engine: Engine, *, late: bool) -> None:
    """From now on, steps that are not plain find no memory: for their buffers, or at their very end, when the device's state of
    the step has been written."""
    runner, create_program = engine.executor.runner, engine.executor.runner.create_program

    def failing(shape):
        if shape.variant is Variant.PLAIN:
            return create_program(shape)
        if not late:
            raise torch.OutOfMemoryError("out of memory")
        return LateFailure(create_program(shape))

    runner.create_program = failing
    if late:
        break_captures(engine, "no memory in the warm-up", fails=lambda shape: shape.variant > Variant.PLAIN)


@pytest.mark.parametrize(
    ("variant", "num_drafts", "late"),
    [(Variant.EXTENDED, 0, False), (Variant.EXTENDED, 2, True), (Variant.PROMPT_LOGPROBS, 0, True)],
)
def test_a_request_for_whose_step_there_is_no_memory_ends_alone(
    create_engine, expected, late, variant, num_drafts
) -> None:
    alone, *_ = expected(Variant.PLAIN, num_drafts)
    engine = create_engine(capture="lazy", **settings(num_drafts))
    create_program = engine.executor.runner.create_program
    neighbour, *_, finish_reason = answers(engine, variant, before=lambda engine: run_out_of_memory(engine, late=late))
    assert neighbour == alone
    assert finish_reason is FinishReason.ERROR
    engine.executor.runner.create_program = create_program  # there is memory again
    engine.executor.runner.graphs.store._eager.clear()
    request = engine.add_request("later", [3, 4, 5], ASKING[variant])
    drain(engine)
    assert (request.finish_reason, len(request.output_token_ids)) == (FinishReason.LENGTH, 8)


def test_the_sentence_says_what_to_do(create_engine) -> None:
    engine = create_engine(capture="lazy")
    run_out_of_memory(engine, late=False)
    request = engine.add_request("asking", [1, 2, 3], ASKING[Variant.EXTENDED])
    drain(engine)
    assert not request.error.is_users
    assert request.error.message.startswith("the device has no memory left for a step with what the request asks for")
    assert request.error.message.endswith("try again later, or without")


def test_memory_that_does_not_suffice_for_a_plain_step_is_the_engines_end(create_engine) -> None:
    engine = create_engine(capture="lazy", graph_backend="eager")

    def run_out() -> None:
        raise torch.OutOfMemoryError("out of memory")

    engine.executor.runner.create_program = lambda shape: run_out
    engine.add_request("r", [1, 2, 3], NEIGHBOUR)
    with pytest.raises(Exception, match="out of memory"):
        engine.step()


def test_buffers_of_extended_steps_are_made_with_the_first_of_them_and_are_bounded(create_engine) -> None:
    engine = create_engine(capture="lazy", max_num_seqs=200, max_num_batched_tokens=256, capture_sizes=(256,))
    engine.add_request("plain", [1, 2, 3], ASKING[Variant.PLAIN])
    drain(engine)
    assert "extended" not in vars(engine.executor.runner.logits)
    engine.add_request("extended", [1, 2, 3], ASKING[Variant.EXTENDED])
    drain(engine)
    buffers = engine.executor.runner.logits.extended
    assert buffers.processed.shape[0] == buffers.counts.shape[0] == 128 < buffers.logits.shape[0]


def test_steps_of_more_samples_than_the_buffers_hold_answer_as_each_request_alone(create_engine) -> None:
    # 5 requests in chunks of 2: the last chunk is short.
    def create() -> Engine:
        engine = create_engine(capture="lazy", max_num_seqs=5, max_num_batched_tokens=64, capture_sizes=(8, 64))
        engine.executor.runner.logits.extended_rows = 2
        return engine

    def params(i: int) -> SamplingParams:
        return SamplingParams(
            seed=i, temperature=0.9, logprobs=2, frequency_penalty=0.3 * (i % 3), max_tokens=6 + i % 3, ignore_eos=True
        )

    engine = create()
    together = [engine.add_request(str(i), [i + 1, 2, 3], params(i)) for i in range(5)]
    drain(engine)
    for i, request in enumerate(together):
        engine = create()
        alone = engine.add_request("alone", [i + 1, 2, 3], params(i))
        drain(engine)
        assert request.output_token_ids == alone.output_token_ids
        for mine, other in zip(request.output_logprobs, alone.output_logprobs, strict=True):
            assert [token for token, _ in mine.top] == [token for token, _ in other.top]
            assert mine.logprob == pytest.approx(other.logprob, abs=1e-4)
