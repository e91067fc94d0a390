"""/v1/responses: conversations in the form of the Responses API. Nothing is kept between requests."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from itertools import count
from typing import Any, Literal

from msgspec import UNSET
from msgspec.structs import replace
from pydantic import Field

from stepgraph.engine.sampling_params import SamplingParams
from stepgraph.engine.session import AnswerDelta
from stepgraph.errors import RequestError
from stepgraph.server.answer_items import Event
from stepgraph.server.bodies import check_values
from stepgraph.server.chat import ChatCall, Conversation, describe_logprobs
from stepgraph.server.conversation import ToolUse
from stepgraph.server.errors import APIError
from stepgraph.server.forced_calls import FORM_BESIDE_CALLS
from stepgraph.server.protocol import (
    ChatRequest,
    Function,
    FunctionChoice,
    FunctionName,
    Items,
    NamedToolChoice,
    RequestPart,
    SamplingFields,
    Tool,
    call_spellings,
    check_one_answer,
    is_part,
)
from stepgraph.server.replies import TokenLogprob, encode_json
from stepgraph.server.responses_replies import (
    IncompleteDetails,
    InputTokensDetails,
    Output,
    OutputTokensDetails,
    ReasoningShown,
    ResponseError,
    ResponseObject,
    ResponseUsage,
)
from stepgraph.server.service import Context, Service, new_id
from stepgraph.server.sse import event
from stepgraph.server.turns import Turns

_LOGPROBS = "message.output_text.logprobs"
"""What `include` names to get log-probabilities."""


class FunctionTool(RequestPart):
    """A function the model may call."""

    type: str = Field(description="function; the server runs no tools of its own")
    name: str | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class TextOptions(RequestPart):
    """What the answer's text is like."""

    format: dict[str, Any] | None = Field(
        None, description='{"type": "text"}, "json_object", or "json_schema" with name and schema'
    )


class ReasoningOptions(RequestPart):
    """What the reasoning is like."""

    effort: str | None = Field(None, description="given to the chat template")
    summary: str | None = Field(None, description="without effect: reasoning is given whole")


class ResponsesRequest(SamplingFields):
    """/v1/responses."""

    input: str | Items[dict[str, Any]] = Field(
        description="the conversation so far: text, or items of type message, function_call, function_call_output, reasoning"
    )
    instructions: str | None = Field(None, description="a system message before it")
    max_output_tokens: int | None = Field(None, description="length of the answer; default: what the context holds")
    include: Items[str] | None = Field(None, description=f"{_LOGPROBS}; others have no effect")
    top_logprobs: int | None = Field(None, description=f"likely tokens beside each token, with {_LOGPROBS} in include")
    tools: Items[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | FunctionChoice | None = None
    parallel_tool_calls: bool | None = Field(None, description="false: one call at most")
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="further variables of the chat template")
    truncation: str | None = Field(None, description="disabled, or unset")
    max_tool_calls: int | None = Field(None, description="given back: it is about tools that the server would run")
    metadata: dict[str, str] | None = Field(None, description="given back")
    user: str | None = Field(None, description="given back")
    safety_identifier: str | None = Field(None, description="given back")
    prompt_cache_key: str | None = Field(None, description="given back: prefixes are found by their content")
    previous_response_id: str | None = Field(None, description="not supported: nothing is kept")
    conversation: str | dict[str, Any] | None = Field(None, description="not supported: nothing is kept")
    prompt: dict[str, Any] | None = Field(None, description="not supported: nothing is kept")
    background: bool | None = Field(None, description="not supported: nothing is kept")

    def spelled(self, param: str) -> str:
        """See `RequestPart.spelled`. Tools have no `function` around their fields."""
        own = super().spelled(param)
        return own.replace("].function.", "].", 1) if is_part(own, "tools") else own

    def _spellings(self) -> dict[str, str]:
        names = super()._spellings() | {
            "prompt": "prompt" if self.prompt else "input",
            "messages": "input",
            "max_tokens": "max_output_tokens",
            "logprobs": "top_logprobs",
            "reasoning_effort": "reasoning.effort",
        }
        if self.text is not None and self.text.format is not None:
            schema = "text.format.schema"
            names |= {"structured_outputs": "text.format", "structured_outputs.structural_tag": "text.format"}
            names |= {"structured_outputs.json": schema}
            names |= {f"structured_outputs.{FORM_BESIDE_CALLS}": schema}
        return names | call_spellings(self.tool_choice, [tool.name for tool in self.tools or ()], ".parameters")


