"""What a chat template does with what may stand in a conversation, found out by rendering probes.

Templates are programs, and say nothing of themselves: one drops a role that it does not know, the next one refuses it, the third
passes its name on to a model that never saw it. So each fact is read from the text that a small conversation becomes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum, auto
from typing import Any, TypeAlias

Message: TypeAlias = Mapping[str, Any]
"""``{"role": ..., "content": ...}``."""
Render: TypeAlias = Callable[..., str | None]
"""Renders messages, with `tools` and `documents` if given; None if the template refuses them."""

_STRANGER = "probestranger"
"""A role that no template knows."""
_TOOL_NAME = "probetool"
_TOOL = {
    "type": "function",
    "function": {
        "name": _TOOL_NAME,
        "description": "probe",
        "parameters": {"type": "object", "properties": {"probekey": {"type": "string", "description": "probe"}}},
    },
}
_BARE_TOOL = {"type": "function", "function": {"name": _TOOL_NAME}}
_DOCUMENT = {"title": "probetitle", "text": "probedocument", "doc_id": "1"}
_ARGUMENTS = {"probekey": "probevalue"}
_CUT_ARGUMENTS = '{"probekey": "probevalue'
REASONING_NAMES = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message that hold its reasoning, as clients and templates have it. The first is used here."""
_LONG_ID, _SHORT_ID = "call-0123456789abcdef", "abcdefghi"


class Standing(Enum):
    """What a template does with a role."""

    UNKNOWN = auto()
    """Refuses it, drops its messages, or takes them for another role's."""
    PASSED = auto()
    """Writes its name and its messages, as it does with any role."""
    KNOWN = auto()
    """Has a place for it."""


@dataclass(frozen=True, kw_only=True)
class CallForm:
    """How an assistant's calls must be given to a template, for it to show them."""

    arguments_are_text: bool = False
    """As JSON text, not as an object."""
    takes_cut_arguments: bool = True
    """It also shows arguments that are text because they are no object, such as those of a call that was cut off."""
    short_ids: bool = False
    """Ids must be nine letters or digits."""
    one_per_message: bool = False
    """A message may hold one call only."""


@dataclass(frozen=True, kw_only=True)
class TemplateFacts:
    """What a chat template shows to its model. The defaults are those of a template that shows all as it is given."""

    has_system: bool = True
    """It has a system message, at the beginning."""
    has_system_alone: bool = True
    """It shows it where nothing follows."""
    has_systems: bool = True
    """It shows several system messages at the beginning."""
    has_system_anywhere: bool = True
    """It shows system messages between other turns."""
    repeats_user: bool = True
    """It takes two messages of the user in a row."""
    repeats_assistant: bool = True
    shows_tools: bool = True
    """It tells the model which functions there are."""
    shows_bare_tools: bool = True
    """Also if they have a name only."""
    shows_documents: bool = True
    reasoning_name: str = REASONING_NAMES[0]
    """The field of a message with calls in which it looks for their reasoning."""
    has_reasoning_beside_content: bool = True
    """It shows both of them."""
    call_form: CallForm | None = CallForm()
    """None: it does not show calls."""
    shows_results: bool = True
    """It shows what functions returned, in messages of role tool."""
    has_developer: bool = False
    """It has a place for messages of the developer, beside or as those of the system."""
    has_function: bool = False
    """It has a place for messages of role function, an older name of tool."""

    @classmethod
    def of(cls, render: Render) -> TemplateFacts:
        """Find them out. Takes some thirty renderings, each a fraction of a millisecond.

        Args:
            render: with the template.
        """
        probes = _Probes(render)
        if not probes.shows([_user(1)]):  # nothing can be told of it
            return cls()
        has_system = probes.has_system([], [_user(1)])
        # one that shows it only in place of the system's takes both for the same
        has_developer = probes.shows([_said("system", 1), _said("developer", 1), _user(1)])
        has_developer = has_developer and knows("developer", render)
        first, turns = _said("system", 1), [_user(1), _assistant(1)]
        shows_tools = probes.shows([_user(1)], _TOOL_NAME, tools=[_TOOL])
        # where tools are described as text, calls are asked for as text, and what was called must look the same
        call_form = probes.call_form() if shows_tools else None
        reasoning_name, is_beside_content = REASONING_NAMES[0], True
        if call_form is not None and (found := probes.reasoning_name(call_form)) is not None:
            reasoning_name, is_beside_content = found, probes.shows_reasoning(call_form, found, "probesaid")
        return cls(
            has_system=has_system,
            has_system_alone=has_system and probes.has_system([], []),
            has_systems=has_system and probes.has_system([first], [_user(1)]),
            has_system_anywhere=has_system and probes.has_system([first, *turns], [_user(2)]),
            repeats_user=probes.shows([_user(1), _user(2)]),
            repeats_assistant=probes.shows([*turns, _assistant(2), _user(2)]),
            shows_tools=shows_tools,
            shows_bare_tools=shows_tools and probes.shows([_user(1)], _TOOL_NAME, tools=[_BARE_TOOL]),
            shows_documents=probes.shows([_user(1)], _DOCUMENT["text"], documents=[_DOCUMENT]),
            reasoning_name=reasoning_name,
            has_reasoning_beside_content=is_beside_content,
            call_form=call_form,
            shows_results=call_form is not None and probes.shows_results(call_form),
            has_developer=has_developer,
            has_function=knows("function", render),
        )  # fmt: skip


