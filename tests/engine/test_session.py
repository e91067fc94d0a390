"""Session: from a request's tokens to what its user sees."""

import itertools
import math
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import create_byte_tokenizer, create_piece_tokenizer

from stepgraph.engine.outputs import CompletionOutput, Logprob, RequestOutput
from stepgraph.engine.prompts import TokenizedPrompt
from stepgraph.engine.request import FinishReason, Request, TokenLogprobs
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.session import AnswerDelta, Session
from stepgraph.errors import Fault, RequestError
from stepgraph.step.slot_sampling import SlotSampling

BYTES = create_byte_tokenizer()
PROMPT = [1, 2, 3]


def create_request(id: str = "r", **params) -> Request:
    return Request(id, PROMPT, SamplingParams(max_tokens=None, **params), 1000, SlotSampling(seed=0))


@dataclass
class Feed:
    """A session, and the engine's side of its requests."""

    requests: list[Request]
    tokenizer: object = BYTES
    aborted: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.session = Session(self.requests, "prompt", self.tokenizer, abort=self.aborted.append)

    def give(self, *token_ids: int, end: FinishReason | None = None, index: int = 0) -> RequestOutput | None:
        request = self.requests[index]
        request.output_token_ids += token_ids
        request.finish_reason = end
        return self.session.output() if self.session.update(request.id, token_ids, end) else None

    def completion(self, index: int = 0) -> CompletionOutput:
        return self.session.output().outputs[index]


def feed(**params) -> Feed:
    return Feed([create_request(**params)])


def give_text(target: Feed, text: str, **options) -> RequestOutput | None:
    return target.give(*BYTES.encode(text), **options)


@st.composite
def cut_texts(draw) -> tuple[list[bytes], str]:
    """A text of a few characters of one to four bytes, cut into pieces anywhere, also within characters."""
    text = draw(st.text("ab é語👍", max_size=16))
    data = text.encode()
    cuts = sorted(draw(st.sets(st.integers(1, max(1, len(data) - 1)), max_size=len(data))) | {0, len(data)})
    return [data[a:b] for a, b in itertools.pairwise(cuts)], text


STOPS = st.lists(st.text("ab é語👍", min_size=1, max_size=3), max_size=3)


@given(cut_texts(), STOPS, st.booleans())
def test_any_way_of_cutting_a_text_into_tokens_gives_the_same_text_and_the_same_cut(cut, stop, include) -> None:
    pieces, text = cut
    ends = [(text.index(s) + len(s), -len(s), s) for s in stop if s in text]
    end, _, string = min(ends, default=(len(text), 0, None))
    expected = text[:end] if include or string is None else text[: end - len(string)]

    vocabulary = list(dict.fromkeys(pieces))
    tokens = [vocabulary.index(piece) for piece in pieces]
    target = Feed([create_request(stop=stop, include_stop_str_in_output=include)], create_piece_tokenizer(vocabulary))
    shown = [""]
    for token in tokens:
        output = target.give(token)
        if output is None:
            break
        shown.append(output.outputs[0].text)
    if string is None:
        output = target.give(end=FinishReason.LENGTH)
        assert output is not None
        shown.append(output.outputs[0].text)

    assert shown[-1] == expected
    for shorter, longer in itertools.pairwise(shown):
        assert longer.startswith(shorter)
    completion = target.completion()
    assert (completion.finish_reason, completion.stop_reason) == (
        ("length", None) if string is None else ("stop", string)
    )
    assert target.aborted == ([] if string is None else ["r"])
    # The last token is the one that holds the last byte of the match.
    lengths = list(itertools.accumulate(map(len, pieces)))
    count = len(tokens) if string is None else 1 + sum(length < len(text[:end].encode()) for length in lengths)
    assert completion.token_ids == tuple(tokens[:count])


