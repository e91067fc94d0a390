"""What users of a server see of speculative decoding, and that answers are those without it."""

import json
import re
from typing import Any

import pytest
from live import TINY_FLAGS, LiveServer, running_server

FEW = {"allowed_token_ids": [66, 67, 68], "temperature": 0, "max_tokens": 60, "ignore_eos": True}
"""An answer of few letters repeats itself soon, so that there is something to propose."""
OFF = {"speculative": {"num_speculative_tokens": 0}}
CONTENT: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "hello"},
    "/v1/chat/completions": {"messages": [{"role": "user", "content": "hello"}]},
    "/v1/responses": {"input": "hello", "max_output_tokens": 60},
}


@pytest.fixture(scope="module")
def server(tiny_model) -> LiveServer:
    # not adaptive: what is proposed does not depend on times
    keys = {"method": "suffix", "num_speculative_tokens": 5, "adaptive": False}
    flags = ["--served-model-name", "tiny", "--speculative-config", json.dumps(keys)]
    with running_server(tiny_model, [*flags, *TINY_FLAGS]) as running:
        yield running


def complete(server: LiveServer, prompt: str = "hello", **fields: Any) -> dict[str, Any]:
    reply = server.post("/v1/completions", {"prompt": prompt} | FEW | fields)
    assert reply.status == 200, reply.body
    return reply.json


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether the answers are the same: log-probabilities up to rounding, which depends on what else a step computes."""
    for choices in zip(one["choices"], other["choices"], strict=True):
        values = [choice["logprobs"].pop("token_logprobs") for choice in choices]
        for choice in choices:
            choice["logprobs"].pop("top_logprobs")
        if choices[0] != choices[1] or values[0] != pytest.approx(values[1], abs=1e-4):
            return False
    return True


def details(usage: dict[str, Any]) -> tuple[int, int]:
    """Accepted and rejected tokens."""
    found = usage["completion_tokens_details"]
    return found["accepted_prediction_tokens"], found["rejected_prediction_tokens"]


def streamed(server: LiveServer, path: str, **fields: Any) -> list[dict[str, Any]]:
    reply = server.post(path, FEW | {"stream": True} | fields)
    assert reply.status == 200, reply.body
    events = [line.removeprefix("data: ") for line in reply.body.decode().splitlines() if line.startswith("data: ")]
    return [json.loads(event) for event in events if event != "[DONE]"]


def test_the_start_says_the_method_and_how_many_proposals(server) -> None:
    assert "speculative decoding: suffix, up to 5 proposals, not adaptive\n" in server.output


def test_usage_tells_accepted_and_rejected_proposals_and_the_answer_is_that_without(server) -> None:
    with_it, without = complete(server), complete(server, **OFF)
    assert with_it["choices"] == without["choices"]
    accepted, rejected = details(with_it["usage"])
    assert 0 < accepted < with_it["usage"]["completion_tokens"] == 60
    assert rejected >= 0
    assert details(without["usage"]) == (0, 0)


def test_usage_sums_over_answers_and_prompts(server) -> None:
    prompts = ["hello", "good bye"]
    one_by_one = [details(complete(server, prompt)["usage"]) for prompt in prompts]
    together = complete(server, prompt=prompts)
    # Which texts were remembered by then decides what is proposed, so counts differ; what was accepted is in every answer.
    assert all(accepted > 0 for accepted, _ in one_by_one)
    accepted, rejected = details(together["usage"])
    assert 20 < accepted < together["usage"]["completion_tokens"] == 120
    assert rejected >= 0
    several = server.post("/v1/completions", FEW | {"prompt": "hello", "n": 3, "temperature": 0.9, "seed": 5}).json[
        "usage"
    ]
    assert 30 < details(several)[0] < several["completion_tokens"] == 180


def test_a_stream_tells_its_usage_last_and_grows_by_several_tokens_at_a_time(server) -> None:
    whole = complete(server, **OFF)
    *chunks, last = streamed(server, "/v1/completions", prompt="hello", stream_options={"include_usage": True})
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["choices"][0]["text"]
    assert details(last["usage"])[0] > 0
    assert last["usage"]["completion_tokens"] == 60
    assert len(chunks) < 60


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/responses"])
def test_chats_and_responses_tell_it_too(server, path) -> None:
    body = CONTENT[path] | FEW
    usage = server.post(path, body).json["usage"]
    found = usage["completion_tokens_details" if "chat" in path else "output_tokens_details"]
    assert found["accepted_prediction_tokens"] > 0
    assert found["rejected_prediction_tokens"] >= 0
    off = server.post(path, body | OFF).json["usage"]
    found = off["completion_tokens_details" if "chat" in path else "output_tokens_details"]
    assert (found["accepted_prediction_tokens"], found["rejected_prediction_tokens"]) == (0, 0)


def test_a_streamed_chat_tells_it_last(server) -> None:
    path, options = "/v1/chat/completions", {"include_usage": True}
    *_, last = streamed(server, path, **CONTENT[path], stream_options=options)
    assert last["choices"] == []
    assert details(last["usage"])[0] > 0


def test_a_server_without_it_tells_nothing_of_it_and_takes_the_switch(tiny_server) -> None:
    usage = complete(tiny_server, **OFF)["usage"]
    assert "completion_tokens_details" not in usage
    assert tiny_server.metric("spec_decode_num_drafts_total") == 0
    assert not [line for line in tiny_server.output if "speculative decoding" in line]


@pytest.mark.parametrize("value", [9, -1, "2", 1.5, True, None])
@pytest.mark.parametrize("path", CONTENT)
def test_a_bad_number_of_proposals_is_refused_with_the_limit(server, path, value) -> None:
    reply = server.post(path, CONTENT[path] | {"speculative": {"num_speculative_tokens": value}})
    assert reply.status == 400
    assert re.search(r"speculative=.* between 0 \(none\) and 8", reply.json["error"]["message"])


@pytest.mark.parametrize("value", [3, "none", [0]])
def test_a_switch_of_the_wrong_type_is_refused(server, value) -> None:
    assert server.post("/v1/completions", {"prompt": "x", "speculative": value}).status == 422


@pytest.mark.parametrize("value", [{}, {"num_tokens": 3}, {"num_speculative_tokens": 3, "method": "mtp"}])
def test_a_switch_that_says_something_else_is_refused(server, value) -> None:
    reply = server.post("/v1/completions", {"prompt": "x", "speculative": value})
    assert reply.status == 400
    assert "num_speculative_tokens" in reply.json["error"]["message"]


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_string_inside_an_accepted_run_ends_the_answer_where_it_would_end_without(server, include) -> None:
    text = complete(server, **OFF)["choices"][0]["text"]
    fields = {"include_stop_str_in_output": include, "logprobs": 1, "return_token_ids": True}
    cut = 0
    for start in range(20, 50, 3):
        stop = {"stop": text[start : start + 4], "min_tokens": start}
        with_it, without = (complete(server, **stop, **fields, **switch) for switch in ({}, OFF))
        assert same(with_it, without), stop
        [choice] = with_it["choices"]
        num_tokens = with_it["usage"]["completion_tokens"]
        assert num_tokens == without["usage"]["completion_tokens"] == len(choice["token_ids"])
        assert choice["finish_reason"] == "stop"
        accepted, rejected = details(with_it["usage"])
        assert accepted < num_tokens
        cut += rejected > 0
    assert cut  # some stop strings lay within what was accepted


def test_metrics_count_the_tokens_of_an_answer_and_not_those_behind_its_stop_string(server) -> None:
    text = complete(server)["choices"][0]["text"]
    for start in range(20, 50, 6):
        before = server.metric("request_generation_tokens_sum")
        usage = complete(server, stop=text[start : start + 4], min_tokens=start)["usage"]
        server.wait_idle()
        assert server.metric("request_generation_tokens_sum") - before == usage["completion_tokens"]


def test_seeded_answers_with_everything_at_once_are_those_without(server) -> None:
    fields = {
        "temperature": 0.9,
        "top_p": 0.95,
        "seed": 11,
        "frequency_penalty": 0.1,
        "repetition_penalty": 1.1,
        "logit_bias": {"67": 1.5},
        "min_tokens": 20,
        "logprobs": 2,
        "n": 2,
        "allowed_token_ids": list(range(60, 72)),
    }
    for _ in range(2):  # the second time, the answers are remembered
        assert same(complete(server, **fields), complete(server, **fields, **OFF))


def test_guided_json_with_it_is_valid_and_that_without(server) -> None:
    schema = {
        "type": "object",
        "properties": {
            "names": {"type": "array", "items": {"enum": ["abcabc", "abcabd"]}, "minItems": 4, "maxItems": 4},
            "flag": {"type": "boolean"},
        },
        "required": ["names", "flag"],
    }
    spaces = server.post("/tokenize", {"prompt": " \t\n\r"}).json["tokens"]  # of which the model knows no end
    body = {"prompt": "hello", "guided_json": schema, "max_tokens": 120, "temperature": 0}
    body["logit_bias"] = {str(token): -100 for token in spaces}
    first, again, without = (server.post("/v1/completions", body | switch).json for switch in ({}, {}, OFF))
    for reply in (first, again):
        assert reply["choices"] == without["choices"]
    assert json.loads(first["choices"][0]["text"])["names"]
    assert first["choices"][0]["finish_reason"] == "stop"
    assert details(again["usage"])[0] > 0


def test_metrics_count_drafts_tokens_positions_and_saved_steps(server) -> None:
    names = ["num_drafts", "num_draft_tokens", "num_accepted_tokens", "saved_steps"]

    def read() -> list[float]:
        return [server.metric(f"spec_decode_{name}_total") for name in names]

    server.wait_idle()
    before = read()
    accepted, rejected = details(complete(server)["usage"])
    server.wait_idle()
    drafts, drafted, stood, saved = (now - then for now, then in zip(read(), before, strict=True))
    assert (drafted, stood) == (accepted + rejected, accepted)
    assert 0 < drafts <= drafted
    assert stood - drafts <= saved <= stood
    assert saved > 0
    per_position = [
        server.metric("spec_decode_num_accepted_tokens_per_pos_total", position=str(position)) for position in range(5)
    ]
    assert sum(per_position) == read()[2]
    assert per_position == sorted(per_position, reverse=True)
    assert server.metric("spec_decode_mean_accepted_length") == pytest.approx(1 + read()[2] / read()[0])


def test_graphs_are_told_apart_by_their_proposals(server) -> None:
    complete(server)
    graphs = server.get("/graphs").json["graphs"]
    assert {graph["num_drafts"] for graph in graphs} & {5}
    keys = [(g["num_tokens"], g["num_rows"], g["num_drafts"], g["variant"]) for g in graphs]
    assert len(keys) == len(set(keys))
    assert server.metric("graph_replays_total", drafts="5") > 0
