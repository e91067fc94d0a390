"""What clients may send to /v1/messages: fields of Anthropic's Messages API, and what they are in those of the chat endpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from pydantic import Field

from stepgraph.errors import RequestError
from stepgraph.server.chat import Conversation
from stepgraph.server.conversation import ToolUse
from stepgraph.server.forced_calls import FORM_BESIDE_CALLS
from stepgraph.server.protocol import (
    ChatRequest,
    Function,
    FunctionName,
    Items,
    NamedToolChoice,
    RequestOptions,
    RequestPart,
    SamplingFields,
    Tool,
    call_spellings,
    check_one_answer,
)
from stepgraph.server.turns import Turns


class Turn(RequestPart):
    """One turn of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: str | Items[dict[str, Any]] = Field(
        description="text, or blocks of type text, thinking, tool_use and tool_result"
    )


class ClientTool(RequestPart):
    """A tool the model may call, and the client runs."""

    type: str | None = Field(None, description="custom, or unset; the server runs no tools of its own")
    name: str
    description: str | None = None
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None
    cache_control: dict[str, Any] | None = Field(
        None, description="without effect: prefixes are found by their content"
    )


class ToolChoice(RequestOptions):
    """Whether the model may call, must, or must not."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, description="of the tool, with type tool")
    disable_parallel_tool_use: bool = Field(False, description="one call at most")


class Thinking(RequestPart):
    """Whether the model thinks before it answers, if its chat template lets one choose."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: int | None = Field(
        None, description="without effect: the model thinks as long as max_tokens lets it"
    )
    display: Literal["summarized", "omitted"] | None = Field(
        None, description="omitted leaves the text of thinking blocks out; it is never summed up"
    )


class OutputConfig(RequestPart):
    """What the answer is like."""

    effort: str | None = Field(None, description="given to the chat template as reasoning_effort")
    format: dict[str, Any] | None = Field(None, description='{"type": "json_schema", "schema": {...}}')


class PromptFields(RequestPart):
    """Fields that say what the model is to answer."""

    forms: ClassVar[Mapping[str, str]] = {
        "content": "text, or a list of blocks",
        "system": "text, or a list of text blocks",
        "tool_choice": "an object of type auto, any, none, or tool with the name of one",
    }
    """Of fields that may have several, in errors."""

    messages: Items[Turn] = Field(description="the conversation so far; a last turn of the assistant is gone on with")
    system: str | Items[dict[str, Any]] | None = Field(
        None, description="a system message before it: text, or text blocks"
    )
    tools: Items[ClientTool] | None = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = Field(None, description="default: what the chat template does by itself")
    output_config: OutputConfig | None = None
    output_format: dict[str, Any] | None = Field(None, description="an older place of output_config.format")
    chat_template_kwargs: dict[str, Any] | None = Field(None, description="further variables of the chat template")
    cache_control: dict[str, Any] | None = Field(
        None, description="without effect: prefixes are found by their content"
    )
    container: Any = Field(None, description="not supported: the server runs no tools of its own")
    mcp_servers: Items[Any] | None = Field(None, description="not supported: the server runs no tools of its own")

    def ignored(self) -> list[str]:
        """See `RequestPart.ignored`. Those of turns, tools and options are named, too, with their place."""
        parts: dict[str, RequestPart | None] = {
            "tool_choice": self.tool_choice,
            "thinking": self.thinking,
            "output_config": self.output_config,
            **{f"messages[{index}]": turn for index, turn in enumerate(self.messages)},
            **{f"tools[{index}]": tool for index, tool in enumerate(self.tools or ())},
        }
        unknown = [f"{place}.{name}" for place, part in parts.items() if part is not None for name in part.ignored()]
        return super().ignored() + unknown

    def _spellings(self) -> dict[str, str]:
        names = super()._spellings() | {"prompt": "messages", "reasoning_effort": "output_config.effort"}
        in_config = self.output_config is not None and self.output_config.format is not None
        if in_config or self.output_format is not None:
            form = "output_config.format" if in_config else "output_format"
            names |= {"structured_outputs": form, "structured_outputs.structural_tag": form}
            names |= {"structured_outputs.json": f"{form}.schema"}
            names |= {f"structured_outputs.{FORM_BESIDE_CALLS}": f"{form}.schema"}
        tools = self.tools or ()
        names |= {f"tools[{index}].function": f"tools[{index}]" for index in range(len(tools))}
        names |= {f"tools[{index}].function.parameters": f"tools[{index}].input_schema" for index in range(len(tools))}
        return names | call_spellings(_choice_of(self.tool_choice), [tool.name for tool in tools], ".input_schema")