class ResponsesReply:
    """One call of /v1/responses, as the OpenAI API shapes it.

    Args:
        call: the conversation as the engine answers it.
        response: what the client is told at once.
        num_top_logprobs: likely tokens to name beside each token, if `call` gives log-probabilities.
    """

    def __init__(self, call: ChatCall, response: ResponseObject, *, num_top_logprobs: int):
        self._call = call
        self._response = response
        self._num_top_logprobs = num_top_logprobs
        self._output = Output()
        self._numbers = count()

    @classmethod
    async def start(cls, request: ResponsesRequest, service: Service, context: Context) -> ResponsesReply:
        """Check a request and send it to the engine.

        Raises:
            APIError, RequestError: it cannot be answered.
        """
        model, adapter = service.choose_model(request.model)
        id = new_id("resp_")

        def read() -> Conversation:
            check(request)
            return Conversation(as_chat(request), messages_of(request), tools_of(request))

        call = await ChatCall.start(read, service, context, id=id, adapter=adapter)
        [answer] = call.generation.requests.values()
        response = await service.in_thread(lambda: as_begun(request, answer.params, model=model, id=id))
        return cls(call, response, num_top_logprobs=request.top_logprobs or 0)

    async def reply(self) -> bytes:
        """The whole answer, as JSON."""
        async with aclosing(self._answer()) as events:
            async for _ in events:
                pass
        return encode_json(self._response)

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer as server-sent events."""
        for name in ("created", "in_progress"):
            yield self._numbered({"type": f"response.{name}", "response": self._response})
        async with aclosing(self._answer()) as events:
            async for found in events:
                yield self._numbered(found)
        yield self._numbered({"type": f"response.{self._response.status}", "response": self._response})

    def failed(self, failure: APIError) -> bytes:
        """The last events of a stream that breaks off: what went wrong, and how far the response came."""
        code = "server_error" if failure.status >= 500 else "invalid_prompt"
        response = replace(
            self._response,
            status="failed",
            error=ResponseError(code, failure.message),
            output=self._output.items,
        )
        error = {"type": "error", "code": failure.code, "message": failure.message, "param": failure.param}
        return self._numbered(error) + self._numbered({"type": "response.failed", "response": response})

    def _numbered(self, found: Event) -> bytes:
        return event(encode_json({"sequence_number": next(self._numbers), **found}), found["type"])

    async def _answer(self) -> AsyncGenerator[Event]:
        """The events of the answer's items. When they end, the response has."""
        reason: str | None = None
        async with aclosing(self._call.gains()) as gains:
            async for gain in gains:
                for found in self._output.take_with(gain.piece, self._logprobs_of(gain.delta)):
                    yield found
                reason = gain.finish_reason
        ending: dict[str, Any] = {"status": "completed", "completed_at": int(time.time())}
        if reason not in ("stop", "tool_calls"):
            details = IncompleteDetails("max_output_tokens" if reason == "length" else UNSET)
            ending = {"status": "incomplete", "incomplete_details": details}
        for found in self._output.end(ending["status"]):
            yield found
        self._response = replace(
            self._response,
            **ending,
            output=self._output.items,
            usage=self._usage(),
            kv_transfer_params=self._call.generation.kv_transfer_params,
        )

    def _logprobs_of(self, delta: AnswerDelta) -> list[TokenLogprob]:
        return [] if delta.logprobs is None else describe_logprobs(delta, self._num_top_logprobs)

    def _usage(self) -> ResponseUsage:
        usage = self._call.usage()
        details = usage.completion_tokens_details
        return ResponseUsage(
            usage.prompt_tokens,
            InputTokensDetails(usage.prompt_tokens_details.cached_tokens),
            usage.completion_tokens,
            OutputTokensDetails(0)
            if details is UNSET
            else OutputTokensDetails(
                details.reasoning_tokens, details.accepted_prediction_tokens, details.rejected_prediction_tokens
            ),
            usage.total_tokens,
        )


