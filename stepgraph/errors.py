"""Every error stepgraph raises on purpose.

`ConfigError` and `RequestError` are the user's to fix and name the bad value, the limit and the fix. `CaptureError`
is a bug in a step program (or a model put into one): something in it depends on the batch.
"""

from __future__ import annotations

from typing import NamedTuple


class StepgraphError(Exception):
    """Base of all errors raised by stepgraph.

    Args:
        message: for people: what is wrong, the limit, and what to do.
        param: the field or setting it is about, and the place in it: `temperature`, `messages[0].role`. A message that begins
            with it begins with these very letters.
        code: a short name of what is wrong, where programs are to tell it from other errors of the same kind.
    """

    def __init__(self, message: str = "", *, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.param = param
        self.code = code


class ConfigError(StepgraphError, ValueError):
    """A setting is unusable: which one, its value, the limit, and what to set instead."""


class DeviceMemoryError(ConfigError):
    """The device's memory does not suffice for what the settings ask for, now: others may use it, too."""


class ModelError(StepgraphError):
    """A model cannot be found, read or run: what, why, and what to do."""


class RequestError(StepgraphError, ValueError):
    """One request is unusable and was refused before it touched the engine."""


class CaptureError(StepgraphError):
    """A step program cannot be captured because something in it depends on the batch."""


class EngineDeadError(StepgraphError):
    """The engine stopped on an earlier error and accepts no more work."""


CONTEXT_LENGTH_EXCEEDED = "context_length_exceeded"
"""The code of errors about prompts and answers that are too long for the context. Clients shorten the conversation on it."""
USER_ERRORS = (RequestError, ConfigError, ModelError)
"""Those that the user can mend."""


class Fault(NamedTuple):
    """What went wrong, as it is kept and told to other processes: an exception would hold all that its frames know."""

    message: str
    is_users: bool
    """It is about what was asked for, and would come again; else it is a fault of ours."""
    param: str | None = None
    code: str | None = None
    """See `StepgraphError`."""

    @classmethod
    def of(cls, error: BaseException) -> Fault:
        """What an exception says."""
        message, is_users = str(error) or repr(error), isinstance(error, USER_ERRORS)
        if isinstance(error, StepgraphError):
            return cls(message, is_users, error.param, error.code)
        return cls(message, is_users)

    def error(self, preface: str = "") -> StepgraphError:
        """An exception that says so, after a `preface`."""
        kind = RequestError if self.is_users else StepgraphError
        return kind(preface + self.message, param=self.param, code=self.code)
