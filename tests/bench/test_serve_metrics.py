"""From the bytes of answers to the figures of a run: what `bench serve` computes without a network."""

import json
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from stepgraph.bench.serve_client import AnswerError, read_stream
from stepgraph.bench.serve_metrics import (
    METRICS,
    Outcome,
    errors_by_kind,
    most_at_once,
    most_tokens_in_a_second,
    summarize,
)
from stepgraph.bench.workloads import arrival_times

CHUNK = {"choices": [{"index": 0, "text": " hello", "finish_reason": None}], "usage": None}
USAGE = {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 9}}
ROLE = {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
DONE = "[DONE]"


def outcome(start: float, *chunk_times: float, end: float | None = None, tokens: int | None = None) -> Outcome:
    return Outcome(
        start_s=start,
        end_s=chunk_times[-1] if end is None else end,
        input_len=10,
        output_len=len(chunk_times) if tokens is None else tokens,
        chunk_times_s=chunk_times,
    )


def summary(outcomes, **options) -> dict:
    options = {"duration_s": 10.0, "metrics": list(METRICS), "percentiles": [50, 99], "goodput_ms": {}} | options
    return summarize(outcomes, **options)


def encode(event, *, newline: str = "\n", compact: bool = True) -> bytes:
    if event is None:
        return f": still there{newline}{newline}".encode()
    text = event if isinstance(event, str) else json.dumps(event, separators=(",", ":") if compact else None)
    return f"data: {text}{newline}{newline}".encode()


@given(
    events=st.lists(st.sampled_from([CHUNK, None, {"choices": []}]), max_size=20),
    cuts=st.lists(st.integers(0, 3000), max_size=30),
    newline=st.sampled_from(["\n", "\r\n"]),
    compact=st.booleans(),
    chat=st.booleans(),
)
def test_a_stream_reads_the_same_however_it_is_cut(events, cuts, newline, compact, chat) -> None:
    events = [*([ROLE] if chat else []), *events, CHUNK, USAGE, DONE]
    encoded = [encode(event, newline=newline, compact=compact) for event in events]
    whole = b"".join(encoded)
    borders = sorted({0, len(whole), *(cut for cut in cuts if cut < len(whole))})
    reads = [(float(end), whole[start:end]) for start, end in pairwise(borders)]
    # A read is stamped with the position of its end: a chunk has arrived with the read in which its last byte came.
    ends = np.cumsum([len(part) for part in encoded])
    expected = [min(b for b in borders if b >= end) for event, end in zip(events, ends, strict=True) if event is CHUNK]

    stream = read_stream(reads)
    assert stream.chunk_times_s == expected
    assert stream.end_s == min(border for border in borders if border >= ends[-2])
    assert (stream.num_prompt_tokens, stream.num_output_tokens) == (7, 9)


def test_words_of_the_protocol_inside_an_answer_are_text() -> None:
    text = {"choices": [{"text": '"error": {}, "choices":[] data: [DONE]\n\n"usage": {"completion_tokens": 1} "role"'}]}
    stream = read_stream([(1.0, encode(CHUNK) + encode(text)), (2.0, encode(CHUNK) + encode(DONE))])
    assert stream.chunk_times_s == [1.0, 1.0, 2.0]
    assert stream.num_output_tokens is None


def test_a_first_event_with_role_and_text_is_a_piece_of_the_answer() -> None:
    first = {"choices": [{"delta": {"role": "assistant", "content": "Hi"}}]}
    assert read_stream([(1.0, encode(first)), (2.0, encode(DONE))]).chunk_times_s == [1.0]


def test_a_closing_event_without_its_blank_line_counts() -> None:
    assert read_stream([(1.0, encode(CHUNK)), (2.0, b"data: [DONE]")]).chunk_times_s == [1.0]


@pytest.mark.parametrize(
    ("events", "complaint"),
    [
        ([], "stream ended early: 0 chunks"),
        ([CHUNK, CHUNK], "stream ended early: 2 chunks"),
        ([USAGE, DONE], "empty answer"),
        ([CHUNK, {"error": {"message": "out of memory"}}, DONE], "error in the stream: .*out of memory"),
        ([CHUNK, '{"usage": {', DONE], "malformed event"),
    ],
)
def test_a_stream_without_a_whole_answer_is_refused_with_the_reason(events, complaint) -> None:
    with pytest.raises(AnswerError, match=complaint):
        read_stream([(1.0, b"".join(encode(event) for event in events))])


@given(
    count=st.integers(1, 200),
    rate=st.floats(0.01, 1e4),
    burstiness=st.sampled_from([0.001, 0.2, 1.0, 7.0, float("inf")]),
    seed=st.integers(0, 2**32),
)
def test_arrivals_ascend_and_offer_exactly_the_rate(count, rate, burstiness, seed) -> None:
    times = arrival_times(count, rate=rate, burstiness=burstiness, seed=seed)
    assert len(times) == count
    assert times == sorted(times)
    assert times == arrival_times(count, rate=rate, burstiness=burstiness, seed=seed)
    assert times[-1] == pytest.approx(count / rate) or (burstiness == 0.001 and set(times) == {0.0})


def test_arrivals_at_an_infinite_rate_are_all_at_once() -> None:
    assert arrival_times(3, rate=float("inf"), burstiness=1.0, seed=0) == [0.0, 0.0, 0.0]


def test_burstiness_is_the_shape_of_the_gaps() -> None:
    def variation(burstiness: float) -> float:
        gaps = np.diff(arrival_times(20_000, rate=10.0, burstiness=burstiness, seed=3))
        return float(gaps.std() / gaps.mean())

    # A gamma distribution of shape k varies by 1 / sqrt(k).
    assert variation(1.0) == pytest.approx(1.0, rel=0.05)
    assert variation(4.0) == pytest.approx(0.5, rel=0.05)
    assert variation(0.25) == pytest.approx(2.0, rel=0.1)
    assert variation(float("inf")) == pytest.approx(0.0, abs=1e-6)


def test_latencies_are_those_of_vllm_by_hand() -> None:
    figures = summary([outcome(1.0, 1.5, 1.6, 1.8, end=2.0, tokens=6), outcome(2.0, 2.1)])
    expected = {
        "mean_ttft_ms": 300.0,
        "median_ttft_ms": 300.0,
        "std_ttft_ms": 200.0,
        "p50_ttft_ms": 300.0,
        "p99_ttft_ms": 496.0,  # 100 and 500, interpolated
        "mean_tpot_ms": 100.0,  # (2.0 - 1.5) / (6 - 1); an answer of one token has none
        "std_tpot_ms": 0.0,
        "mean_itl_ms": 150.0,
        "p50_itl_ms": 150.0,
        "mean_e2el_ms": 550.0,
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected)


def test_throughput_counts_answered_requests_only() -> None:
    figures = summary([outcome(0.0, 1.0, 2.0, tokens=5), Outcome(0.0, 9.0, 1000, error="HTTP 500: no")])
    expected = {
        "duration": 10.0,
        "completed": 1,
        "failed": 1,
        "total_input_tokens": 10,
        "total_output_tokens": 5,
        "request_throughput": 0.1,
        "output_throughput": 0.5,
        "total_token_throughput": 1.5,
    }
    assert {name: figures[name] for name in expected} == pytest.approx(expected)
    assert figures["request_goodput"] is None


@given(st.lists(st.lists(st.floats(0.001, 100.0), min_size=1, max_size=20), min_size=1, max_size=20))
def test_percentiles_are_those_of_all_gaps_together(gaps) -> None:
    outcomes = [outcome(0.0, *np.cumsum(own).tolist()) for own in gaps]
    itls = [itl for one in outcomes for itl in one.itls_s]
    figures = summary(outcomes, percentiles=[0, 37.5, 100])
    if not itls:
        assert figures["p0_itl_ms"] is None
        return
    shown = [figures[f"{name}_itl_ms"] for name in ("p0", "p37.5", "p100")]
    assert shown == pytest.approx([1e3 * min(itls), 1e3 * np.quantile(itls, 0.375), 1e3 * max(itls)])


def test_nothing_answered_gives_no_latencies_and_no_division_by_zero() -> None:
    for outcomes in ([], [Outcome(0.0, 1.0, 5, error="TimeoutError: ")]):
        figures = summary(outcomes, goodput_ms={"ttft": 1.0})
        assert figures["completed"] == figures["max_output_tokens_per_s"] == figures["request_goodput"] == 0
        assert figures["max_concurrent_requests"] == len(outcomes)
        assert all(figures[f"{name}_{metric}_ms"] is None for metric in METRICS for name in ("mean", "p99"))


def test_only_the_metrics_asked_for_are_reported() -> None:
    figures = summary([outcome(0.0, 1.0)], metrics=["ttft"])
    assert "mean_ttft_ms" in figures
    assert not any(name.endswith("_e2el_ms") for name in figures)


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"ttft": 500.0}, 2),  # just met
        ({"ttft": 499.0}, 1),
        ({"tpot": 100.0}, 2),
        ({"tpot": 99.0}, 1),  # one token has no pace to be too slow
        ({"e2el": 1000.0, "ttft": 100.0}, 1),
        ({"e2el": 1.0, "ttft": 500.0}, 0),
    ],
)
def test_goodput_counts_requests_that_meet_every_limit(limits, good) -> None:
    outcomes = [outcome(0.0, 0.5, 0.75, end=1.0, tokens=6), outcome(0.0, 0.0625)]
    outcomes.append(Outcome(0.0, 0.001, 1, error="HTTP 500: fast, but no answer"))
    assert summary(outcomes, goodput_ms=limits)["request_goodput"] == pytest.approx(good / 10.0)


