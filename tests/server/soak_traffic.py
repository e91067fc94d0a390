"""Requests of every kind that the server answers, by number: what is asked, what may come back, and who leaves before it does."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import re
import subprocess
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import jsonschema
from json_schemas import REGEXES, check, random_schema
from published import ReplyCheck

MODEL = "tiny"
TOOL_NAMES = ("look_up", "add")
KINDS = (
    *("plain", "several", "logprobs", "penalties", "filters", "stops", "echo", "regex", "choice", "schema"),
    *("chat", "chat schema", "chat logprobs", "forced tool", "required tool", "offered tool"),
    *("response", "response schema", "response tool", "object"),
)
TOOL_KINDS = frozenset(kind for kind in KINDS if kind.endswith("tool"))
"""Those that offer tools, which takes a context of more than 1,000 tokens if each is a byte."""
REASONS = ("stop", "length", "tool_calls")


@dataclass
class Choice:
    """One answer to a request."""

    text: str = ""
    calls: dict[int, list[str]] = field(default_factory=dict)
    """Name and arguments of tool calls."""
    reason: str | None = None


@dataclass
class Reply:
    """Of one request; `choices` by index."""

    status: int
    choices: dict[int, Choice] = field(default_factory=dict)
    error: str = ""


def kind_of(number: int) -> str:
    return KINDS[number % len(KINDS)]


def leaves_after(number: int) -> int | None:
    """Pieces of its answer after which the client of a request goes, 0 before there is any; None if it stays."""
    return random.Random(number).randrange(4) if number % 3 == 0 else None


def body_of(number: int) -> tuple[str, dict[str, Any]]:
    """Path and body, the same for the same number. It decides schemas, tools, regexes, lengths and sampling."""
    kind, rng = kind_of(number), random.Random(number)
    body: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": rng.choice((1, 8, 24, 48)),
        "temperature": rng.choice((0, 0, 0.7, 1.2)),
        "seed": number,
        "stream": number % 4 != 1,
    }
    message = "".join(rng.choice("abcdefgh äé🙂") for _ in range(rng.choice((1, 12, 60))))
    if kind.startswith("response"):
        return "/v1/responses", body | _response_fields(kind, message, rng)
    if kind.startswith("chat") or kind in TOOL_KINDS or kind == "object":
        turns = [{"role": "user", "content": message}]
        if rng.random() < 0.5:
            turns = [{"role": "system", "content": "Be brief."}, *turns, {"role": "assistant", "content": "a"}, *turns]
        return "/v1/chat/completions", body | {"messages": turns} | _chat_fields(kind, rng)
    prompt = [rng.randrange(1, 257) for _ in range(rng.choice((1, 5, 30, 120)))]
    return "/v1/completions", body | {"prompt": prompt} | _completion_fields(kind, rng)


def fault(number: int, reply: Reply) -> str | None:
    """What is wrong with a reply; None if nothing is."""
    kind, (_, body) = kind_of(number), body_of(number)
    if reply.status != 200 or reply.error:
        return f"{reply.status} {reply.error}"
    if sorted(reply.choices) != list(range(body.get("n", 1))):
        return f"choices {sorted(reply.choices)} instead of {body.get('n', 1)}"
    for choice in reply.choices.values():
        if choice.reason not in REASONS:
            return f"it ended by {choice.reason!r}"
        if choice.reason != "length" and (wrong := _broken_promise(kind, body, choice)):
            return wrong
    return None


async def ask(http: aiohttp.ClientSession, url: str, number: int, *, leaves: int | None) -> Reply | None:
    """Send a request; None if it was left after so many pieces of its answer."""
    path, body = body_of(number)
    if leaves is not None:
        body["stream"] = True
    if leaves == 0:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.02), http.post(url + path, json=body):
                pass
        return None
    async with http.post(url + path, json=body) as response:
        reply = Reply(response.status)
        check = ReplyCheck(path, response.status, response.headers["Content-Type"])
        if not body["stream"] or response.status != 200:
            check.feed(await response.read())
            check.end()
            content = await response.json()
            if response.status != 200:
                reply.error = str(content.get("error"))
            elif path == "/v1/responses":
                _take_response(reply, content)
            else:
                for choice in content["choices"]:
                    _take_choice(reply, choice, choice.get("message") or {"content": choice.get("text")})
            return reply
        count = 0
        async for event in _events(response, check):
            if event.get("error"):
                reply.error = str(event["error"])
            elif event.get("type") in ("response.completed", "response.incomplete", "response.failed"):
                _take_response(reply, event["response"])
            for choice in event.get("choices", ()):
                _take_choice(reply, choice, choice.get("delta") or {"content": choice.get("text")})
            count += 1
            if leaves is not None and count >= leaves:
                return None
        check.end()
        return reply


def rss_mib(pid: int) -> float:
    """Memory of a process."""
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) / 1024  # type: ignore[index]


def children_mib(pid: int) -> float:
    """Memory of the processes that a process has started, and they, in turn; what they share is counted once."""
    total, parents = 0.0, [pid]
    while parents:
        listed = subprocess.run(["ps", "--ppid", str(parents.pop()), "-o", "pid="], capture_output=True, text=True)
        for child in map(int, listed.stdout.split()):
            parents.append(child)
            with contextlib.suppress(OSError, TypeError):  # it has ended
                rollup = Path(f"/proc/{child}/smaps_rollup").read_text()
                total += int(re.search(r"\nPss:\s+(\d+)", rollup)[1]) / 1024  # type: ignore[index]
    return total


def _completion_fields(kind: str, rng: random.Random) -> dict[str, Any]:
    if kind == "regex":
        return {"structured_outputs": {"regex": rng.choice(REGEXES)}}
    if kind == "choice":
        return {"structured_outputs": {"choice": [f"{word}{rng.randrange(99)}" for word in ("yes", "no", "maybe")]}}
    if kind == "schema":
        return {"structured_outputs": {"json": random_schema(rng)}}
    return {
        "plain": {},
        "several": {"n": 3, "best_of": 3},
        "logprobs": {"logprobs": 3, "logit_bias": {str(rng.randrange(257)): 5.0}},
        "penalties": {"presence_penalty": 0.5, "frequency_penalty": 0.3, "repetition_penalty": 1.2, "min_tokens": 1},
        "filters": {"top_k": 20, "top_p": 0.9, "min_p": 0.01},
        "stops": {"stop": ["\n", "ab", chr(rng.randrange(97, 123))], "include_stop_str_in_output": rng.random() < 0.5},
        "echo": {"echo": True, "logprobs": 1},
    }[kind]


def _chat_fields(kind: str, rng: random.Random) -> dict[str, Any]:
    tools = [
        {"type": "function", "function": {"name": name, "parameters": _parameters(rng)}} for name in TOOL_NAMES[:1]
    ]
    return {
        "chat": lambda: {"n": rng.choice((1, 2)), "stop": "é", "stream_options": {"include_usage": True}},
        "chat logprobs": lambda: {"logprobs": True, "top_logprobs": 4},
        "chat schema": lambda: {"response_format": _json_format(rng)},
        "object": lambda: {"response_format": {"type": "json_object"}},
        "forced tool": lambda: {
            "tools": tools,
            "tool_choice": {"type": "function", "function": {"name": tools[0]["function"]["name"]}},
        },
        "required tool": lambda: {"tools": tools, "tool_choice": "required"},
        "offered tool": lambda: {"tools": tools},
    }[kind]()


def _response_fields(kind: str, message: str, rng: random.Random) -> dict[str, Any]:
    fields: dict[str, Any] = {"input": message, "max_output_tokens": rng.choice((16, 40))}
    if kind == "response schema":
        fields["text"] = {"format": {"type": "json_schema", "name": "answer", "schema": random_schema(rng)}}
    elif kind == "response tool":
        fields["tools"] = [{"type": "function", "name": TOOL_NAMES[0], "parameters": _parameters(rng)}]
        fields["tool_choice"] = "required"
    return fields


def _parameters(rng: random.Random) -> dict[str, Any]:
    kind = rng.choice(({"type": "integer"}, {"type": "boolean"}, {"enum": ["x", rng.randrange(99)]}))
    name = f"v{rng.randrange(50)}"
    return {"type": "object", "properties": {name: kind}, "required": [name], "additionalProperties": False}


def _json_format(rng: random.Random) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": random_schema(rng)}}


def _broken_promise(kind: str, body: dict[str, Any], choice: Choice) -> str | None:
    """How an answer that came to its end is not what was asked for."""
    guide = body.get("structured_outputs", {})
    if "regex" in guide:
        return None if re.fullmatch(guide["regex"], choice.text) else f"{choice.text!r} is not {guide['regex']}"
    if "choice" in guide:
        return None if choice.text in guide["choice"] else f"{choice.text!r} is none of {guide['choice']}"
    schemas = {
        "schema": lambda: guide["json"],
        "chat schema": lambda: body["response_format"]["json_schema"]["schema"],
        "response schema": lambda: body["text"]["format"]["schema"],
        "object": lambda: {"type": "object"},
    }
    try:
        if kind in schemas:
            check(json.loads(choice.text), schemas[kind]())
        if kind in ("forced tool", "required tool", "response tool"):
            parameters = {
                tool["name"]: tool["parameters"] for tool in (tool.get("function", tool) for tool in body["tools"])
            }
            assert choice.calls, "no call"
            for name, arguments in choice.calls.values():
                check(json.loads(arguments), parameters[name])
    except (AssertionError, KeyError, ValueError, jsonschema.ValidationError) as error:
        return f"{type(error).__name__} {str(error)[:200]} of {choice}"
    return None


def _take_choice(reply: Reply, choice: dict[str, Any], message: dict[str, Any]) -> None:
    found = reply.choices.setdefault(choice["index"], Choice())
    found.text += message.get("content") or ""
    for position, call in enumerate(message.get("tool_calls") or ()):
        entry = found.calls.setdefault(call.get("index", position), ["", ""])
        entry[0] += call["function"].get("name") or ""
        entry[1] += call["function"].get("arguments") or ""
    found.reason = choice.get("finish_reason") or found.reason


def _take_response(reply: Reply, response: dict[str, Any]) -> None:
    reason = {"completed": "stop", "incomplete": "length"}.get(response["status"])
    choice = reply.choices[0] = Choice(reason=reason)
    for position, item in enumerate(response["output"]):
        if item["type"] == "function_call":
            choice.calls[position] = [item["name"], item["arguments"]]
        elif item["type"] == "message":
            choice.text += "".join(part["text"] for part in item["content"])


async def _events(response: aiohttp.ClientResponse, check: ReplyCheck) -> AsyncIterator[dict[str, Any]]:
    """The JSON of a stream's events, but for its end mark."""
    async for line in response.content:
        check.feed(line)
        if line.startswith(b"data: ") and line.strip() != b"data: [DONE]":
            yield json.loads(line.removeprefix(b"data: "))
