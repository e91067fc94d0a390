"""What is asked of the engine's process, and waits for its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import count
from typing import Any

from stepgraph.errors import EngineDeadError
from stepgraph.server.messages import Answer, Declined, Question


class Questions:
    """Those under way. Belongs to one event loop.

    Args:
        send: to the engine's process; never waits.
    """

    def __init__(self, send: Callable[[Question], None]):
        self._send = send
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._numbers = count()

    def tell(self, question: Callable[[int], Question]) -> int:
        """Ask without waiting for the answer; returns the question's number. `question` makes it of that."""
        number = next(self._numbers)
        self._send(question(number))
        return number

    async def ask(self, question: Callable[[int], Question], timeout_s: float | None) -> Any:
        """The answer. With a process that is watched for hanging, no limit means that it answers or ends.

        Raises:
            RequestError: the engine declines, for what the user can mend.
            StepgraphError: it fails.
            EngineDeadError: it died, or took longer than `timeout_s`.
        """
        number = self.tell(question)
        answer = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout_s):
                return await answer
        except TimeoutError as error:
            raise EngineDeadError(f"the engine has not answered for {timeout_s:g} s; ask again later") from error
        finally:
            self._waiting.pop(number, None)

    def take(self, message: Answer | Declined) -> None:
        """An answer has come."""
        waiting = self._waiting.get(message.number)
        if waiting is None or waiting.done():
            return
        if isinstance(message, Answer):
            waiting.set_result(message.content)
        else:
            waiting.set_exception(message.error.error())

    def fail(self, error: EngineDeadError) -> None:
        """No more answers will come to what was asked."""
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(error)
