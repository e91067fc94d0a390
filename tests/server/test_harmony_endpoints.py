"""Harmony at every endpoint: scripted answers through the whole server side, and forced ones of a live server."""

import asyncio
import json
import shlex

import anthropic
import openai
import pytest
from harmony_answers import OPEN, TOKENIZER, TOKENS, call_of
from harmony_model import save_harmony_model
from live import LiveServer, running_server
from responses_wire import ResponsesWire, shown
from scripted_calls import Wire, streamed

from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.server.anthropic import MessagesReply
from stepgraph.server.chat import ChatReply
from stepgraph.server.protocol import ChatRequest
from stepgraph.server.responses import ResponsesReply, ResponsesRequest, as_begun

ASK = [{"role": "user", "content": "Hi"}]
ARGUMENTS = '{"city": "Zürich"}'
THOUGHT, WORDS = (
    "<|channel|>analysis<|message|>Let me see.<|end|>",
    "<|channel|>commentary<|message|>One moment.<|end|>",
)
CALL = f"<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>{ARGUMENTS}<|call|>"
NEXT = "<|start|>assistant"
CALLS = THOUGHT + NEXT + WORDS + NEXT + CALL
SAYS = WORDS + NEXT + THOUGHT + NEXT + "<|channel|>final<|message|>It is 4.<|return|>"


def chat_reply(text: str, **fields) -> ChatReply:
    request = ChatRequest(messages=ASK, **fields)
    return ChatReply(request, call_of(text, logprobs=0 if request.logprobs else None), "tiny", "chatcmpl-1", 1)


def whole_chat(text: str, **fields) -> dict:
    return json.loads(asyncio.run(chat_reply(text, **fields).reply()))


def streamed_chat(text: str, **fields) -> list[dict]:
    content = asyncio.run(streamed(chat_reply(text, **fields))).decode()
    return [json.loads(part.removeprefix("data: ")) for part in content.split("\n\n") if part and "[DONE]" not in part]


def test_a_chat_has_reasoning_words_and_a_call_whole_and_streamed() -> None:
    reply = whole_chat(CALLS)
    [choice] = reply["choices"]
    message = choice["message"]
    assert (message["reasoning_content"], message["content"]) == ("Let me see.", "One moment.")
    [call] = message["tool_calls"]
    assert (call["function"], choice["finish_reason"]) == (
        {"name": "get_weather", "arguments": ARGUMENTS},
        "tool_calls",
    )
    assert choice["stop_reason"] is None
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] == len("Let me see.")
    deltas = [chunk["choices"][0]["delta"] for chunk in streamed_chat(CALLS)]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert [call["function"]["name"] for call in calls if "name" in call["function"]] == ["get_weather"]
    assert "".join(call["function"]["arguments"] for call in calls) == ARGUMENTS
    assert len(calls) > 5
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "Let me see."
    assert "".join(delta.get("content") or "" for delta in deltas) == "One moment."


def test_messages_of_a_chat_are_paragraphs() -> None:
    [choice] = whole_chat(SAYS)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("One moment.\n\nIt is 4.", "stop")
    deltas = [chunk["choices"][0]["delta"] for chunk in streamed_chat(SAYS)]
    assert "".join(delta.get("content") or "" for delta in deltas) == "One moment.\n\nIt is 4."


def test_every_token_has_its_log_probability_and_is_told_once() -> None:
    [choice] = whole_chat(SAYS, return_token_ids=True)["choices"]
    tokens = TOKENIZER.encode(SAYS, add_special_tokens=False)
    assert choice["token_ids"] == tokens
    chunks = [chunk["choices"][0] for chunk in streamed_chat(SAYS, return_token_ids=True)]
    assert [token for chunk in chunks for token in chunk.get("token_ids", ())] == tokens


def responses_reply(text: str) -> ResponsesReply:
    request = ResponsesRequest(input="Hi")
    begun = as_begun(request, SamplingParams(), model="tiny", id="resp_1")
    return ResponsesReply(call_of(text), begun, num_top_logprobs=0)


def test_each_message_is_an_item_of_a_response() -> None:
    wire = ResponsesWire(openai.OpenAI, "http://test/v1")
    says = [("message", "One moment."), ("reasoning", "Let me see."), ("message", "It is 4.")]
    for reply in (wire.whole(responses_reply(SAYS)), wire.accumulated(responses_reply(SAYS))):
        assert shown(reply) == [(*item, "completed") for item in says]
    twice = wire.whole(responses_reply(WORDS + NEXT + WORDS + NEXT + CALL))
    assert [item[:2] for item in shown(twice)] == [("message", "One moment.")] * 2 + [("function_call", "get_weather")]


