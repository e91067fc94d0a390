"""What a conversation asks of a model's answer, and from its text to reasoning, content and tool calls."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from stepgraph.engine.chat_messages import plain_message
from stepgraph.engine.chat_template import ChatTemplate
from stepgraph.engine.harmony import SPELLINGS, HarmonyTokens, Place
from stepgraph.errors import ConfigError, RequestError
from stepgraph.server import reasoning
from stepgraph.server.bodies import check_values
from stepgraph.server.forced_calls import followed_schemas, forced_call_schema, form_or_calls
from stepgraph.server.harmony import HarmonyParser
from stepgraph.server.harmony_forms import forced_schemas, harmony_form
from stepgraph.server.pieces import Piece
from stepgraph.server.protocol import ChatMessageField, NamedToolChoice, Tool
from stepgraph.server.reasoning import ReasoningParser, Tags
from stepgraph.server.tool_calls import ForcedCallParser, ToolCallDelta, ToolCallParser
from stepgraph.server.tool_formats import ToolCallFormat, detect_format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

HARMONY = "harmony"
"""Value of the settings tool_call_parser and reasoning_parser."""


class Harmony(NamedTuple):
    """That a model writes harmony."""

    tokens: HarmonyTokens
    reads_calls: bool
    """Else they are content, unless they are forced."""


@dataclass(frozen=True)
class ChatForm:
    """How a model's chat template does things. Made once, when the model is loaded.

    Args:
        template: the model's, or what replaces it.
        tool_format: how the model writes tool calls; None leaves them in the text.
        thinks: whether its answers may begin with reasoning.
        harmony: the format that sets both apart; None: the model writes in another one.
    """

    template: ChatTemplate
    tool_format: ToolCallFormat | None
    thinks: bool
    harmony: Harmony | None = None
    tags: Tags = reasoning.THINK
    """Around reasoning, if it thinks and writes no harmony."""

    @classmethod
    def of(
        cls,
        template: ChatTemplate,
        tokenizer: PreTrainedTokenizerFast | None = None,
        *,
        tool_call_parser: str,
        reasoning_parser: str,
    ) -> ChatForm:
        """Find out how a template does things; see the settings of these names.

        Raises:
            ConfigError: they ask for a format that the tokenizer has no tokens for.
        """
        tool_format: ToolCallFormat | None = None
        harmony = _harmony_of(template, tokenizer, tool_call_parser, reasoning_parser)
        if harmony is not None:
            return cls(template, None, reasoning_parser != "none", Harmony(harmony, tool_call_parser != "none"))
        if tool_call_parser != "none":
            tool_format = (
                detect_format(template.text) if tool_call_parser == "auto" else ToolCallFormat(tool_call_parser)
            )
        tags = _TAGS.get(reasoning_parser, reasoning.tags_of(template.text) if reasoning_parser == "auto" else None)
        return cls(template, tool_format, tags is not None, tags=tags or reasoning.THINK)

    def with_calls(self, spec: dict[str, Any], tools: ToolUse) -> dict[str, Any]:
        """The form of a text answer, as SamplingParams takes it, and beside it calls of the tools, if the model may call some."""
        if not tools.shown or self.tool_format is None:
            return spec
        return form_or_calls(spec, tools.shown, self.tool_format, parallel=not tools.at_most_one)

    def answer_form(
        self, spec: dict[str, Any] | None, tools: ToolUse, prompt: str, *, is_whole: bool
    ) -> dict[str, Any] | None:
        """What an answer must be, as SamplingParams takes it; None: anything.

        Args:
            spec: the form that is asked for. It is that of a text, of which there is none beside forced calls.
            tools: what the request says about them.
            prompt: as rendered.
            is_whole: `spec` says what the whole answer is: it has no calls beside.

        Raises:
            RequestError: the form, or that of a call that is forced, cannot be followed.
        """
        if self.harmony is not None:
            if tools.must_call:
                calls = forced_schemas(tools.shown, tools.forced)
                return harmony_form(None, calls, self.harmony.tokens, Place.behind(prompt))
            has_calls = self.harmony.reads_calls and not is_whole
            calls = followed_schemas(tools.shown) if has_calls else {}
            return None if spec is None else harmony_form(spec, calls, self.harmony.tokens, Place.behind(prompt))
        if tools.must_call:
            return {"json": tools.schema(), "disable_any_whitespace": True}
        return spec if spec is None or is_whole else self.with_calls(spec, tools)

    def parser(self, tools: ToolUse, *, prompt: str | None, guided: bool) -> AnswerParser | HarmonyParser:
        """For one answer. See `AnswerParser`."""
        if self.harmony is None:
            return AnswerParser(self, tools, prompt=prompt, guided=guided)
        return HarmonyParser(
            self.harmony.tokens,
            tools.names if self.harmony.reads_calls or tools.must_call else [],
            prompt=prompt or "",
            at_most_one=tools.at_most_one,
            sets_reasoning_apart=self.thinks,
        )

    def needs_special_tokens(self, tools: ToolUse) -> bool:
        """Whether an answer's text shows its reasoning, or its calls, only with special tokens in it."""
        has_calls = bool(tools.shown) and self.tool_format is not None and self.tool_format.has_special_tokens
        return has_calls or (self.thinks and self.tags is reasoning.GEMMA4)