class CountTokensRequest(PromptFields):
    """/v1/messages/count_tokens."""

    model: str | None = Field(None, description="a name that /v1/models lists; default: the first")


class MessagesRequest(SamplingFields, PromptFields):
    """/v1/messages."""

    max_tokens: int = Field(description="length of the answer")
    stop_sequences: Items[str] | None = Field(None, description="texts that end the answer")

    def _spellings(self) -> dict[str, str]:
        return super()._spellings() | ({"stop": "stop_sequences"} if self.stop_sequences else {})


def sampling_of(request: MessagesRequest) -> dict[str, Any]:
    """What a request says about the choice of tokens, in the fields of /v1/chat/completions.

    Raises:
        RequestError: it says it twice, or asks for what has no place in a message.
    """
    check_one_answer(request, "a message")
    fields = {name: getattr(request, name) for name in SamplingFields.model_fields}
    if request.stop_sequences:
        if request.stop:
            raise RequestError("stop_sequences and stop are the same; give one of them", param="stop_sequences")
        fields["stop"] = request.stop_sequences
    return fields | {"max_completion_tokens": request.max_tokens}


def conversation_of(request: PromptFields, sampling: Mapping[str, Any]) -> Conversation:
    """What is asked for, as chat templates and the engine take it.

    Args:
        request: the prompt.
        sampling: further fields of /v1/chat/completions.

    Raises:
        RequestError: this server or this model has no such thing.
    """
    for name in ("container", "mcp_servers"):
        if getattr(request, name):
            raise RequestError(
                f"{name} is not supported: the server runs no tools of its own; leave it out, and give tools that your program "
                "runs",
                param=name,
            )
    fields = dict(sampling)
    if (form := _form_of(request)) is not None:
        if fields.get("response_format") is not None:
            raise RequestError(
                "output_config.format and response_format each ask for a form of the answer; give one of them",
                param="response_format",
            )
        fields["response_format"] = form
    messages = messages_of(request)
    if messages[-1]["role"] == "assistant":
        fields["continue_final_message"] = True
    chat = ChatRequest(
        **fields,
        messages=[],
        reasoning_effort=None if request.output_config is None else request.output_config.effort,
        chat_template_kwargs=_template_variables(request),
    )
    return Conversation(chat, messages, tools_of(request))


def _form_of(request: PromptFields) -> dict[str, Any] | None:
    """The form of the answer as /v1/chat/completions takes it; None for free text."""
    where = "output_format"
    form = request.output_format
    if request.output_config is not None and request.output_config.format is not None:
        if form is not None:
            raise RequestError(
                "output_config.format and output_format are the same; give one of them", param="output_format"
            )
        where, form = "output_config.format", request.output_config.format
    if form is None:
        return None
    if form.get("type") != "json_schema" or not isinstance(form.get("schema"), dict):
        raise RequestError(
            f'{where} must be {{"type": "json_schema", "schema": {{...}}}}, not {form!r:.80}', param=where
        )
    return {"type": "json_schema", "json_schema": {"schema": form["schema"]}}


def _template_variables(request: PromptFields) -> dict[str, Any] | None:
    """Variables of the chat template: those given, and the two names that templates have for whether the model thinks."""
    given = request.chat_template_kwargs
    if request.thinking is None:
        return given
    thinks = request.thinking.type != "disabled"
    switches = {"enable_thinking": thinks, "thinking": thinks}
    for name, value in switches.items():
        if given is not None and given.get(name, value) != value:
            raise RequestError(
                f"thinking.type={request.thinking.type!r} and {name}={given[name]!r:.80} in chat_template_kwargs contradict each "
                "other; give one of them",
                param="thinking.type",
            )
    return {**(given or {}), **switches}


def tools_of(request: PromptFields) -> ToolUse:
    """What a request says about tools.

    Raises:
        RequestError: one is none that the client runs, or the fields contradict each other.
    """
    tools = [_tool_of(tool, f"tools[{index}]") for index, tool in enumerate(request.tools or ())]
    given = request.tool_choice
    choice = _choice_of(given)
    if choice == "required" and not tools:
        raise RequestError(
            "tool_choice of type 'any' needs tools; give some, or leave tool_choice out", param="tool_choice"
        )
    if isinstance(choice, FunctionName) and not choice.name:
        raise RequestError("tool_choice of type 'tool' needs the name of a tool", param="tool_choice.name")
    named = NamedToolChoice(function=choice) if isinstance(choice, FunctionName) else choice
    return ToolUse.of(tools, named, given is None or not given.disable_parallel_tool_use)


