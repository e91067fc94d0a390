"""What a client hears that asks for a path or a method which is not there: the way to what it may want."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from fastapi.routing import APIRoute
from starlette.routing import BaseRoute

_SHOWN = 200
"""Characters of a path that a message repeats."""
_LONGEST = 6
"""Pieces of the longest path, and a few more: a known path is looked for in so many last ones."""

_ELSEWHERE = (
    (
        r"(embeddings|rerank|score|pooling|classify)(/.*)?",
        "embeddings and scores are not computed: this server writes text",
    ),
    (
        r"(assistants|threads|vector_stores|conversations)(/.*)?",
        "nothing is kept between requests: send the whole conversation to /v1/chat/completions or /v1/responses",
    ),
    (r"(audio|images|videos|realtime)(/.*)?", "this server reads and writes text only: /v1/chat/completions"),
    (
        r"(files|uploads|batches|fine_tuning|moderations|evals|containers)(/.*)?",
        "files, batches, training and moderation are not offered; for many prompts at once send a list of them as prompt to "
        "/v1/completions",
    ),
    (r"messages/batches(/.*)?", "batches are not offered: send each conversation to /v1/messages"),
    (
        r"(responses/resp_|chat/completions/chatcmpl-).*",
        "no reply is kept: keep what /v1/responses and /v1/chat/completions return",
    ),
    (r"api/(generate|create)|generate(_stream)?|completion", "texts are continued at /v1/completions"),
    (r"api/chat", "conversations are answered at /v1/chat/completions"),
    (r"api/(tags|ps|show|pull)|info", "/v1/models lists the models"),
    (r"api/embed(dings)?", "embeddings are not computed: this server writes text"),
    (r"invocations", "answers are given at /v1/chat/completions and /v1/completions"),
    (r"v1", "clients take this as their base URL, and /v1/models lists the models"),
    (r"redoc", "the fields of all requests are at /docs"),
)
"""Paths of other APIs and servers, without /v1, and what there is instead."""

ADMINISTRATION = frozenset(
    {
        "/sleep",
        "/wake_up",
        "/is_sleeping",
        "/pause",
        "/resume",
        "/is_paused",
        "/reset_prefix_cache",
        "/update_weights_from_disk",
        "/v1/load_lora_adapter",
        "/v1/unload_lora_adapter",
    }
)
"""Paths that are there with enable_admin_endpoints only."""


class Endpoint(NamedTuple):
    """One line of the list of what there is."""

    methods: tuple[str, ...]
    path: str
    summary: str


def endpoints(routes: Sequence[BaseRoute]) -> list[Endpoint]:
    """Those of an application that its OpenAPI document describes."""
    return [
        Endpoint(tuple(sorted(route.methods or ())), route.path.replace(":path", ""), route.summary or "")
        for route in routes
        if isinstance(route, APIRoute) and route.include_in_schema
    ]


def not_found(path: str, known: Collection[str]) -> str:
    """The message of a 404 for a path, where `known` ones are there."""
    if "/" not in known:
        return f"there is nothing at {path[:_SHOWN]}; this port has {', '.join(sorted(known))} only"
    return f"there is nothing at {path[:_SHOWN]}{_way(path, known)} GET / lists what there is."


def methods_of(routes: Sequence[BaseRoute], path: str) -> str:
    """What a path takes, as the header Allow has it."""
    methods = {
        method
        for route in routes
        if isinstance(route, APIRoute) and route.path_regex.match(path)
        for method in route.methods or ()
    }
    return ", ".join(sorted(methods | {"HEAD"} if "GET" in methods else methods))


def not_allowed(path: str, method: str, allowed: str) -> str:
    """The message of a 405. `allowed` is the header Allow."""
    how = ", with what is asked as JSON in the body" if allowed == "POST" and path not in ADMINISTRATION else ""
    return f"{path[:_SHOWN]} takes {allowed}, not {method}{how}"


def _way(path: str, known: Collection[str]) -> str:
    if path in ADMINISTRATION:
        return "; administration is off: start the server with --enable-admin-endpoints to have it."
    pieces = [piece for piece in path[:_SHOWN].split("/") if piece]
    family = "/".join(pieces[next((i for i, piece in enumerate(pieces) if piece != "v1"), 0) :])
    for pattern, sentence in _ELSEWHERE:
        if re.fullmatch(pattern, family):
            return f"; {sentence}."
    for start in range(max(0, len(pieces) - _LONGEST), len(pieces)):  # a base URL that is too long, or lacks /v1
        end = "/".join(pieces[start:])
        for found in (f"/{end}", f"/v1/{end}"):
            if found in known:
                return f"; did you mean {found}?"
    near = difflib.get_close_matches(path[:_SHOWN], sorted(known), n=2)
    return f"; did you mean {' or '.join(near)}?" if near else "."