@given(cut_texts(), STOPS)
def test_all_tokens_at_once_give_what_they_give_one_by_one(cut, stop) -> None:
    pieces, _ = cut
    vocabulary = list(dict.fromkeys(pieces))
    tokens = [vocabulary.index(piece) for piece in pieces]
    tokenizer = create_piece_tokenizer(vocabulary)
    one_by_one, at_once, polled = (Feed([create_request(stop=stop)], tokenizer) for _ in range(3))
    for token in tokens:
        one_by_one.give(token)
    one_by_one.give(end=FinishReason.LENGTH)
    at_once.give(*tokens, end=FinishReason.LENGTH)
    polled.requests[0].output_token_ids += tokens
    polled.requests[0].finish_reason = FinishReason.LENGTH
    assert one_by_one.completion() == at_once.completion()
    assert polled.session.poll() == at_once.session.output()
    assert polled.session.poll() is None


@given(st.data())
def test_updates_of_several_tokens_give_the_answer_of_single_ones(data) -> None:
    pieces, _ = data.draw(cut_texts().filter(lambda cut: cut[0]))
    vocabulary = list(dict.fromkeys(pieces))
    tokens = [vocabulary.index(piece) for piece in pieces]
    end = data.draw(st.sampled_from([FinishReason.STOP, FinishReason.LENGTH]))
    accepted = sorted(data.draw(st.sets(st.sampled_from(range(len(tokens))))))
    params = {
        "stop": data.draw(STOPS),
        "min_tokens": data.draw(st.integers(0, len(tokens))),
        "include_stop_str_in_output": data.draw(st.booleans()),
        "logprobs": data.draw(st.sampled_from([None, 0])),
    }
    cuts = sorted(data.draw(st.sets(st.integers(1, len(tokens) - 1))) if len(tokens) > 1 else ())
    runs = [tokens[a:b] for a, b in itertools.pairwise([0, *cuts, len(tokens)])]

    def answer(updates: list[list[int]], *, ahead: bool) -> tuple[CompletionOutput, list[AnswerDelta]]:
        """The answer and what its deltas add up to. `ahead`: the request holds all tokens before the first update is taken in."""
        request = create_request(**params)
        request.num_draft_tokens = len(tokens)
        target = Feed([request], create_piece_tokenizer(vocabulary))
        deltas: list[AnswerDelta] = []
        for update, count in zip(updates, itertools.accumulate(map(len, updates)), strict=True):
            known = len(tokens) if ahead else count
            request.output_token_ids = tokens[:known]
            request.accepted = [position for position in accepted if position < known]
            request.output_logprobs = [TokenLogprobs(token, -1.0, 1, ()) for token in tokens[:known]]
            is_last = count == len(tokens)
            request.stop_token = tokens[-1] if is_last and end is FinishReason.STOP else None
            target.session.update("r", update, end if is_last else None)
            deltas += target.session.deltas()
        return target.completion(), deltas

    expected, single = answer([[token] for token in tokens], ahead=False)
    assert expected.num_accepted_tokens == sum(position < len(expected.token_ids) for position in accepted)
    found, several = answer(runs, ahead=data.draw(st.booleans()))
    assert found == expected
    for deltas in (single, several):
        assert "".join(delta.text for delta in deltas) == expected.text
        assert sum((delta.token_ids for delta in deltas), ()) == expected.token_ids
        assert [one for delta in deltas for one in delta.logprobs or []] == (expected.logprobs or [])
        assert [delta.finish_reason for delta in deltas if delta.finish_reason] == [expected.finish_reason]


def test_what_may_become_a_stop_string_is_shown_once_it_cannot() -> None:
    target = feed(stop=["END", "Dog"])
    shown = [target.give(token).outputs[0].text for token in BYTES.encode("a EN EDo Doge")[:11]]
    assert shown == ["a", "a ", "a ", "a ", "a EN ", "a EN ", "a EN E", "a EN E", "a EN EDo ", "a EN EDo ", "a EN EDo "]
    assert give_text(target, "", end=FinishReason.LENGTH).outputs[0].text == "a EN EDo Do"


