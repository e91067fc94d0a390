"""What is asked of another process, and waits for its answer."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from itertools import count
from typing import Any, Generic, TypeVar

from stepgraph.errors import EngineDeadError

Q = TypeVar("Q")


class Questions(Generic[Q]):
    """Those under way. Belongs to one event loop.

    Args:
        send: a question to the process; never waits.
        whom: the process, in messages.
    """

    def __init__(self, send: Callable[[Q], None], whom: str = "the engine"):
        self._send = send
        self._whom = whom
        self._waiting: dict[int, asyncio.Future[Any]] = {}
        self._numbers = count()

    def tell(self, question: Callable[[int], Q]) -> int:
        """Ask without waiting for the answer; returns the question's number. `question` makes it of that."""
        number = next(self._numbers)
        self._send(question(number))
        return number

    async def ask(self, question: Callable[[int], Q], timeout_s: float | None) -> Any:
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
            raise EngineDeadError(f"{self._whom} has not answered for {timeout_s:g} s; ask again later") from error
        finally:
            self._waiting.pop(number, None)

    def answer(self, number: int, content: Any) -> None:
        """The answer to a question has come."""
        waiting = self._waiting.get(number)
        if waiting is not None and not waiting.done():
            waiting.set_result(content)

    def decline(self, number: int, error: Exception) -> None:
        """What a question asks for cannot be done."""
        waiting = self._waiting.get(number)
        if waiting is not None and not waiting.done():
            waiting.set_exception(error)

    def fail(self, error: EngineDeadError) -> None:
        """No more answers will come to what was asked."""
        for waiting in self._waiting.values():
            if not waiting.done():
                waiting.set_exception(error)