def test_the_best_second_counts_tokens_not_chunks() -> None:
    answered = [outcome(0.5, 0.75, 1.0, 1.75, tokens=30), outcome(1.0, 1.25)]
    assert most_tokens_in_a_second(answered) == pytest.approx(21.0)  # 0.5 to 1.5: two chunks of 10, one of 1
    assert most_tokens_in_a_second([]) == 0.0


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 20)), max_size=30))
def test_most_at_once_is_the_most_at_any_moment(spans) -> None:
    outcomes = [Outcome(float(start), float(start + length), 1, error="x") for start, length in spans]
    by_moment = [sum(start <= moment < start + length for start, length in spans) for moment in range(71)]
    assert most_at_once(outcomes) == max(by_moment)


def test_errors_are_grouped_by_kind_with_the_most_frequent_first() -> None:
    failures = [AnswerError("HTTP 500", "a"), AnswerError("HTTP 429", "b"), AnswerError("HTTP 429", "c: d")]
    outcomes = [Outcome(0.0, 1.0, 1, error=str(failure), error_kind=failure.kind) for failure in failures]
    outcomes.append(Outcome(0.0, 1.0, 1, chunk_times_s=(1.0,)))
    assert list(errors_by_kind(outcomes).items()) == [("HTTP 429", 2), ("HTTP 500", 1)]
