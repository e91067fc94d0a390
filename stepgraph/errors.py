"""Every error stepgraph raises on purpose.

`ConfigError` and `RequestError` are the user's to fix and name the bad value, the limit and the fix. `CaptureError`
is a bug in a step program (or a model put into one): something in it depends on the batch.
"""


class StepgraphError(Exception):
    """Base of all errors raised by stepgraph."""


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