def check(request: ResponsesRequest) -> None:
    """Refuse what this endpoint does not have.

    Raises:
        RequestError: the request asks for it.
    """
    for name in ("previous_response_id", "conversation", "prompt", "background"):
        if value := getattr(request, name):
            raise RequestError(
                f"{name}={value!r:.80} is not supported: the server is stateless and keeps no responses, conversations or "
                "prompts; send the whole conversation in input",
                param=name,
            )
    if request.truncation not in (None, "disabled"):
        raise RequestError(
            f"truncation={request.truncation!r:.80} is not supported; use disabled, and shorten input to fit",
            param="truncation",
        )
    check_one_answer(request, "a response")
    if request.max_output_tokens is not None and request.max_output_tokens < 1:
        raise RequestError(
            f"max_output_tokens={request.max_output_tokens} must be at least 1, or unset", param="max_output_tokens"
        )
    if request.top_logprobs and not _wants_logprobs(request):
        raise RequestError(
            f"top_logprobs needs {_LOGPROBS!r} in include; add it, or leave top_logprobs out", param="top_logprobs"
        )
    try:
        encode_json(request.model_dump())
    except UnicodeEncodeError as error:
        raise RequestError(
            "the request holds half of a surrogate pair, which is no Unicode text; leave it out"
        ) from error


def _wants_logprobs(request: ResponsesRequest) -> bool:
    return _LOGPROBS in (request.include or ())


def as_chat(request: ResponsesRequest) -> ChatRequest:
    """What a request asks for, in the fields of /v1/chat/completions; all but the conversation and its tools.

    Raises:
        RequestError: the form of the answer is not described well.
    """
    fields = {name: getattr(request, name) for name in SamplingFields.model_fields}
    form = None if request.text is None else request.text.format
    if form is not None and (checked := _checked_format(form)) is not None:
        if request.response_format is not None:
            raise RequestError(
                "text.format and response_format each ask for a form of the answer; give one of them",
                param="response_format",
            )
        fields["response_format"] = checked
    return ChatRequest(
        **fields,
        messages=[],
        max_completion_tokens=request.max_output_tokens,
        logprobs=_wants_logprobs(request),
        top_logprobs=request.top_logprobs if _wants_logprobs(request) else None,
        reasoning_effort=None if request.reasoning is None else request.reasoning.effort,
        chat_template_kwargs=request.chat_template_kwargs,
    )


def _checked_format(form: Mapping[str, Any]) -> dict[str, Any] | None:
    """A text.format as /v1/chat/completions takes it; None for free text."""
    kind = form.get("type")
    if kind == "text":
        return None
    if kind == "json_object":
        return {"type": kind}
    if kind != "json_schema":
        raise RequestError(
            f"text.format.type={kind!r:.80} is not known; use text, json_object or json_schema",
            param="text.format.type",
        )
    if not isinstance(form.get("name"), str) or not isinstance(form.get("schema"), dict):
        missing = "schema" if isinstance(form.get("name"), str) else "name"
        raise RequestError(
            'text.format of type "json_schema" needs name and schema: {"name": "...", "schema": {...}}',
            param=f"text.format.{missing}",
        )
    return {"type": kind, "json_schema": form}


def tools_of(request: ResponsesRequest) -> ToolUse:
    """What a request says about tools.

    Raises:
        RequestError: one is no function, or the fields contradict each other.
    """
    tools: list[Tool] = []
    for index, tool in enumerate(request.tools or ()):
        if tool.type != "function":
            raise RequestError(
                f"tools[{index}] is of type {tool.type!r:.80}, and this server runs no tools of its own; give functions, which "
                "your program runs",
                param=f"tools[{index}].type",
            )
        if tool.name is None:
            raise RequestError(
                f'tools[{index}] has no name; a function is {{"type": "function", "name", "parameters"}}',
                param=f"tools[{index}].name",
            )
        function = Function(
            name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict
        )
        tools.append(Tool(function=function))
    choice: str | NamedToolChoice | None
    if isinstance(request.tool_choice, FunctionChoice):
        choice = NamedToolChoice(function=FunctionName(name=request.tool_choice.name))
    else:  # clients say auto even without tools
        choice = None if request.tool_choice == "auto" else request.tool_choice
    return ToolUse.of(tools, choice, request.parallel_tool_calls)


