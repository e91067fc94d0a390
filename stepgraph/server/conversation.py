"""From a conversation to a prompt, and from the text that follows to reasoning, answer and tool calls."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from stepgraph.engine.prompts import chat_text
from stepgraph.errors import RequestError
from stepgraph.server import reasoning
from stepgraph.server.protocol import ChatMessageField, NamedToolChoice, Tool
from stepgraph.server.reasoning import ReasoningParser
from stepgraph.server.tool_calls import (
    ForcedCallParser,
    ToolCallDelta,
    ToolCallFormat,
    ToolCallParser,
    detect_format,
    forced_call_schema,
    tools_prompt,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_PROBE_NAME = "probe_of_the_template"
_PROBE = {"type": "function", "function": {"name": _PROBE_NAME, "description": "", "parameters": {}}}
_SETTLED = frozenset({"tools", "tokenize", "conversation", "messages", "return_tensors", "return_dict", "padding"})
"""Arguments of transformers that are no variables of a template."""


@dataclass(frozen=True)
class ChatForm:
    """How a model's chat template does things. Made once, when the model is loaded.

    Args:
        tokenizer: the model's.
        template: replaces the model's chat template.
        tool_format: how the model writes tool calls; None leaves them in the text.
        thinks: whether its answers may begin with reasoning.
        template_shows_tools: whether the template tells the model about tools; else a system message does.
    """

    tokenizer: PreTrainedTokenizerFast | None
    template: str | None
    tool_format: ToolCallFormat | None
    thinks: bool
    template_shows_tools: bool

    @classmethod
    def of(
        cls,
        tokenizer: PreTrainedTokenizerFast | None,
        *,
        template: str | None,
        tool_call_parser: str,
        reasoning_parser: str,
    ) -> ChatForm:
        """Find out how a template does things; see the settings of these names."""
        text = template or (tokenizer.chat_template if tokenizer is not None else None)
        text = text if isinstance(text, str) else json.dumps(text)  # several templates, by name
        tool_format: ToolCallFormat | None = None
        if tool_call_parser != "none":
            tool_format = detect_format(text) if tool_call_parser == "auto" else ToolCallFormat(tool_call_parser)
        return cls(
            tokenizer,
            template,
            tool_format,
            thinks=reasoning_parser == "think" or (reasoning_parser == "auto" and reasoning.thinks(text)),
            template_shows_tools=_shows_tools(tokenizer, template),
        )

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation; its special tokens are in it. Takes milliseconds.

        Raises:
            RequestError: the conversation does not fit the template.
        """
        if reserved := sorted(_SETTLED & set(variables or ())):
            raise RequestError(f"chat_template_kwargs cannot set {reserved[0]!r}; it takes variables of the template")
        if not self.template_shows_tools:
            messages = _spelled_out(messages, tools)
        return chat_text(
            messages,
            self.tokenizer,
            tools=tools if self.template_shows_tools else None,
            chat_template=self.template,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables=variables,
        )

    @property
    def marks_calls_by_special_tokens(self) -> bool:
        """Whether an answer's text shows its calls only with special tokens in it."""
        return self.tool_format is ToolCallFormat.MISTRAL


class ToolUse(NamedTuple):
    """What a request says about tools, settled."""

    shown: list[dict[str, Any]]
    """Tools the model is told of."""
    forced: str | None
    """A function it must call."""
    must_call: bool
    """It must call some function; its text is then nothing but calls."""
    at_most_one: bool

    @classmethod
    def of(
        cls,
        tools: Sequence[Tool] | None,
        choice: str | NamedToolChoice | None,
        parallel: bool | None,
    ) -> ToolUse:
        """From the fields of a request.

        Raises:
            RequestError: they contradict each other.
        """
        offered = [tool.model_dump(exclude_none=True) for tool in tools or ()]
        names = [tool["function"]["name"] for tool in offered]
        if doubled := next((name for name, times in Counter(names).items() if times > 1), None):
            raise RequestError(f"tools holds two functions named {doubled!r}; give each its own name")
        if isinstance(choice, NamedToolChoice):
            name = choice.function.name
            if name not in names:
                raise RequestError(
                    f"tool_choice names {name!r}, which is not among tools: {', '.join(names) or 'none'}"
                )
            return cls(offered, name, True, True)
        if choice in ("auto", "required") and not offered:
            raise RequestError(f"tool_choice={choice!r} needs tools; give some, or leave tool_choice unset")
        if choice == "none":
            return cls([], None, False, True)
        return cls(offered, None, choice == "required", parallel is False)

    @property
    def names(self) -> list[str]:
        """Of the functions that can be called."""
        return [tool["function"]["name"] for tool in self.shown]

    def schema(self) -> dict[str, Any] | None:
        """What the whole answer must be, if the model must call."""
        if not self.must_call:
            return None
        return forced_call_schema(self.shown, self.forced, parallel=not self.at_most_one)


