"""What goes wrong with a request of /v1/messages, in the form Anthropic's clients know."""

from __future__ import annotations

import re

import msgspec
from starlette.responses import Response
from starlette.types import Scope

from stepgraph.errors import CONTEXT_LENGTH_EXCEEDED
from stepgraph.server.errors import APIError, error_response

_PATH = re.compile(r"/v1/messages(/|$)")
_STATUSES = {422: 400, 503: 529}
"""What Anthropic's API answers in place of ours, where its own differ."""
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def is_anthropics(path: str) -> bool:
    """Whether clients of a path are Anthropic's."""
    return _PATH.search(path) is not None


def error_content(error: APIError, request_id: str) -> bytes:
    """``{"type": "error", "error": {"type", "message", "details": {"error_code", "param"}}, "request_id"}`` as JSON."""
    status = _STATUSES.get(error.status, error.status)
    kind = _TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")
    # clients that shorten their conversation then look for these words
    message = f"prompt is too long: {error.message}" if error.code == CONTEXT_LENGTH_EXCEEDED else error.message
    return msgspec.json.encode({
        "type": "error",
        "error": {
            "type": kind,
            "message": _sendable(message),
            "details": {"error_code": error.code, "param": None if error.param is None else _sendable(error.param)},
        },
        "request_id": request_id,
    })  # fmt: skip


def _sendable(text: str) -> str:
    """A text without the halves of surrogate pairs that a client may have sent, which are no Unicode text."""
    return text.encode("utf-8", "replace").decode()


def error_reply(error: APIError, scope: Scope) -> Response:
    """An error as a whole reply, in the form that clients of its path know."""
    if not is_anthropics(scope["path"]):
        return error_response(error)
    return Response(
        error_content(error, scope["state"]["request_id"]),
        _STATUSES.get(error.status, error.status),
        headers=error.headers,
        media_type="application/json",
    )
