"""What tests of the Responses endpoint share: requests, replies through the client, and how they are compared."""

import asyncio

import pydantic
from openai.types.responses import Response
from published import ReplyCheck
from scripted_calls import ScriptedCall, Wire, streamed

from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.server.responses import (
    ResponsesReply,
    ResponsesRequest,
    as_begun,
)

UNKNOWN_TO_THE_CLIENT = {"store", "bytes", "name", "presence_penalty", "frequency_penalty"}
"""Fields that the client's types lack here or there, and the API's reference has."""
WEATHER = {"type": "function", "name": "weather", "parameters": {"type": "object"}, "description": "Of a place."}
LOGPROBS = ["message.output_text.logprobs"]


def request_of(**fields) -> ResponsesRequest:
    return ResponsesRequest(**({"input": "Hi"} | fields))


def reply_of(gains, *, error=None, **fields) -> ResponsesReply:
    return reply_to(ScriptedCall(gains, error), **fields)


def reply_to(call: ScriptedCall, **fields) -> ResponsesReply:
    request = request_of(**fields)
    begun = as_begun(request, SamplingParams(temperature=0.5, top_p=0.9), model="tiny", id="resp_1")
    return ResponsesReply(call, begun, num_top_logprobs=request.top_logprobs or 0)


class ResponsesWire(Wire):
    def whole(self, reply: ResponsesReply) -> Response:
        self._content = (asyncio.run(reply.reply()), "application/json")
        self._check()
        return checked(self._client.responses.create(model="tiny", input="Hi"))

    def stream(self, reply: ResponsesReply, *, timeout_s: float | None = None) -> list:
        content = asyncio.run(streamed(reply, timeout_s))
        self._content = (content, "text/event-stream")
        self._check()
        return [checked(event) for event in self._client.responses.create(model="tiny", input="Hi", stream=True)]

    def _check(self) -> None:
        content, media_type = self._content
        check = ReplyCheck("/v1/responses", 200, media_type)
        check.feed(content)
        check.end()

    def accumulated(self, reply: ResponsesReply) -> Response:
        """What the client makes of a stream."""
        self.stream(reply)
        with self._client.responses.stream(model="tiny", input="Hi") as stream:
            return stream.get_final_response()


def checked(value):
    """`value`, all of whose fields the client knows."""
    if isinstance(value, pydantic.BaseModel):
        assert set(value.model_extra or ()) <= UNKNOWN_TO_THE_CLIENT, value
        for name in type(value).model_fields:
            checked(getattr(value, name))
    elif isinstance(value, list):
        for one in value:
            checked(one)
    return value


def plain(response) -> dict:
    """A response without what chance and time put in."""

    def strip(value):
        if isinstance(value, list):
            return [strip(one) for one in value]
        if isinstance(value, dict):
            return {
                name: strip(one)
                for name, one in value.items()
                if name not in ("id", "call_id", "created_at", "completed_at")
            }
        return value

    return strip(response.model_dump())


def shown(response) -> list[tuple[str, ...]]:
    """The items of a response, without their looks."""
    found = []
    for item in response.output:
        if item.type == "function_call":
            found.append((item.type, item.name, item.arguments, item.status))
        else:
            [part] = item.content
            found.append((item.type, part.text, item.status))
    return found
