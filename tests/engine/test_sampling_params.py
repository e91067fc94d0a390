"""SamplingParams: vLLM's names, defaults and ranges; nothing is ignored."""

import pytest

from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.errors import RequestError


def test_defaults_are_vllms() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_p, params.top_k, params.max_tokens) == (1.0, 1.0, 0, 16)
    assert (params.seed, params.stop_token_ids, params.ignore_eos) == (None, (), False)
    assert (params.detokenize, params.skip_special_tokens) == (True, True)


def test_minus_one_keeps_all_tokens_like_zero() -> None:
    assert SamplingParams(top_k=-1) == SamplingParams(top_k=0)


def test_stop_token_ids_are_taken_from_a_list_or_none() -> None:
    assert SamplingParams(stop_token_ids=[5, 6]).stop_token_ids == (5, 6)
    assert SamplingParams(stop_token_ids=None).stop_token_ids == ()


@pytest.mark.parametrize(
    ("field", "values", "expected"),
    [
        ("temperature", (-0.1, 100.5, float("nan"), "1", None), r"between 0 \(greedy\) and 100"),
        ("top_p", (0, -0.5, 1.01, float("nan"), "0.9", None), "above 0 and at most 1"),
        ("top_k", (-2, 2**31, 1.5, "5", None), r"0 or -1 \(all tokens\), or a positive count"),
        ("max_tokens", (0, -1, 2.5, "16"), "at least 1, or None"),
        ("seed", (-1, 2**64, 1.5, "7"), r"between 0 and 2\*\*64 - 1, or None"),
        ("stop_token_ids", ((-1,), (2**31,), (1.5,), ("a",), 5), "token ids"),
    ],
)
def test_a_value_outside_its_range_or_type_is_refused_with_the_range(field, values, expected) -> None:
    for value in values:
        with pytest.raises(RequestError, match=f"{field}=.*must be.*{expected}"):
            SamplingParams(**{field: value})


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", (0, 0.0, 1, 100)),
        ("top_p", (1, 1e-6, 0.5)),
        ("top_k", (1, 2**31 - 1)),
        ("max_tokens", (1, None, 10**6)),
        ("seed", (0, 2**64 - 1, None)),
    ],
)
def test_the_ends_of_a_range_belong_to_it(field, values) -> None:
    for value in values:
        assert getattr(SamplingParams(**{field: value}), field) == value


def test_more_stop_tokens_than_a_slot_holds_are_refused_with_the_number() -> None:
    assert len(SamplingParams(stop_token_ids=range(16)).stop_token_ids) == 16
    with pytest.raises(RequestError, match="stop_token_ids has 17 entries; at most 16 fit"):
        SamplingParams(stop_token_ids=range(17))


@pytest.mark.parametrize(
    ("field", "off", "on"),
    [
        ("n", 1, 2),
        ("min_p", 0.0, 0.1),
        ("presence_penalty", 0.0, 0.5),
        ("frequency_penalty", 0.0, -0.5),
        ("repetition_penalty", 1.0, 1.1),
        ("min_tokens", 0, 4),
        ("stop", [], ["\n"]),
        ("logit_bias", {}, {5: 1.0}),
        ("bad_words", [], ["no"]),
        ("allowed_token_ids", None, [1, 2]),
        ("logprobs", None, 0),
        ("prompt_logprobs", None, 1),
    ],
)
def test_what_is_not_supported_yet_is_accepted_when_it_asks_for_nothing_and_refused_otherwise(field, off, on) -> None:
    SamplingParams(**{field: off})
    with pytest.raises(RequestError, match=f"{field}=.* is not supported yet; leave it at"):
        SamplingParams(**{field: on})
