"""What goes wrong with a request, in the form OpenAI's clients know."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

import msgspec
from starlette.responses import Response

from stepgraph.errors import USER_ERRORS, EngineDeadError, StepgraphError

logger = logging.getLogger(__name__)

_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
    504: "timeout_error",
}
_CODES = {
    400: "invalid_value",
    401: "invalid_api_key",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
    422: "invalid_type",
    429: "queue_full",
    500: "internal_error",
    503: "unavailable",
    504: "timeout",
}
_SHOWN_NAMES = 20
"""Of models, in a message."""


class APIError(Exception):
    """Ends a request with an HTTP status and the error object of the OpenAI API.

    Args:
        status: HTTP status.
        message: what is wrong, the limit, and what to do.
        param: the field it is about.
        code: a short name for programs; default: by status.
        headers: further headers of the reply.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or _CODES.get(status, "error")
        self.headers = dict(headers or {})

    def body(self) -> bytes:
        """The reply: ``{"error": {"message", "type", "param", "code"}}`` as JSON."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        # what a client sent may hold half a surrogate pair, which is no Unicode text
        text = self.message.encode("utf-8", "replace").decode()
        return msgspec.json.encode({"error": error | {"message": text}})


def error_response(error: APIError) -> Response:
    """An error as a whole reply."""
    return Response(error.body(), error.status, headers=error.headers, media_type="application/json")


def api_error(error: Exception, *, request_id: str, spelled: Callable[[str], str] | None = None) -> APIError:
    """The reply to an exception; what is not the user's to fix becomes a 500 that names the request, whose log has more.

    Args:
        spelled: how the request spells what errors are about, if it is known: `RequestPart.spelled`.
    """
    if isinstance(error, APIError):
        return error
    if isinstance(error, USER_ERRORS):
        message, param = str(error), error.param
        if param is not None and spelled is not None:
            own = spelled(param)
            message, param = own + message[len(param) :] if message.startswith(param) else message, own
        return APIError(400, message, param=param, code=error.code)
    if isinstance(error, EngineDeadError):
        return APIError(503, f"{error} (request {request_id})", headers={"Retry-After": "5"})
    if isinstance(error, StepgraphError):
        return APIError(500, f"{error} (request {request_id})")
    return APIError(500, f"something went wrong inside the server; its log has more about request {request_id}")


def report(error: Exception, request_id: str, spelled: Callable[[str], str] | None = None) -> APIError:
    """`api_error`, and a line in the log if it is the server's fault; with a traceback if nobody foresaw it.

    An APIError has none: the server refuses requests while it loads or ends, and clients may try again many times a second.
    """
    failure = api_error(error, request_id=request_id, spelled=spelled)
    if failure.status >= 500 and not isinstance(error, APIError):
        unforeseen = not isinstance(error, StepgraphError)
        logger.error("request %s: %s", request_id, error, exc_info=error if unforeseen else None)
    return failure


def timed_out(seconds: float) -> APIError:
    """The reply to a request that took longer than the server's limit."""
    return APIError(504, f"the request took longer than request_timeout={seconds:g} s and was ended")


def shortened(names: Sequence[str]) -> str:
    """A list of names for a message."""
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return ", ".join(names[:_SHOWN_NAMES]) + more