def messages_of(request: ResponsesRequest) -> list[dict[str, Any]]:
    """The conversation of a request, as chat templates take it.

    What the assistant did between two turns of others becomes one message, and so do messages of the system, or of the
    developer, in a row.

    Raises:
        RequestError: it holds something that this model cannot take.
    """
    turns = Turns()
    if request.instructions:
        turns.begin("system", request.instructions)
    if isinstance(request.input, str):
        turns.begin("user", request.input)
    elif not request.input:
        raise RequestError("input is empty; give at least one message", param="input")
    else:
        for index, item in enumerate(request.input):
            _add(turns, item, f"input[{index}]")
    return turns.messages()


def _add(turns: Turns, item: Mapping[str, Any], where: str) -> None:
    """Add an item to a conversation."""
    kind = item.get("type", "message")
    if kind == "message":
        role, text = item.get("role"), _text_of(item.get("content"), f"{where}.content")
        if role == "user":
            turns.begin(role, text)
        elif role in ("assistant", "system", "developer"):
            turns.say(role, text)
        else:
            raise RequestError(
                f"{where}.role={role!r:.80} is not known; use user, assistant, system or developer",
                param=f"{where}.role",
            )
    elif kind == "reasoning":
        if item.get("content"):  # otherwise it is encrypted or summed up, and no use to this model
            turns.think(_text_of(item["content"], f"{where}.content"))
    elif kind == "function_call":
        name, arguments = _string(item, "name", where), _string(item, "arguments", where)
        check_values(arguments, f"{where}.arguments")
        turns.call(_string(item, "call_id", where), name, arguments)
    elif kind == "function_call_output":
        text = _text_of(item.get("output"), f"{where}.output")
        turns.result(_string(item, "call_id", where), text)
    else:
        raise RequestError(
            f"{where} is of type {kind!r:.80}, and this server takes message, function_call, function_call_output and reasoning",
            param=f"{where}.type",
        )


def _text_of(content: Any, where: str) -> str:
    """The text of a message, of reasoning or of what a function returned."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} must be text or a list of parts, not {content!r:.80}", param=where)
    texts: list[str] = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "text", "reasoning_text", "refusal"):
            raise RequestError(
                f"{where}[{index}] is of type {kind!r:.80}, and this model takes text only; leave it out",
                param=f"{where}[{index}]",
            )
        texts.append(_string(part, "refusal" if kind == "refusal" else "text", f"{where}[{index}]"))
    return "".join(texts)


def _string(item: Mapping[str, Any], key: str, where: str) -> str:
    value = item.get(key)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{key} must be text, not {value!r:.80}", param=f"{where}.{key}")
    return value


def as_begun(request: ResponsesRequest, params: SamplingParams, *, model: str, id: str) -> ResponseObject:
    """A response of which nothing is there yet. `params`: as they were settled, with the defaults for what was left open."""
    form = None if request.text is None else request.text.format
    choice = request.tool_choice
    return ResponseObject(
        id=id,
        created_at=int(time.time()),
        model=model,
        instructions=request.instructions,
        max_output_tokens=request.max_output_tokens,
        metadata=request.metadata or {},
        parallel_tool_calls=request.parallel_tool_calls is not False,
        reasoning=ReasoningShown(None if request.reasoning is None else request.reasoning.effort),
        temperature=params.temperature,
        text={"format": form or {"type": "text"}},
        tool_choice=choice.model_dump() if isinstance(choice, FunctionChoice) else choice or "auto",
        tools=[tool.model_dump() for tool in request.tools or ()],
        top_logprobs=request.top_logprobs or 0,
        top_p=params.top_p,
        user=request.user,
        presence_penalty=params.presence_penalty,
        frequency_penalty=params.frequency_penalty,
        max_tool_calls=request.max_tool_calls,
        service_tier="default",
        safety_identifier=request.safety_identifier,
        prompt_cache_key=request.prompt_cache_key,
    )