def test_a_stop_string_that_is_kept_in_the_text_hides_nothing_before_it() -> None:
    target = feed(stop="END", include_stop_str_in_output=True)
    assert give_text(target, "an EN").outputs[0].text == "an EN"
    assert give_text(target, "D of").outputs[0].text == "an END"


def test_a_stop_string_ends_the_request_and_later_tokens_are_dropped() -> None:
    target = feed(stop="END")
    output = give_text(target, "the END of it")
    assert output.finished
    assert output.outputs[0].token_ids == tuple(BYTES.encode("the END"))
    assert target.aborted == ["r"]
    assert give_text(target, "more") is None
    assert target.give(end=FinishReason.ABORT) is None
    assert target.session.poll() is None
    assert target.completion() == output.outputs[0]
    target.session.abort()
    assert target.aborted == ["r"]


def test_a_stop_string_in_the_last_tokens_needs_no_abort() -> None:
    target = feed(stop="END")
    completion = give_text(target, "the END of it", end=FinishReason.LENGTH).outputs[0]
    assert (completion.text, completion.finish_reason, completion.stop_reason) == ("the ", "stop", "END")
    assert target.aborted == []


def test_stop_strings_are_not_searched_before_min_tokens() -> None:
    target = feed(stop="b", min_tokens=4)
    assert give_text(target, "abb").outputs[0].text == "abb"
    output = give_text(target, "bc")
    assert (output.outputs[0].text, output.outputs[0].token_ids) == ("abb", tuple(BYTES.encode("abbb")))
    across = feed(stop="abc", min_tokens=4)
    assert give_text(across, "xab").outputs[0].text == "x"
    assert give_text(across, "c").outputs[0].text == "x"
    assert across.completion().stop_reason == "abc"


@pytest.mark.parametrize(("token", "reason"), [(5, 5), (0, None)])
def test_the_stop_reason_is_the_stop_token_the_user_named(token, reason) -> None:
    target = feed(stop_token_ids=[5], stop="never")
    target.requests[0].stop_token = token
    completion = target.give(7, token, end=FinishReason.STOP).outputs[0]
    assert (completion.finish_reason, completion.stop_reason, completion.token_ids) == ("stop", reason, (7, token))


@pytest.mark.parametrize("stop", [None, "never"])
@pytest.mark.parametrize(("include", "text"), [(False, "ab"), (True, "ab.")])
def test_the_token_that_ends_an_answer_is_in_its_text_only_if_asked_for(stop, include, text) -> None:
    [dot] = BYTES.encode(".")
    target = feed(stop_token_ids=[dot], stop=stop, include_stop_str_in_output=include, skip_special_tokens=False)
    give_text(target, "a")
    target.requests[0].stop_token = dot
    completion = give_text(target, "b.", end=FinishReason.STOP).outputs[0]
    assert (completion.text, completion.token_ids) == (text, tuple(BYTES.encode("ab.")))


def test_deltas_add_up_to_the_answer() -> None:
    target = feed(stop="cd", logprobs=0)
    target.requests[0].output_logprobs = [TokenLogprobs(token, -1.0, 1, ()) for token in BYTES.encode("abcxcd")]
    deltas = []
    for piece in ("ab", "c", "", "x", "c", "d"):
        give_text(target, piece)
        deltas += target.session.deltas()
    whole = target.completion()
    assert [delta.text for delta in deltas] == ["ab", "", "cx", "", ""]  # "c" may begin the stop string
    assert tuple(token for delta in deltas for token in delta.token_ids) == whole.token_ids
    assert [entry for delta in deltas for entry in delta.logprobs] == whole.logprobs
    assert [delta.finish_reason for delta in deltas] == [None, None, None, None, "stop"]
    assert target.session.deltas() == []


def test_a_part_of_a_character_has_its_bytes_beside_its_log_probability() -> None:
    tokens = BYTES.encode("aé")
    target = feed(logprobs=0)
    target.requests[0].output_logprobs = [TokenLogprobs(token, -1.0, 1, ()) for token in tokens]
    target.give(*tokens)
    described = [entry[token] for token, entry in zip(tokens, target.completion().logprobs, strict=True)]
    assert [(p.decoded_token, p.decoded_bytes) for p in described] == [
        ("a", None),
        ("\ufffd", b"\xc3"),
        ("\ufffd", b"\xa9"),
    ]


