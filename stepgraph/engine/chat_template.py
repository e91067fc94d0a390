"""Conversations to prompts: a model's chat template, and what it does with what it is given."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from stepgraph.engine.chat_messages import Message, arranged
from stepgraph.engine.chat_probes import TemplateFacts, knows
from stepgraph.engine.prompts import encode_text, require_tokenizer
from stepgraph.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


class ChatTemplate:
    """The chat template of a model.

    All of a conversation reaches the model: what its template has no place for is said in turns that it has. Messages of the
    developer become those of the system, system messages become part of the user's next turn, and tools, calls and their results
    become text, each where the template does not show them; turns in a row become one where they must alternate.

    Args:
        tokenizer: the model's; None: every use raises a ConfigError.
        template: replaces the model's own.
        variables: further ones of the template, for conversations that do not set them.

    Raises:
        ConfigError: `variables` has one that is an argument of transformers, or a field of requests.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerFast | None,
        template: str | None = None,
        variables: Mapping[str, Any] | None = None,
    ):
        self._tokenizer = tokenizer
        self._template = template
        self._variables = dict(variables or {})
        if self._variables and (reserved := sorted(_settled() & set(self._variables))):
            raise ConfigError(
                f"default_chat_template_kwargs cannot set {reserved[0]!r}; it takes variables of the template",
                param="default_chat_template_kwargs",
            )

    @property
    def text(self) -> str:
        """The template's own text; "" if there is none, JSON of several by their names."""
        found = self._template or (None if self._tokenizer is None else self._tokenizer.chat_template)
        return found if isinstance(found, str) else "" if found is None else json.dumps(found, ensure_ascii=False)

    @cached_property
    def facts(self) -> TemplateFacts:
        """What it shows of a conversation. Takes milliseconds, once."""
        return TemplateFacts.of(self._try)

    def prepare(self) -> None:
        """Find out its `facts` now, for which the first conversation would wait."""
        if self.text and self._tokenizer is not None:
            _ = self.facts

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        documents: Sequence[Mapping[str, Any]] | None = None,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt of a conversation as text, up to where the assistant's answer starts. Takes milliseconds.

        The template writes the special tokens itself, so the tokenizer must not add its own.

        Args:
            messages: the turns, as the OpenAI API has them.
            tools: functions the model may call, as the OpenAI API describes them.
            add_generation_prompt: begin the assistant's turn.
            continue_final_message: leave the last turn open instead, to go on with it.
            documents: to answer from, `{"title", "text"}` each.
            variables: further ones of the template.

        Raises:
            RequestError: the conversation does not fit the template, there is none, or it shows no documents.
        """
        self._require()
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message goes on with the last turn; set add_generation_prompt to false with it",
                param="continue_final_message",
            )
        if reserved := sorted(_settled() & set(variables or ())):
            raise RequestError(
                f"chat_template_kwargs cannot set {reserved[0]!r}; it takes variables of the template",
                param=f"chat_template_kwargs.{reserved[0]}",
            )
        if documents and not self.facts.shows_documents:
            raise RequestError(
                "documents has no place in the model's chat template, which would leave them out; put them into a message",
                param="documents",
            )
        turns = arranged(messages, tools, self.facts, lambda role: knows(role, self._try))
        if tools and self.facts.shows_tools and not self.facts.shows_bare_tools:
            tools = [_described(tool) for tool in tools]
        try:
            return self._apply(
                turns,
                tools=tools if self.facts.shows_tools else (),
                documents=documents,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                **self._variables | dict(variables or {}),
            )
        except Exception as error:
            raise RequestError(
                f"the messages do not fit the model's chat template: {error}", param="messages"
            ) from error

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] = (), **rendering: Any
    ) -> dict[str, Any]:
        """The prompt of a conversation, text and token ids. See `render`."""
        text = self.render(messages, tools, **rendering)
        return {"prompt": text, "prompt_token_ids": encode_text(text, self._tokenizer, add_special_tokens=False)}

    def _require(self) -> PreTrainedTokenizerFast:
        tokenizer = require_tokenizer(self._tokenizer)
        if not (self._template or tokenizer.chat_template):
            raise RequestError(
                "this model has no chat template; use generate with the whole prompt as text", param="messages"
            )
        return tokenizer

    def _apply(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        documents: Sequence[Mapping[str, Any]] | None = None,
        **more: Any,
    ) -> str:
        if self._shows_parts_only:
            messages = [_in_parts(message) for message in messages]
        return self._rendered(messages, tools=tools, documents=documents, **more)

    @cached_property
    def _shows_parts_only(self) -> bool:
        """Whether it leaves out content that is a text and no list of parts, as templates of multimodal models may."""
        probe = {"role": "user", "content": "probetext"}

        def shows(message: Message) -> bool:
            try:
                return probe["content"] in self._rendered([message])
            except Exception:  # templates are programs, and raise what they like
                return False

        return not shows(probe) and shows(_in_parts(probe))

    def _rendered(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        documents: Sequence[Mapping[str, Any]] | None = None,
        **more: Any,
    ) -> str:
        return str(
            self._require().apply_chat_template(
                list(messages),
                tools=list(tools) or None,
                documents=list(documents) if documents else None,
                chat_template=self._template,
                tokenize=False,
                **more,
            )
        )

    def _try(self, messages: Sequence[Message], **given: Any) -> str | None:
        """What a probe becomes; None if the template refuses it."""
        try:
            return self._apply(messages, add_generation_prompt=True, **given)
        except Exception:  # templates are programs, and raise what they like
            return None


def _in_parts(message: Message) -> Message:
    """The same message, its text as the one part of its content."""
    content = message.get("content")
    return {**message, "content": [{"type": "text", "text": content}]} if isinstance(content, str) else message


def _described(tool: Mapping[str, Any]) -> dict[str, Any]:
    """The same tool, with what it may lack empty."""
    missing = {"description": "", "parameters": {"type": "object", "properties": {}}}
    return {**tool, "function": {**missing, **tool["function"]}}


def _settled() -> frozenset[str]:
    """Arguments of transformers that are no variables of a template."""
    from transformers import PreTrainedTokenizerFast

    return frozenset(inspect.signature(PreTrainedTokenizerFast.apply_chat_template).parameters) - {"self", "kwargs"} | {
        "messages"
    }
