"""What is counted of speculative decoding, held against the answers themselves."""

import pytest
from tiny import drain

from stepgraph.engine.request import Request
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.speculation import SpeculationStatistics
from stepgraph.step.slot_sampling import SlotSampling

FEW = [66, 67, 68]
"""Tokens of which an answer repeats itself soon."""


def test_rows_are_counted_by_hand() -> None:
    counts = SpeculationStatistics()
    assert counts.mean_accepted_length == 1
    counts.add([(1, 0, 0)])  # a plain decode is no draft
    counts.add([(4, 5, 3), (1, 2, 0)])
    counts.add([(2, 3, 2)])  # the second one that stood ended the answer
    counts.add([(0, 3, 0)])  # nothing could be sampled
    assert counts == SpeculationStatistics(
        num_drafts=4, num_draft_tokens=13, num_saved_steps=4, num_accepted_per_position=[2, 2, 1, 0, 0, 0, 0, 0]
    )
    assert counts.num_accepted_tokens == 5
    assert counts.mean_accepted_length == pytest.approx(2.25)


def test_places_of_accepted_tokens_go_when_their_tokens_do() -> None:
    request = Request("r", [1], SamplingParams(), 1000, SlotSampling(seed=0))
    for accepted, tokens in ((0, [5]), (2, [6, 7, 8]), (1, [9, 10])):
        request.count_accepted(accepted)
        request.output_token_ids += tokens
    assert request.accepted == [1, 2, 4]
    assert [request.num_accepted(end) for end in range(7)] == [0, 0, 1, 2, 2, 3, 3]
    request.drop_tokens(3)
    assert (request.output_token_ids, request.accepted) == ([5, 6, 7], [1, 2])


def test_counts_of_the_engine_are_those_of_its_requests_and_of_its_steps(create_engine) -> None:
    engine = create_engine(speculative_config={"method": "suffix", "num_speculative_tokens": 4, "adaptive": False})
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, allowed_token_ids=FEW)
    requests = [engine.add_request(str(number), [66 + number, 70, 71], params) for number in range(3)]
    drain(engine)
    counts = engine.speculation
    assert counts.num_drafts > 0
    assert counts.num_draft_tokens == sum(request.num_draft_tokens for request in requests)
    assert counts.num_accepted_tokens == sum(len(request.accepted) for request in requests) > 0
    assert counts.num_accepted_per_position[4:] == [0, 0, 0, 0]
    falling = counts.num_accepted_per_position
    assert falling == sorted(falling, reverse=True)
    assert counts.num_drafts >= falling[0]
    for request in requests:
        assert all(0 < place < 40 for place in request.accepted)


def test_steps_saved_and_steps_run_are_the_tokens_of_an_answer(create_engine) -> None:
    engine = create_engine(speculative_config={"method": "ngram", "adaptive": False})
    params = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True, allowed_token_ids=FEW)
    request = engine.add_request("r", [66, 70, 71], params)
    num_rows = 0
    while request.finish_reason is None:
        num_rows += len(engine.step())
    assert engine.speculation.num_saved_steps > 0
    assert num_rows + engine.speculation.num_saved_steps == len(request.output_token_ids) == 40


def test_a_request_that_switches_it_off_drafts_nothing_and_gets_the_same_answer(create_engine) -> None:
    engine = create_engine(speculative_config={"method": "suffix", "adaptive": False})
    fields = {"temperature": 0, "max_tokens": 40, "ignore_eos": True, "allowed_token_ids": FEW}
    switched_off = SamplingParams(speculative={"num_speculative_tokens": 0}, **fields)
    off = engine.add_request("off", [66, 70, 71], switched_off)
    drain(engine)
    assert engine.speculation == SpeculationStatistics()
    lowered = engine.add_request("2", [66, 70, 71], SamplingParams(speculative={"num_speculative_tokens": 2}, **fields))
    drain(engine)
    assert engine.speculation.num_accepted_per_position[1] > 0
    assert engine.speculation.num_accepted_per_position[2] == 0
    assert lowered.output_token_ids == off.output_token_ids