def test_special_tokens_are_in_the_text_only_if_asked_for() -> None:
    for skip, text in ((True, "ab"), (False, "ab<end>")):
        target = feed(skip_special_tokens=skip)
        assert target.give(*BYTES.encode("ab"), 0, end=FinishReason.STOP).outputs[0].text == text


def test_an_error_is_told_and_harms_no_other_answer() -> None:
    target = Feed([create_request("r#0"), create_request("r#1")])
    target.requests[0].error = Fault("all logits are NaN", is_users=False)
    output = target.give(7, end=FinishReason.ERROR)
    assert (output.outputs[0].finish_reason, output.outputs[0].error) == ("error", "all logits are NaN")
    assert not output.finished
    output = target.give(8, end=FinishReason.LENGTH, index=1)
    assert output.finished
    assert (output.outputs[1].finish_reason, output.outputs[1].error) == ("length", None)


def test_log_probabilities_are_told_for_each_token_of_the_answer_and_no_more() -> None:
    h, i, dot = BYTES.encode("hi.")
    target = feed(logprobs=2, stop="i")
    target.requests[0].output_logprobs = [
        TokenLogprobs(h, -0.5, 1, ((h, -0.5), (i, -1.0))),
        TokenLogprobs(i, -3.0, 7, ((dot, -0.25), (h, -2.0))),
        TokenLogprobs(dot, -9.0, 1, ((dot, -9.0), (h, -10.0))),
    ]
    first = target.give(h).outputs[0]
    assert first.logprobs == [{h: Logprob(-0.5, 1, "h"), i: Logprob(-1.0, 2, "i")}]
    completion = target.give(i, dot).outputs[0]
    assert completion.logprobs[1:] == [
        {i: Logprob(-3.0, 7, "i"), dot: Logprob(-0.25, 1, "."), h: Logprob(-2.0, 2, "h")}
    ]
    assert list(completion.logprobs[1]) == [i, dot, h]
    assert len(completion.token_ids) == 2
    assert math.isclose(completion.cumulative_logprob, -3.5)
    assert len(first.logprobs) == 1


def test_log_probabilities_of_the_prompt_are_told_once_it_is_computed() -> None:
    target = feed(prompt_logprobs=1)
    request = target.requests[0]
    request.prompt_logprobs = [None, TokenLogprobs(2, -1.0, 3, ((9, -0.5),)), None]
    assert target.session.output().prompt_logprobs is None
    request.prompt_logprobs[2] = TokenLogprobs(3, -2.0, 1, ((3, -2.0),))
    found = target.give(7).prompt_logprobs
    assert found[0] is None
    assert [{token: (entry.logprob, entry.rank) for token, entry in position.items()} for position in found[1:]] == [
        {2: (-1.0, 3), 9: (-0.5, 1)},
        {3: (-2.0, 1)},
    ]
    assert {entry.decoded_token for entry in found[1].values()} == {BYTES.decode([2]), BYTES.decode([9])}
    assert feed().give(7).prompt_logprobs is None


@pytest.mark.parametrize(("tokenizer", "params"), [(BYTES, {"detokenize": False}), (None, {})])
def test_where_nobody_wants_text_tokens_have_none_either(tokenizer, params) -> None:
    target = Feed([create_request(logprobs=0, **params)], tokenizer)
    target.requests[0].output_logprobs = [TokenLogprobs(7, -1.0, 1, ())]
    completion = target.give(7).outputs[0]
    assert (completion.text, completion.logprobs) == ("", [{7: Logprob(-1.0, 1, None)}])


def test_what_was_cached_is_told() -> None:
    target = feed()
    target.requests[0].num_cached_tokens = 2
    assert target.give(7).num_cached_tokens == 2


