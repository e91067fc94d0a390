"""An answer that is printed while it grows."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepgraph.engine.outputs import RequestOutput

logger = logging.getLogger(__name__)


@dataclass
class PrintedAnswer:
    """An answer as it is printed."""

    text: str = ""
    finish_reason: str | None = None
    error: str | None = None
    num_tokens: int = 0
    _output: RequestOutput | None = None
    _started_at: float = 0.0
    _first_at: float = 0.0

    def __post_init__(self) -> None:
        self._started_at = time.perf_counter()

    def show(self, output: RequestOutput) -> None:
        """Print what has come."""
        if self._output is None:
            self._first_at = time.perf_counter()
        [answer] = output.outputs
        print(answer.text[len(self.text) :], end="", flush=True)
        self.text, self.finish_reason, self.error = answer.text, answer.finish_reason, answer.error
        self.num_tokens, self._output = len(answer.token_ids), output

    def end_line(self) -> None:
        """Have what is printed next begin a line."""
        if self._output is not None:
            print(flush=True)

    def log_speed(self) -> None:
        """With -v."""
        if self._output is None:
            return
        now = time.perf_counter()
        first_s, rest_s = self._first_at - self._started_at, now - self._first_at
        logger.info(
            "%d tokens after a prompt of %d, of which %d were cached; the first after %.3f s%s",
            self.num_tokens,
            len(self._output.prompt_token_ids),
            self._output.num_cached_tokens,
            first_s,
            f", the others at {(self.num_tokens - 1) / rest_s:.1f} tokens/s" if self.num_tokens > 1 and rest_s else "",
        )
