"""Messages of a conversation in the one form that chat templates take, and in the order and the roles that a template shows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from hashlib import sha256
from typing import Any, TypeAlias

from stepgraph.engine.chat_probes import REASONING_NAMES, CallForm, TemplateFacts
from stepgraph.errors import RequestError

Message: TypeAlias = Mapping[str, Any]
"""``{"role": ..., "content": ...}``, with the further fields that the OpenAI API has."""

ROLES = ("system", "developer", "user", "assistant", "tool", "function")
"""Those that any template takes, if not by this name then as another."""
_ONLY_ID = "call-0"
"""Of a call in the older form, which has none as there is one at a time."""
_TEXT_KINDS = frozenset({"text", "input_text", "output_text", "refusal"})


def plain_message(message: Message, where: str) -> dict[str, Any]:
    """A message with its content as text, and its calls as `tool_calls` whose arguments are objects.

    Arguments that are no JSON object, as those of a call that was cut off, stay the text that they are.

    Raises:
        RequestError: it holds something else than text, or a call without a name; `where` is its place.
    """
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise RequestError(f"{where} must be a message, {{role, content}}, not {message!r:.80}", param=where)
    plain = {name: value for name, value in message.items() if value is not None}
    plain["content"] = _content_of(plain.get("content"), f"{where}.content")
    _settle_reasoning(plain)
    if (
        call := plain.pop("function_call", None)
    ) is not None and "tool_calls" not in plain:  # as it was before tool_calls
        plain["tool_calls"] = [{"id": _ONLY_ID, "type": "function", "function": call}]
    if "tool_calls" in plain:
        calls = plain["tool_calls"]
        if not isinstance(calls, list):
            raise RequestError(
                f"{where}.tool_calls must be a list of calls, not {calls!r:.80}", param=f"{where}.tool_calls"
            )
        plain["tool_calls"] = [_plain_call(call, f"{where}.tool_calls[{index}]") for index, call in enumerate(calls)]
        if not calls:
            del plain["tool_calls"]
    return plain


def _settle_reasoning(message: dict[str, Any]) -> None:
    """Leave a message its reasoning in one field."""
    found = [message.pop(name) for name in REASONING_NAMES if isinstance(message.get(name), str)]
    if reasoning := next(filter(None, found), None):
        message[REASONING_NAMES[0]] = reasoning


def _plain_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RequestError(
            f"{where}.function must be {{name, arguments}}, not {function!r:.80}", param=f"{where}.function"
        )
    return {
        "type": "function",
        **call,
        "function": {**function, "arguments": parse_arguments(function.get("arguments"))},
    }


def parse_arguments(given: Any) -> Any:
    """The arguments of a call: the object that a text holds as JSON, no arguments as an empty one, and all else as it is."""
    if given is None or given == "":
        return {}
    if not isinstance(given, str):
        return given
    try:
        found = json.loads(given)
    except (ValueError, RecursionError):
        return given
    return {} if found is None else found if isinstance(found, dict) else given


def _content_of(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence):
        raise RequestError(f"{where} must be text or a list of parts, not {content!r:.80}", param=where)
    return "".join(_text_of(part, f"{where}[{index}]") for index, part in enumerate(content))


def _text_of(part: Any, where: str) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind not in _TEXT_KINDS:
        raise RequestError(
            f"{where} is of type {kind!r:.80}, and this model takes text only; leave it out", param=where
        )
    text = part.get("text", part.get("refusal"))
    if not isinstance(text, str):
        raise RequestError(f"{where}.text must be text, not {text!r:.80}", param=f"{where}.text")
    return text


def arranged(
    messages: Sequence[Message], tools: Sequence[Message], facts: TemplateFacts, knows: Callable[[str], bool]
) -> list[dict[str, Any]]:
    """A conversation as a template shows all of it: what it knows in its own way, the rest as text in turns that it knows.

    Args:
        messages: see `plain_message`.
        tools: that the model is offered.
        facts: about the template.
        knows: whether it has a place for a role that is not among `ROLES`.

    Raises:
        RequestError: there are no messages, one is malformed, or has a role that the template does not know.
    """
    if not messages:
        raise RequestError("messages is empty; give at least one message", param="messages")
    plain = [plain_message(message, f"messages[{index}]") for index, message in enumerate(messages)]
    _check_roles(plain, knows)
    turns = [_known_turn(message, facts) for message in plain]
    if not facts.has_developer and any(message["role"] == "developer" for message in plain):
        turns = _merged(turns, "system")  # clients put one beside the other, for templates that have both
    if tools and not facts.shows_tools:
        turns.insert(_num_leading_systems(turns), _turn("system", tools_prompt(tools)))
        turns = _merged(turns, "system", stop=_num_leading_systems(turns))
    turns = _systems_in_place(turns, facts)
    if not facts.repeats_user:
        turns = _merged(turns, "user")
    if not facts.repeats_assistant:
        turns = _merged(turns, "assistant")
    if facts.call_form is None:
        return turns
    return [_thought_in_place(turn, facts) for turn in _calls_in_form(turns, facts.call_form)]


def _check_roles(messages: Sequence[Message], knows: Callable[[str], bool]) -> None:
    known = set(ROLES)
    for index, message in enumerate(messages):
        if (role := message["role"]) not in known:
            if not knows(role):
                raise RequestError(
                    f"messages[{index}].role={role!r:.80} is not known to the model's chat template; use one of: "
                    f"{', '.join(ROLES)}",
                    param=f"messages[{index}].role",
                )
            known.add(role)


def _known_turn(message: dict[str, Any], facts: TemplateFacts) -> dict[str, Any]:
    """A message in a role that the template knows; its calls as text if the template shows none."""
    role = message["role"]
    if role == "developer" and not facts.has_developer:
        return message | {"role": "system"}
    if role == "function" and not facts.has_function:
        message = {"tool_call_id": _ONLY_ID, **message, "role": "tool"}
    if message["role"] == "tool" and not facts.shows_results:
        return _turn("user", f"<tool_response>\n{message['content']}\n</tool_response>")
    if facts.call_form is None and (calls := message.get("tool_calls")):
        texts = [message["content"]] if message["content"] else []
        for call in calls:
            function = {"name": call["function"]["name"], "arguments": call["function"]["arguments"]}
            texts.append(f"<tool_call>\n{json.dumps(function, ensure_ascii=False)}\n</tool_call>")
        return {name: value for name, value in message.items() if name != "tool_calls"} | {"content": "\n".join(texts)}
    return message


def _systems_in_place(turns: list[dict[str, Any]], facts: TemplateFacts) -> list[dict[str, Any]]:
    """System messages where the template shows them; the text of others goes into the user's next turn."""
    if not facts.has_system or (_num_leading_systems(turns) == len(turns) and not facts.has_system_alone):
        return _folded(turns)
    if not facts.has_systems:
        turns = _merged(turns, "system", stop=_num_leading_systems(turns))
    if facts.has_system_anywhere:
        return turns
    leading = _num_leading_systems(turns)
    return turns[:leading] + _folded(turns[leading:])