class Recorder:
    """Takes an engine's place where requests start."""

    def __init__(self, *, room: int = 100):
        self.tokenizer = BYTES
        self.end_token_ids = (0,)
        self.requests: dict[str, Request] = {}
        self.options: list[dict] = []
        self.aborted: list[str] = []
        self._room = room

    def add_request(self, id, prompt_token_ids, params, **options) -> Request:
        if len(self.requests) == self._room:
            raise RequestError("no room")
        self.requests[id] = Request(id, prompt_token_ids, params, 1000, SlotSampling(seed=0))
        self.options.append(options)
        return self.requests[id]

    def abort(self, id: str) -> None:
        self.aborted.append(id)


def test_one_prompt_starts_as_many_requests_as_answers_are_wanted() -> None:
    engine = Recorder()
    params = SamplingParams(n=3, seed=2**64 - 2, prompt_logprobs=1, logprobs=1)
    session = Session.start(engine, "x", TokenizedPrompt("hi", PROMPT, "salt"), params, priority=4)
    assert list(engine.requests) == ["x#0", "x#1", "x#2"]
    assert [request.params.seed for request in engine.requests.values()] == [2**64 - 2, 2**64 - 1, 0]
    assert [request.params.n for request in engine.requests.values()] == [1, 1, 1]
    assert [request.params.prompt_logprobs for request in engine.requests.values()] == [1, None, None]
    assert [request.params.logprobs for request in engine.requests.values()] == [1, 1, 1]
    assert engine.options == [{"priority": 4, "cache_salt": "salt", "adapter": None, "bad_words": None}] * 3
    output = session.output()
    assert (output.request_id, output.prompt, output.prompt_token_ids) == ("x", "hi", tuple(PROMPT))
    assert [completion.index for completion in output.outputs] == [0, 1, 2]


def test_one_answer_is_one_request_with_the_users_own_id_and_parameters() -> None:
    engine = Recorder()
    params = SamplingParams(seed=5)
    session = Session.start(engine, "x", TokenizedPrompt(None, PROMPT), params)
    assert engine.requests["x"].params is params
    assert session.output().request_id == "x"


def test_answers_without_a_seed_draw_from_seeds_of_their_own() -> None:
    engine = Recorder()
    Session.start(engine, "x", TokenizedPrompt(None, PROMPT), SamplingParams(n=2))
    assert [request.params.seed for request in engine.requests.values()] == [None, None]


def test_either_all_answers_start_or_none() -> None:
    engine = Recorder(room=2)
    with pytest.raises(RequestError, match="no room"):
        Session.start(engine, "x", TokenizedPrompt(None, PROMPT), SamplingParams(n=3))
    assert engine.aborted == ["x#0", "x#1"]


def test_parameters_of_another_kind_are_refused() -> None:
    with pytest.raises(RequestError, match=r"sampling_params=\{'temperature': 0\} must be SamplingParams"):
        Session.start(Recorder(), "x", TokenizedPrompt(None, PROMPT), {"temperature": 0})


def test_a_priority_that_is_no_number_is_refused() -> None:
    with pytest.raises(RequestError, match="priority='high' must be a whole number; lower runs first"):
        Session.start(Recorder(), "x", TokenizedPrompt(None, PROMPT), SamplingParams(), priority="high")


def test_several_answers_grow_and_end_each_by_itself() -> None:
    target = Feed([create_request(f"r#{i}", stop="END") for i in range(3)])
    give_text(target, "one END", index=0)
    output = give_text(target, "two", index=1)
    assert [completion.text for completion in output.outputs] == ["one ", "two", ""]
    assert [completion.finish_reason for completion in output.outputs] == ["stop", None, None]
    assert not output.finished
    target.session.abort()
    assert target.aborted == ["r#0", "r#1", "r#2"]
    give_text(target, "", end=FinishReason.ABORT, index=1)
    output = give_text(target, "x", end=FinishReason.LENGTH, index=2)
    assert [completion.finish_reason for completion in output.outputs] == ["stop", "abort", "length"]
    assert output.finished
    assert target.session.finished