def _choice_of(given: ToolChoice | None) -> str | FunctionName | None:
    """A choice among tools as `call_spellings` takes it; auto, which clients also say without tools, is None."""
    if given is None or given.type == "auto":
        return None
    if given.type == "tool":
        return FunctionName(name=given.name or "")
    return "required" if given.type == "any" else "none"


def _tool_of(tool: ClientTool, where: str) -> Tool:
    if tool.type not in (None, "custom"):
        raise RequestError(
            f"{where} is of type {tool.type!r:.80}, and this server knows and runs no tools of its own; give tools with name and "
            "input_schema, which your program runs",
            param=f"{where}.type",
        )
    if tool.input_schema is None:
        raise RequestError(
            f'{where} needs input_schema, the schema of its input: {{"type": "object", "properties": ...}}',
            param=f"{where}.input_schema",
        )
    return Tool(
        function=Function(
            name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict
        )
    )


def messages_of(request: PromptFields) -> list[dict[str, Any]]:
    """The conversation of a request, as chat templates take it. Turns of one role in a row are one; if the last one is the
    assistant's, the answer goes on with it.

    Raises:
        RequestError: it holds something that this model cannot take.
    """
    if not request.messages:
        raise RequestError("messages is empty; give at least one message", param="messages")
    turns = Turns()
    if request.system:
        _say(turns, "system", request.system, "system")
    for index, turn in enumerate(request.messages):
        _say(turns, turn.role, turn.content, f"messages[{index}].content")
    messages = turns.messages()
    if messages and messages[-1]["role"] == "assistant" and not _can_go_on(messages[-1]):
        del messages[-1]
    if not messages:
        raise RequestError("messages holds no text; give at least one turn that has some", param="messages")
    return messages


def _can_go_on(last: Mapping[str, Any]) -> bool:
    """Whether a last turn of the assistant has text with which an answer can go on; else it has nothing at all.

    Raises:
        RequestError: it has something else.
    """
    if "tool_calls" in last:
        raise RequestError(
            "messages ends with a tool_use block; give its tool_result in a turn of the user after it", param="messages"
        )
    if not last["content"] and "reasoning_content" in last:
        raise RequestError(
            "messages ends with a thinking block, and an answer cannot go on in the middle of one; leave the block out, or give "
            "the text that follows it",
            param="messages",
        )
    return bool(last["content"])


_BLOCKS = {"user": ("text", "tool_result"), "assistant": ("text", "thinking", "redacted_thinking", "tool_use")}
"""Types of blocks that turns of a role may have; others have text only."""


def _say(turns: Turns, role: str, content: str | list[dict[str, Any]], where: str) -> None:
    """Add a turn, or what blocks it has, to a conversation."""
    if isinstance(content, str):
        turns.say(role, content)
        return
    for index, block in enumerate(content):
        _add(turns, role, block, f"{where}[{index}]")


def _add(turns: Turns, role: str, block: Mapping[str, Any], where: str) -> None:
    kind = block.get("type")
    known = _BLOCKS.get(role, ("text",))
    if kind not in known:
        raise RequestError(
            f"{where} is of type {kind!r:.80}, and a turn of {role} can hold blocks of type {', '.join(known)}: the model takes "
            "text only, and the server runs no tools; leave it out",
            param=f"{where}.type",
        )
    if kind == "text":
        turns.say(role, _string(block, "text", where))
    elif kind == "thinking":
        turns.think(_string(block, "thinking", where))
    elif kind == "tool_use":
        arguments = block.get("input")
        if not isinstance(arguments, dict):
            raise RequestError(f"{where}.input must be an object, not {arguments!r:.80}", param=f"{where}.input")
        turns.call(_string(block, "id", where), _string(block, "name", where), arguments)
    elif kind == "tool_result":
        text = _result_of(block.get("content"), f"{where}.content")
        if block.get("is_error"):
            text = f"Error: {text}" if text else "Error"
        turns.result(_string(block, "tool_use_id", where), text)
    # else it is thinking that another server encrypted, and no use to this model


def _result_of(content: Any, where: str) -> str:
    """The text of what a tool returned."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise RequestError(f"{where} must be text or a list of text blocks, not {content!r:.80}", param=where)
    turns = Turns()
    for index, block in enumerate(content):
        if not isinstance(block, dict):
            raise RequestError(f"{where}[{index}] must be a text block, not {block!r:.80}", param=f"{where}[{index}]")
        _add(turns, "tool", block, f"{where}[{index}]")
    return "".join(message["content"] for message in turns.messages())


def _string(block: Mapping[str, Any], key: str, where: str) -> str:
    value = block.get(key)
    if not isinstance(value, str):
        raise RequestError(f"{where}.{key} must be text, not {value!r:.80}", param=f"{where}.{key}")
    return value