def knows(role: str, render: Render) -> bool:
    """Whether a template has a place for a role, and does not just pass any on."""
    return _Probes(render).standing(role) is Standing.KNOWN


class _Probes:
    """Asks a template."""

    def __init__(self, render: Render):
        self._render = render

    def shows(self, messages: Sequence[Message], *texts: str, **given: Any) -> bool:
        """Whether it shows texts; those of the messages if none are named."""
        rendered = self._render(messages, **given)
        return rendered is not None and all(text in rendered for text in texts or [m["content"] for m in messages])

    def has_system(self, before: Sequence[Message], after: Sequence[Message]) -> bool:
        """Whether it shows a system message in this place, and does not lose those before it."""
        is_known = self.standing_between("system", before, after) is not Standing.UNKNOWN
        return is_known and self.shows([*before, _said("system", 2), *after])

    def standing(self, role: str) -> Standing:
        """Of a role whose messages hold nothing but text: the best that it has at the beginning or after the user."""
        found = (self.standing_between(role, [], [_user(1)]), self.standing_between(role, [_user(1)], []))
        return max(found, key=lambda standing: standing.value)

    def standing_between(
        self,
        role: str,
        before: Sequence[Message],
        after: Sequence[Message],
        fields: Message | None = None,
        **given: Any,
    ) -> Standing:
        """Of a role whose message stands between others, and has further `fields`."""
        text = "probecontent"

        def rendered(name: str) -> str | None:
            return self._render([*before, {"role": name, "content": text, **(fields or {})}, *after], **given)

        its, strangers = rendered(role), rendered(_STRANGER)
        if its is None or text not in its:
            return Standing.UNKNOWN
        if strangers is not None and its == strangers.replace(_STRANGER, role):
            return Standing.PASSED if _STRANGER in strangers else Standing.UNKNOWN
        return Standing.KNOWN

    def call_form(self) -> CallForm | None:
        """The first form of calls that it shows."""
        for short_ids in (False, True):
            for arguments_are_text in (False, True):
                form = CallForm(arguments_are_text=arguments_are_text, short_ids=short_ids)
                if self._shows_calls(form):
                    return replace(
                        form,
                        takes_cut_arguments=self._shows_calls(form, _CUT_ARGUMENTS),
                        one_per_message=not self._shows_calls(form, count=2),
                    )
        return None

    def _shows_calls(self, form: CallForm, arguments: str | None = None, *, count: int = 1) -> bool:
        rendered = self._render([_user(1), _called(form, arguments, count=count)], tools=[_TOOL])
        names = [f"probecall{number}" for number in range(count)]
        return rendered is not None and all(text in rendered for text in (*names, "probevalue"))

    def reasoning_name(self, form: CallForm) -> str | None:
        """The first field that it looks for reasoning in; None if it shows none."""
        return next((name for name in REASONING_NAMES if self.shows_reasoning(form, name)), None)

    def shows_reasoning(self, form: CallForm, name: str, content: str = "") -> bool:
        """Whether it shows reasoning in a field of a message with a call, and its content."""
        result = {"role": "tool", "content": "probe", "tool_call_id": _id_of(form), "name": "probecall0"}
        called = {**_called(form), "content": content, name: "probethought"}
        return self.shows([_user(1), called, result], "probethought", content, tools=[_TOOL])

    def shows_results(self, form: CallForm) -> bool:
        """Whether it shows what functions returned; if only under the name of the role, its model was trained on that."""
        fields = {"tool_call_id": _id_of(form), "name": "probecall0"}
        standing = self.standing_between("tool", [_user(1), _called(form)], [], fields, tools=[_TOOL])
        return standing is not Standing.UNKNOWN


def _said(role: str, number: int) -> Message:
    return {"role": role, "content": f"probe{role}{number}"}


def _user(number: int) -> Message:
    return _said("user", number)


def _assistant(number: int) -> Message:
    return _said("assistant", number)


def _id_of(form: CallForm) -> str:
    return _SHORT_ID if form.short_ids else _LONG_ID


def _called(form: CallForm, arguments: str | None = None, *, count: int = 1) -> Message:
    """Calls in a form; `arguments`: other ones than the probe's."""
    id = _id_of(form)
    given = arguments or (json.dumps(_ARGUMENTS) if form.arguments_are_text else _ARGUMENTS)
    calls = [
        {
            "id": f"{id[:-1]}{number}",
            "type": "function",
            "function": {"name": f"probecall{number}", "arguments": given},
        }
        for number in range(count)
    ]
    return {"role": "assistant", "content": "", "tool_calls": calls}
