"""The device's queue of work: one thread, which does what was submitted in its order."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor


class Stream:
    """Runs work on a thread, one piece after the other."""

    def __init__(self) -> None:
        threads = torch.get_num_threads()  # a thread begins with as many as the machine has
        self._worker = ThreadPoolExecutor(1, "simulated-accelerator", lambda: torch.set_num_threads(threads))
        self._last: Future[None] | None = None
        self._failure: BaseException | None = None
        self._running = threading.local()

    @property
    def is_own_thread(self) -> bool:
        """Whether the caller is a piece of the stream's work."""
        return getattr(self._running, "inside", False)

    def submit(self, work: Callable[[], object]) -> None:
        """Have the thread do `work` after all that was submitted before."""
        self._last = self._worker.submit(self._run, work)

    def submit_or_run(self, work: Callable[[], object]) -> None:
        """As `submit`; done at once where nothing is under way."""
        if self._last is None or self._last.done():
            work()
        else:
            self.submit(work)

    def mark(self) -> Future[None] | None:
        """What is done when all work submitted so far is; None if there was none."""
        return self._last

    def synchronize(self) -> None:
        """Wait for all submitted work.

        Raises:
            RuntimeError: some of it failed, now or earlier: as with a GPU, what came after it is worth nothing.
        """
        self.wait(self._last)

    def wait(self, mark: Future[None] | None) -> None:
        """Wait for a `mark`; raises as `synchronize`."""
        if mark is not None:
            mark.result()
        if self._failure is not None:
            raise RuntimeError(f"the simulated accelerator failed: {self._failure}") from self._failure

    def _run(self, work: Callable[[], object]) -> None:
        self._running.inside = True
        try:
            work()
        except BaseException as error:
            self._failure = error


STREAM = Stream()
"""Of the one device that there is."""


class Completion:
    """See `stepgraph.platforms.Completion`."""

    def __init__(self) -> None:
        self._mark: Future[None] | None = None

    def record(self) -> None:
        self._mark = STREAM.mark()

    def wait(self) -> None:
        STREAM.wait(self._mark)


class HostBuffer(Tensor):
    """Host memory whose copies to the device take their turn in the stream.

    stepgraph sends everything while steps run from such buffers, by ``target.copy_(buffer, non_blocking=True)``. A device that
    torch knows orders that copy itself; here torch takes the device's memory for the host's, and would copy at once.
    """

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}

        def call() -> Any:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)

        if func is Tensor.copy_ and isinstance(args[1], cls) and not STREAM.is_own_thread:
            STREAM.submit_or_run(call)
            if not kwargs.get("non_blocking"):
                STREAM.synchronize()
            return args[0]
        result = call()
        return result.as_subclass(cls) if func is Tensor.__getitem__ else result
