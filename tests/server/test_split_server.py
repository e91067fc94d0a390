"""One engine computes long prompts, the other answers, behind one front; and the same by a router that knows vLLM's form."""

import json
import os
import signal
from typing import Any

import pytest
from live import TINY_FLAGS, LiveServer, running_server

from stepgraph import SamplingParams

FLAGS = [
    *("--served-model-name", "tiny", "--prefill-devices", "0", "--decode-devices", "1"),
    *("--min-remote-prefill-tokens", "48", *TINY_FLAGS),
]
OFFER = {"do_remote_decode": True, "do_remote_prefill": False, "remote_engine_id": None, "remote_block_ids": None}
SOURCE, SINK = "0", "1"
NUM_PROMPT, BLOCK = 100, 16


@pytest.fixture(scope="module")
def server(tiny_model):
    with running_server(tiny_model, FLAGS) as server:
        yield server


def prompt(seed: int, num_tokens: int = NUM_PROMPT) -> list[int]:
    return [1 + (seed * 37 + place * place) % 200 for place in range(num_tokens)]


def ask(server: LiveServer, **fields: Any) -> dict[str, Any]:
    body = {"max_tokens": 8, "temperature": 0, "ignore_eos": True, "return_token_ids": True} | fields
    reply = server.post("/v1/completions", body)
    assert reply.status == 200, reply.body
    return reply.json


def tokens(reply: dict[str, Any]) -> list[int]:
    return list(reply["choices"][0]["token_ids"])


def expected(offline, prompt: list[int], **fields: Any) -> list[int]:
    params = SamplingParams(**({"max_tokens": 8, "temperature": 0, "ignore_eos": True} | fields))
    [answer] = offline.generate([prompt], params)
    return list(answer.outputs[0].token_ids)


def health(server: LiveServer) -> list[str]:
    """Of each engine; nothing if none can answer."""
    return server.get("/health").json.get("engines", [])


def blocks_received(server: LiveServer) -> float:
    return server.metric("kv_transfer_blocks_total", direction="received", engine=SINK)


@pytest.mark.parametrize("fields", [{}, {"temperature": 1.0, "seed": 5}, {"presence_penalty": 1.5}])
def test_answers_are_those_of_one_engine_that_does_all(server, offline, fields) -> None:
    text = prompt(len(str(fields)))
    before = blocks_received(server)
    assert tokens(ask(server, prompt=text, **fields)) == expected(offline, text, **fields)
    server.wait_for(lambda: blocks_received(server) == before + NUM_PROMPT // BLOCK)
    assert server.metric("kv_transfer_recomputed_tokens_total") == 0
    server.wait_for(lambda: server.metric("kv_leases") == server.metric("kv_fetches") == 0)


def test_a_short_prompt_is_answered_by_one_engine(server, offline) -> None:
    before = blocks_received(server)
    text = prompt(7, 40)
    assert tokens(ask(server, prompt=text)) == expected(offline, text)
    assert blocks_received(server) == before


def test_what_a_router_is_given_with_the_first_answer_brings_the_blocks_to_the_second(server, offline) -> None:
    text = prompt(8)
    before = blocks_received(server)
    first = ask(server, prompt=text, max_tokens=1, min_tokens=1, kv_transfer_params=OFFER)
    params = first["kv_transfer_params"]
    assert (params["do_remote_prefill"], params["do_remote_decode"], params["tp_size"]) == (True, False, 1)
    assert len(params["remote_block_ids"]) == NUM_PROMPT // BLOCK
    assert {"remote_engine_id", "remote_request_id", "remote_host", "remote_port"} <= params.keys()
    second = ask(server, prompt=text, kv_transfer_params=params)
    assert tokens(second) == expected(offline, text)
    assert tokens(second)[:1] == tokens(first)
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] == NUM_PROMPT // BLOCK * BLOCK
    assert "kv_transfer_params" not in second
    server.wait_for(lambda: blocks_received(server) == before + NUM_PROMPT // BLOCK)
    assert tokens(ask(server, prompt=text, kv_transfer_params=params)) == tokens(second)  # the lease is over


def test_conversations_and_responses_have_them_too_and_streams_at_their_end(server) -> None:
    turns = [{"role": "user", "content": "How far is it from here to there? " * 4}]
    offer = {"kv_transfer_params": OFFER}
    bodies = {
        "/v1/chat/completions": {"messages": turns, "max_tokens": 1},
        "/v1/responses": {"input": turns[0]["content"], "max_output_tokens": 1},
    }
    for path, body in bodies.items():
        found = server.post(path, body | offer).json["kv_transfer_params"]
        assert found["do_remote_prefill"] is True, path
        answers = [server.post(path, body | more) for more in ({}, {"kv_transfer_params": found})]
        assert [answer.status for answer in answers] == [200, 200]
    for path, body in (*bodies.items(), ("/v1/completions", {"prompt": prompt(9), "max_tokens": 1})):
        stream = server.post(path, body | offer | {"stream": True}).body.decode()
        events = [json.loads(line.removeprefix("data: ")) for line in stream.splitlines() if line.startswith("data: {")]
        told = [event.get("response", event).get("kv_transfer_params") for event in events]
        assert [params["do_remote_prefill"] for params in told if params] == [True], path


def test_without_the_engine_that_computes_prompts_answers_are_the_same_and_it_comes_back(server, offline) -> None:
    text = prompt(10)
    stale = ask(server, prompt=text, max_tokens=1, kv_transfer_params=OFFER)["kv_transfer_params"]
    os.kill(server.pids("engine_process")[0], signal.SIGKILL)
    assert tokens(ask(server, prompt=text, kv_transfer_params=stale)) == expected(offline, text)
    whole = NUM_PROMPT // BLOCK * BLOCK  # counts come with the engine's next word, which may be after the answer
    server.wait_for(lambda: server.metric("kv_transfer_recomputed_tokens_total", engine=SINK) >= whole)
    server.wait_for(lambda: server.metric("kv_transfer_failures_total", reason="link") == 1)
    server.wait_for(lambda: health(server) == ["ok", "ok"])
    before = blocks_received(server)
    text = prompt(11)
    assert tokens(ask(server, prompt=text)) == expected(offline, text)
    server.wait_for(lambda: blocks_received(server) == before + NUM_PROMPT // BLOCK)


def test_without_the_engine_that_answers_the_other_one_does(server, offline) -> None:
    server.wait_for(lambda: health(server) == ["ok", "ok"])
    os.kill(server.pids("engine_process")[0], signal.SIGKILL)  # by now the older one
    server.wait_for(lambda: health(server) != ["ok", "ok"])
    text = prompt(12)
    assert tokens(ask(server, prompt=text)) == expected(offline, text)
