"""`kv_transfer_params`: what routers that know vLLM send and get, on every endpoint."""

import time
from typing import Any

import pytest
from observed import LOAD, READY

from stepgraph.engine.prompts import TokenizedPrompt
from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.server.counts import RequestCounts
from stepgraph.server.engine_client import EngineClient
from stepgraph.server.engine_observer import EngineState, EngineStatus
from stepgraph.server.generation import Origin
from stepgraph.server.messages import Add, Progress, TokenUpdate, decode_from_engine, decode_to_engine, encode
from stepgraph.server.responses import ResponsesRequest, as_chat
from stepgraph.transfer.reference import Offer, Reference

OFFER = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}
"""As routers write it."""
REFERENCE = Reference("engine", "@socket", 0, "lease")
ASK = [{"role": "user", "content": "Hi"}]
BODIES: dict[str, dict[str, Any]] = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1},
    "/v1/chat/completions": {"messages": ASK, "max_tokens": 1},
    "/v1/responses": {"input": "Hi", "max_output_tokens": 1},
}


@pytest.mark.parametrize(
    ("params", "role"), [(OFFER, "prefill"), (REFERENCE.params(4, 1), "decode")], ids=["prefill", "decode"]
)
@pytest.mark.parametrize("path", BODIES)
def test_an_engine_without_others_says_how_it_would_have_them(tiny_server, path, params, role) -> None:
    refused = tiny_server.post(path, BODIES[path] | {"kv_transfer_params": params})
    error = refused.json["error"]
    assert (refused.status, error["param"]) == (400, "kv_transfer_params")
    assert f"--splitwise-role {role}" in error["message"]


@pytest.mark.parametrize("params", [None, {}, {"do_remote_decode": False, "do_remote_prefill": None}])
def test_params_that_ask_for_nothing_change_nothing(tiny_server, params) -> None:
    reply = tiny_server.post("/v1/completions", BODIES["/v1/completions"] | {"kv_transfer_params": params})
    assert reply.status == 200
    assert "kv_transfer_params" not in reply.json
    assert "x-ignored-fields" not in reply.headers


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"kv_transfer_params": OFFER, "n": 2}, "1 prompts and n=2; send a request for each"),
        ({"kv_transfer_params": OFFER, "prompt": ["a", "b"]}, "2 prompts and n=1"),
        ({"kv_transfer_params": {"do_remote_prefill": True}}, "remote_port=None must be a port"),
        ({"kv_transfer_params": {"do_remote_prefill": "yes"}}, "do_remote_prefill='yes' must be true or false"),
    ],
)
def test_params_that_make_no_sense_are_refused_at_the_door(tiny_server, fields, message) -> None:
    refused = tiny_server.post("/v1/completions", BODIES["/v1/completions"] | fields)
    assert (refused.status, refused.json["error"]["param"]) == (400, "kv_transfer_params")
    assert message in refused.json["error"]["message"]


@pytest.mark.parametrize("transfer", [None, Offer("lease"), REFERENCE])
def test_the_engine_is_told_and_its_answer_comes_back(transfer) -> None:
    sent: list[Add] = []
    client = EngineClient(lambda content: sent.append(decode_to_engine(content)), RequestCounts())
    client.status = EngineStatus(EngineState.READY, READY)
    generation = client.submit(
        "a",
        TokenizedPrompt(None, [1, 2]),
        SamplingParams(max_tokens=1),
        None,
        transfer=transfer,
        arrived_at=time.monotonic(),
        origin=Origin("chat", "tiny", "a", None),
    )
    [added] = sent
    assert (added.offer or added.reference) == transfer
    [(request_id, _)] = added.requests
    params = None if transfer is None else REFERENCE.params(4, 1)
    update = TokenUpdate(request_id, (5,), "length", kv_transfer_params=params)
    message = decode_from_engine(encode(Progress([update], [], LOAD)))
    client.take(message)
    assert (generation.kv_transfer_params or None) == params


def test_a_response_is_asked_for_as_a_chat_is() -> None:
    asked = ResponsesRequest(input="Hi", kv_transfer_params=OFFER)
    assert as_chat(asked).kv_transfer_params == OFFER