def _harmony_of(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerFast | None, tool_call_parser: str, reasoning_parser: str
) -> HarmonyTokens | None:
    """The format's tokens, if settings ask for it, or leave it open and the model's own template writes it."""
    named = {tool_call_parser, reasoning_parser}
    if others := named - {"auto", "none", HARMONY}:
        if HARMONY in named:
            raise ConfigError(
                f"tool_call_parser={tool_call_parser!r} and reasoning_parser={reasoning_parser!r} are two formats, and "
                f"{HARMONY} is one of both calls and reasoning; leave {others.pop()} out",
                param="tool_call_parser",
            )
        return None
    if HARMONY not in named:
        return None if named == {"none"} else HarmonyTokens.written(tokenizer, template.text)
    tokens = HarmonyTokens.of(tokenizer)
    if tokens is None:
        raise ConfigError(
            f"{HARMONY} is a format of special tokens ({', '.join(SPELLINGS)}), of which the model's tokenizer lacks some; "
            "choose another parser",
            param="tool_call_parser" if tool_call_parser == HARMONY else "reasoning_parser",
        )
    return tokens


_TAGS = {"think": reasoning.THINK, "gemma4": reasoning.GEMMA4}


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
            second = names.index(doubled, names.index(doubled) + 1)
            raise RequestError(
                f"tools holds two functions named {doubled!r:.80}; give each its own name",
                param=f"tools[{second}].function.name",
            )
        if isinstance(choice, NamedToolChoice):
            name = choice.function.name
            if name not in names:
                raise RequestError(
                    f"tool_choice names {name!r:.80}, which is not among tools: {', '.join(names) or 'none'}",
                    param="tool_choice",
                )
            return cls(offered, name, True, True)
        if choice in ("auto", "required") and not offered:
            raise RequestError(
                f"tool_choice={choice!r} needs tools; give some, or leave tool_choice unset", param="tool_choice"
            )
        if choice == "none":
            return cls([], None, False, True)
        return cls(offered, None, choice == "required", parallel is False)

    @property
    def names(self) -> list[str]:
        """Of the functions that can be called."""
        return [tool["function"]["name"] for tool in self.shown]

    @property
    def parameters(self) -> dict[str, dict[str, Any]]:
        """The schemas of their arguments, by their names."""
        return {tool["function"]["name"]: tool["function"].get("parameters") or {} for tool in self.shown}

    def schema(self) -> dict[str, Any] | None:
        """What the whole answer must be, if the model must call."""
        if not self.must_call:
            return None
        return forced_call_schema(self.shown, self.forced, parallel=not self.at_most_one)


class AnswerParser:
    """Sorts the text of one answer, however it is cut into pieces, into reasoning, content and tool calls."""

    def __init__(self, form: ChatForm, tools: ToolUse, *, prompt: str | None, guided: bool):
        """`prompt`: as rendered, for templates that begin the reasoning. `guided`: the answer's form is prescribed, so it holds
        no reasoning."""
        self._at_most_one = tools.at_most_one
        self._reasoning: ReasoningParser | None = None
        if form.thinks and not guided:
            is_inside = reasoning.starts_inside(prompt or "", form.tags)
            self._reasoning = ReasoningParser(starts_inside=is_inside, tags=form.tags)
        self._calls: ToolCallParser | ForcedCallParser | None = None
        if tools.must_call:
            self._calls = ForcedCallParser(tools.forced)
        elif tools.shown and form.tool_format is not None:
            self._calls = ToolCallParser(form.tool_format, tools.names, tools.parameters)
        self.num_calls = 0

    def feed(self, text: str, *, special: int | None = None, finish_reason: str | None = None) -> Piece:
        """Sort more text; the last of it comes with the reason why it is. A special token behind it means nothing."""
        finished = finish_reason is not None
        thought, content = ("", text) if self._reasoning is None else self._reasoning.feed(text)
        if finished and self._reasoning is not None:
            more_thought, more_content = self._reasoning.finish()
            thought, content = thought + more_thought, content + more_content
        calls: list[ToolCallDelta] = []
        if self._calls is not None:
            content, calls = self._calls.feed(content)
            if finished:
                more_content, more_calls = self._calls.finish(cut=finish_reason != "stop")
                content, calls = content + more_content, calls + more_calls
        if self._at_most_one:
            calls = [call for call in calls if call.index == 0]
        self.num_calls += sum(call.name is not None for call in calls)
        return Piece(thought, content, calls)


def plain_messages(messages: Sequence[ChatMessageField]) -> list[dict[str, Any]]:
    """The messages of a request as `ChatTemplate.render` takes them, with their content as text.

    Raises:
        RequestError: one holds something else than text, a call without a name, or arguments of too many values.
    """
    return [_plain_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def _plain_message(message: ChatMessageField, where: str) -> dict[str, Any]:
    fields = message.model_dump(exclude_none=True)
    functions = {f"tool_calls[{i}].function": call.get("function") for i, call in enumerate(message.tool_calls or ())}
    for place, function in (functions | {"function_call": fields.get("function_call")}).items():
        if isinstance(function, dict) and isinstance(arguments := function.get("arguments"), str):
            check_values(arguments, f"{where}.{place}.arguments")
    return plain_message(fields, where)