def _num_leading_systems(turns: Sequence[Message]) -> int:
    return next((index for index, turn in enumerate(turns) if turn["role"] != "system"), len(turns))


def _folded(turns: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns with what system messages say put before what the user says next."""
    found: list[dict[str, Any]] = []
    waiting: list[str] = []
    for turn in turns:
        if turn["role"] == "system":
            waiting.append(turn["content"])
            continue
        if waiting and turn["role"] == "user":
            turn = turn | {"content": _joined([*waiting, turn["content"]])}
        elif waiting:
            found.append(_turn("user", _joined(waiting)))
        waiting = []
        found.append(turn)
    return [*found, _turn("user", _joined(waiting))] if waiting else found


def _merged(turns: Sequence[dict[str, Any]], role: str, *, stop: int | None = None) -> list[dict[str, Any]]:
    """The turns, of which those of a role that follow each other are one; only the first `stop` are looked at. Turns with calls
    stay by themselves."""
    found: list[dict[str, Any]] = []
    texts: list[
        list[str]
    ] = []  # of each turn found: joined in the end, or they would be copied as often as there are turns
    for index, turn in enumerate(turns):
        may_join = (stop is None or index < stop) and turn["role"] == role and "tool_calls" not in turn
        if may_join and found and found[-1]["role"] == role and "tool_calls" not in found[-1]:
            texts[-1].append(turn["content"])
        else:
            found.append(turn)
            texts.append([turn["content"]])
    return [
        turn if len(said) == 1 else turn | {"content": _joined(said)} for turn, said in zip(found, texts, strict=True)
    ]


def _joined(texts: Iterable[str]) -> str:
    return "\n\n".join(text for text in texts if text)


def _turn(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


def _calls_in_form(turns: list[dict[str, Any]], form: CallForm) -> list[dict[str, Any]]:
    """The turns with their calls as the template takes them."""
    if form.one_per_message:
        turns = _one_call_each(turns)
    return [_in_form(turn, form) if turn["role"] == "tool" or "tool_calls" in turn else turn for turn in turns]


def _thought_in_place(turn: dict[str, Any], facts: TemplateFacts) -> dict[str, Any]:
    """A turn with its reasoning where the template looks for it, with what it says behind it, if that would be left out."""
    if turn["role"] != "assistant" or (reasoning := turn.get(REASONING_NAMES[0])) is None:
        return turn
    others = {name: value for name, value in turn.items() if name != REASONING_NAMES[0]}
    if "tool_calls" in turn and not facts.has_reasoning_beside_content:
        return others | {"content": "", facts.reasoning_name: _joined([reasoning, turn["content"]])}
    return others | {facts.reasoning_name: reasoning}


def _in_form(turn: dict[str, Any], form: CallForm) -> dict[str, Any]:
    if turn["role"] == "tool":
        return turn | {"tool_call_id": _short_id(turn.get("tool_call_id"))} if form.short_ids else turn
    calls = []
    for call in turn["tool_calls"]:
        arguments = call["function"]["arguments"]
        if form.arguments_are_text:
            arguments = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
        elif not isinstance(arguments, Mapping) and not form.takes_cut_arguments:
            arguments = {"arguments": arguments}
        call = call | {"function": call["function"] | {"arguments": arguments}}
        calls.append(call | {"id": _short_id(call.get("id"))} if form.short_ids else call)
    return turn | {"tool_calls": calls}


def _short_id(id: Any) -> str:
    """An id of nine letters or digits, the same for the same id."""
    text = str(id)
    return (
        text
        if len(text) == 9 and text.isascii() and text.isalnum()
        else sha256(text.encode("utf-8", "replace")).hexdigest()[:9]
    )


def _one_call_each(turns: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The turns with each call in one of its own, before its result."""
    found: list[dict[str, Any]] = []
    results: dict[str, list[dict[str, Any]]] = {}  # of the last calls, by id
    waiting: list[dict[str, Any]] = []  # the last message's calls, each in a turn
    for turn in [*turns, None]:
        if turn is not None and turn["role"] == "tool" and waiting:
            results.setdefault(str(turn.get("tool_call_id")), []).append(turn)
            continue
        for call_turn in waiting:
            found += [call_turn, *results.pop(str(call_turn["tool_calls"][0].get("id")), ())]
        found += [result for others in results.values() for result in others]
        results, waiting = {}, []
        if turn is None or "tool_calls" not in turn:
            found += [] if turn is None else [turn]
            continue
        first, *others = turn["tool_calls"]
        waiting = [
            turn | {"tool_calls": [first]},
            *(_turn("assistant", "") | {"tool_calls": [call]} for call in others),
        ]
    return found


def tools_prompt(tools: Sequence[Mapping[str, Any]]) -> str:
    """A system message that offers tools to a model whose chat template cannot, and asks for calls in the form of Hermes.

    Args:
        tools: as the OpenAI API has them: `{"type": "function", "function": {"name", "description", "parameters"}}`.
    """
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in tools)
    return (
        "You can call functions to help with the user's request. These are the functions, one JSON object per line, with a JSON "
        f"schema of their parameters:\n<tools>\n{functions}\n</tools>\n"
        "To call a function, write its name and its arguments as a JSON object between tags, exactly like this:\n"
        '<tool_call>{"name": "NAME", "arguments": {"PARAMETER": "VALUE"}}</tool_call>\n'
        "Write one such line for each call and nothing after the last; you are then told what the functions returned. If no "
        "function helps, answer without a call."
    )