class Piece(NamedTuple):
    """What an answer gains."""

    reasoning: str
    content: str
    calls: list[ToolCallDelta]


class AnswerParser:
    """Sorts the text of one answer, however it is cut into pieces, into reasoning, content and tool calls."""

    def __init__(self, form: ChatForm, tools: ToolUse, *, prompt: str | None, guided: bool):
        """`prompt`: as rendered, for templates that begin the reasoning. `guided`: the answer's form is prescribed, so it holds
        no reasoning."""
        self._at_most_one = tools.at_most_one
        self._reasoning: ReasoningParser | None = None
        if form.thinks and not guided:
            self._reasoning = ReasoningParser(starts_inside=reasoning.starts_inside(prompt or ""))
        self._calls: ToolCallParser | ForcedCallParser | None = None
        if tools.must_call:
            self._calls = ForcedCallParser(tools.forced)
        elif tools.shown and form.tool_format is not None:
            self._calls = ToolCallParser(form.tool_format, tools.names)
        self.num_calls = 0

    def feed(self, text: str, *, finished: bool) -> Piece:
        """Sort more text; `finished` with the last of it."""
        thought, content = ("", text) if self._reasoning is None else self._reasoning.feed(text)
        if finished and self._reasoning is not None:
            more_thought, more_content = self._reasoning.finish()
            thought, content = thought + more_thought, content + more_content
        calls: list[ToolCallDelta] = []
        if self._calls is not None:
            content, calls = self._calls.feed(content)
            if finished:
                more_content, more_calls = self._calls.finish()
                content, calls = content + more_content, calls + more_calls
        if self._at_most_one:
            calls = [call for call in calls if call.index == 0]
        self.num_calls += sum(call.name is not None for call in calls)
        return Piece(thought, content, calls)


def plain_messages(messages: Sequence[ChatMessageField]) -> list[dict[str, Any]]:
    """Messages as chat templates take them: content as text, arguments of calls as objects.

    Raises:
        RequestError: a message holds something else than text, or arguments that are not JSON.
    """
    if not messages:
        raise RequestError("messages is empty; give at least one message")
    return [_plain_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _plain_message(message: ChatMessageField, where: str) -> dict[str, Any]:
    plain = message.model_dump(exclude_none=True)
    content = message.content
    if isinstance(content, list):
        content = "".join(_text_of(part, f"{where}.content[{index}]") for index, part in enumerate(content))
    plain["content"] = content or ""
    for index, call in enumerate(plain.get("tool_calls", ())):
        function = call.get("function")
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RequestError(f"{where}.tool_calls[{index}] needs function: {{name, arguments}}")
        arguments = function.get("arguments")
        if isinstance(arguments, str):
            function["arguments"] = parse_arguments(arguments, f"{where}.tool_calls[{index}].function.arguments")
    return plain


def parse_arguments(text: str, where: str) -> Any:
    """The arguments of a call as chat templates take them.

    Raises:
        RequestError: they are not JSON; `where` names their field.
    """
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not JSON: {error}") from error


def _text_of(part: Mapping[str, Any], where: str) -> str:
    kind, text = part.get("type"), part.get("text", part.get("refusal"))
    if kind not in ("text", "input_text", "output_text", "refusal"):
        raise RequestError(f"{where} is of type {kind!r}, and this model takes text only; leave it out")
    if not isinstance(text, str):
        raise RequestError(f"{where}.text must be text, not {text!r:.80}")
    return text


def _shows_tools(tokenizer: PreTrainedTokenizerFast | None, template: str | None) -> bool:
    """Whether a template tells the model about tools."""
    if tokenizer is None or not (template or tokenizer.chat_template):
        return False
    messages = [{"role": "user", "content": "x"}]
    try:
        shown = chat_text(messages, tokenizer, tools=[_PROBE], chat_template=template)
    except RequestError:
        return False
    return _PROBE_NAME in shown


def _spelled_out(messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The conversation for a template that knows no tools: these, calls and their results become text."""
    found = [_without_tools(message) for message in messages]
    if not tools:
        return found
    text = tools_prompt(tools)
    if found[0]["role"] == "system":
        found[0]["content"] = f"{found[0]['content']}\n\n{text}"
        return found
    return [{"role": "system", "content": text}, *found]


def _without_tools(message: Mapping[str, Any]) -> dict[str, Any]:
    role, content = message["role"], message.get("content") or ""
    for call in message.get("tool_calls", ()):
        function = call["function"]
        written = json.dumps({"name": function["name"], "arguments": function.get("arguments", {})})
        content += ("\n" if content else "") + f"<tool_call>\n{written}\n</tool_call>"
    if role == "tool":
        role, content = "user", f"<tool_response>\n{content}\n</tool_response>"
    return {"role": role, "content": content}