def test_each_message_is_a_block_of_anthropics() -> None:
    reply = MessagesReply(call_of(CALLS), id="msg_1", model="tiny", max_tokens=99, shows_thinking=True, request_id="r")
    wire = Wire(anthropic.Anthropic, "http://test")
    wire._content = (asyncio.run(reply.reply()), "application/json")
    message = wire._client.messages.create(model="tiny", max_tokens=99, messages=ASK)
    thinking, text, call = message.content
    assert (thinking.thinking, text.text, call.name) == ("Let me see.", "One moment.", "get_weather")
    assert (call.input, message.stop_reason) == (json.loads(ARGUMENTS), "tool_use")


# A live server, whose random model is made to write


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> LiveServer:
    model = save_harmony_model(tmp_path_factory.mktemp("harmony"))
    flags = shlex.split(
        "--device cpu --dtype float32 --max-num-seqs 4 --capture-sizes 8 64 --capture-rows 8 --num-kv-blocks 257"
    )
    with running_server(model, ["--served-model-name", "tiny", *flags]) as found:
        yield found


FORM = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 3}}, "required": ["n"]}
KEEN = {str(TOKENIZER.encode(letter)[0]): 100 for letter in "f"} | {str(id): 100 for id in TOKENS}
"""Makes the model write `final` where it may, and end what it may end."""


def post(server: LiveServer, path: str, **fields) -> dict:
    reply = server.post(path, {"model": "tiny", "temperature": 0, **fields})
    assert reply.status == 200, reply.body
    return reply.json


def test_a_live_server_forces_a_form_into_the_final_message(server) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": FORM}}
    reply = post(server, "/v1/chat/completions", messages=ASK, response_format=form, logit_bias=KEEN, max_tokens=99)
    [choice] = reply["choices"]
    assert json.loads(choice["message"]["content"])["n"] in (1, 2, 3)
    assert (choice["finish_reason"], "reasoning_content" in choice["message"]) == ("stop", False)


def test_a_live_server_forces_a_call_at_every_endpoint(server) -> None:
    names = {"name": "f", "parameters": FORM}
    keen = {str(TOKENIZER.encode(" ")[0]): 100}  # to name the function at once
    chat = {"tools": [{"type": "function", "function": names}], "tool_choice": "required", "logit_bias": keen}
    [choice] = post(server, "/v1/chat/completions", messages=ASK, max_tokens=99, **chat)["choices"]
    [call] = choice["message"]["tool_calls"]
    assert (call["function"]["name"], choice["message"]["content"]) == ("f", None)
    assert json.loads(call["function"]["arguments"])["n"] in (1, 2, 3)
    tools = [{"type": "function", **names}]
    response = post(server, "/v1/responses", input="Hi", max_output_tokens=99, **chat | {"tools": tools})
    [item] = response["output"]
    assert (item["type"], item["name"], json.loads(item["arguments"])["n"] in (1, 2, 3)) == ("function_call", "f", True)
    tools = [{"name": "f", "input_schema": FORM}]
    forced = {"tools": tools, "tool_choice": {"type": "any"}, "logit_bias": keen}
    message = post(server, "/v1/messages", messages=ASK, max_tokens=99, **forced)
    assert (message["stop_reason"], [block["type"] for block in message["content"]]) == ("tool_use", ["tool_use"])


def test_a_live_server_leaves_no_special_token_in_an_answer(server) -> None:
    for fields in ({}, {"skip_special_tokens": False}):
        bias = {str(TOKENS.message): 100, str(TOKENS.channel): 100}
        [choice] = post(server, "/v1/chat/completions", messages=ASK, max_tokens=8, logit_bias=bias, **fields)[
            "choices"
        ]
        assert "<|" not in (choice["message"]["content"] or "")


def test_a_live_server_refuses_an_effort_that_the_model_does_not_know(server) -> None:
    reply = server.post("/v1/chat/completions", {"messages": ASK, "max_tokens": 1, "reasoning_effort": "lots"})
    assert (reply.status, reply.json["error"]["param"]) == (400, "reasoning_effort")
    response = server.post("/v1/responses", {"input": "Hi", "max_output_tokens": 1, "reasoning": {"effort": "lots"}})
    assert (response.status, response.json["error"]["param"]) == (400, "reasoning.effort")
    fields = {"messages": ASK, "max_tokens": 1, "output_config": {"effort": "lots"}}
    assert server.post("/v1/messages", fields).json["error"]["details"]["param"] == "output_config.effort"
    prompts = []
    for effort in ("low", "minimal"):
        fields = {"messages": ASK, "max_tokens": 1, "reasoning_effort": effort}
        prompts.append(post(server, "/v1/chat/completions", **fields, return_token_ids=True)["prompt_token_ids"])
    assert "Reasoning: low<|end|>" in TOKENIZER.decode(prompts[0])
    assert prompts[0] == prompts[1]
    assert TOKENIZER.decode(prompts[0]).endswith(OPEN)
