"""Forms of answers in harmony: what a text answer must be holds for its final message, and a call that is forced has its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

from stepgraph.engine.guided_schema import SchemaConverter
from stepgraph.engine.guided_tags import TagConverter
from stepgraph.engine.guided_text import Limits, Regex, check_grammar, grammar_of_choices
from stepgraph.engine.harmony import NAMESPACE, HarmonyTokens, Place
from stepgraph.engine.sampling_params import StructuredOutputs
from stepgraph.server.forced_calls import ANY_OBJECT, can_be_followed, object_schema

_Format: TypeAlias = dict[str, Any]
"""Part of a structural tag."""


def harmony_form(
    spec: Mapping[str, Any] | None, calls: Mapping[str, Any], tokens: HarmonyTokens, place: Place
) -> dict[str, Any]:
    """What an answer must be, as SamplingParams takes it: any reasoning, and then a final message of a form or one call.

    Args:
        spec: what the final message must be, as SamplingParams takes it; None: there must be a call.
        calls: of functions that are possible: the schemas of their arguments by their names.
        tokens: of the format.
        place: where the answer goes on. In a final message, its rest must be of the form.

    Raises:
        RequestError: the form cannot be followed.
    """
    is_answering = place.channel is not None and place.channel != "analysis"
    if spec is not None and is_answering:
        return dict(spec)
    write = _Writer(tokens)
    form, is_compact = (None, True) if spec is None else (format_of(spec), spec.get("disable_any_whitespace", False))
    thinking = {"type": "star", "content": _sequence(write.said(), write.next())}
    if place.channel is not None:  # in reasoning, or in a text that calls were to follow
        begin = [_ANY_TEXT, write.token(tokens.end), write.next()]
    else:
        begin = [] if place.is_in_message else [write.next()]

    def answer(calls: Mapping[str, Any]) -> _Format:
        ends = [*([] if form is None else [write.final(form)]), *([write.call(calls)] if calls else [])]
        return _sequence(*begin, thinking, _any_of(ends))

    found = answer(calls)
    if form is not None and not can_be_followed(found):  # together it is too much
        found = answer(dict.fromkeys(calls, ANY_OBJECT))
    return {"structural_tag": {"type": "structural_tag", "format": found}, "disable_any_whitespace": is_compact}


def forced_schemas(tools: Sequence[Mapping[str, Any]], name: str | None) -> dict[str, Any]:
    """The schemas of arguments, by the names of the functions of which the model must call one.

    Args:
        tools: as the OpenAI API has them.
        name: of the only one; None: any of them.

    Raises:
        RequestError: one cannot be followed.
    """
    found = {}
    for index, tool in enumerate(tools):
        function = tool["function"]
        if name in (None, function["name"]):
            schema = object_schema(function.get("parameters") or {})
            SchemaConverter(schema, f"tools[{index}].function.parameters").convert()
            found[function["name"]] = schema
    return found


def format_of(spec: Mapping[str, Any]) -> _Format:
    """What SamplingParams takes as the form of an answer, as part of a structural tag.

    Raises:
        RequestError: it cannot be followed.
    """
    given = StructuredOutputs(**spec)
    if given.json is not None:
        SchemaConverter(given.json).convert()
        return _json(given.json)
    if given.json_object:
        return _json(ANY_OBJECT)
    if given.regex is not None:
        _ = Regex(given.regex, Limits("structured_outputs.regex"))
        return {"type": "regex", "pattern": given.regex}
    if given.choice is not None:
        grammar_of_choices(given.choice)
        return _any_of([_text(choice) for choice in given.choice])
    if given.grammar is not None:
        check_grammar(given.grammar, Limits("structured_outputs.grammar"))
        return {"type": "grammar", "grammar": given.grammar}
    assert isinstance(given.structural_tag, Mapping)
    converter = TagConverter(given.structural_tag)
    converter.convert()
    return converter.newer


class _Writer:
    """Writes messages as formats of a structural tag."""

    def __init__(self, tokens: HarmonyTokens):
        self._tokens = tokens

    def token(self, id: int) -> _Format:
        """A special token."""
        return {"type": "token", "token": id}

    def next(self) -> _Format:
        """What stands before a message that is not the answer's first."""
        return _sequence(self.token(self._tokens.start), _text("assistant"))

    def said(self) -> _Format:
        """A message that comes before what is asked for."""
        tokens = self._tokens
        channel = _any_of([_text("analysis"), _text("commentary")])
        return _sequence(
            self.token(tokens.channel), channel, self.token(tokens.message), _ANY_TEXT, self.token(tokens.end)
        )

    def final(self, form: _Format) -> _Format:
        """The final message up to its end, its type announced or not."""
        tokens = self._tokens
        channel = _any_of([_text("final"), _sequence(_text("final "), self.token(tokens.constrain), _text("json"))])
        return _sequence(self.token(tokens.channel), channel, self.token(tokens.message), form)

    def call(self, schemas: Mapping[str, Any]) -> _Format:
        """A call up to its end, whose function is named before or after the channel."""
        tokens = self._tokens
        channel = self.token(tokens.channel)
        announced = _any_of([_sequence(_text(" "), self.token(tokens.constrain), _text("json")), _text(" json")])
        calls = []
        for name, schema in schemas.items():
            recipient = f" to={NAMESPACE}{name}"
            header = _any_of([
                _sequence(channel, _text(f"commentary{recipient}")),
                _sequence(_text(recipient), channel, _text("commentary")),
            ])  # fmt: skip
            calls.append(_sequence(header, announced, self.token(tokens.message), _json(schema)))
        return _any_of(calls)


_ANY_TEXT: _Format = {"type": "any_text"}


def _text(value: str) -> _Format:
    return {"type": "const_string", "value": value}


def _json(schema: Any) -> _Format:
    return {"type": "json_schema", "json_schema": schema}


def _sequence(*elements: _Format) -> _Format:
    return {"type": "sequence", "elements": list(elements)}


def _any_of(elements: Sequence[_Format]) -> _Format:
    return elements[0] if len(elements) == 1 else {"type": "or", "elements": list(elements)}
