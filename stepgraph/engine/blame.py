"""Failures that are about one request."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from stepgraph.engine.request import Request
from stepgraph.errors import EngineDeadError, Fault

logger = logging.getLogger(__name__)


@contextmanager
def blaming(request: Request) -> Iterator[None]:
    """What fails inside is about one request: note it as its `error`, for the others do not suffer from it."""
    try:
        yield
    except EngineDeadError:
        raise
    except Exception as error:
        request.error = Fault.of(error)
        if not request.error.is_users:
            logger.exception("request %s failed", request.id)
