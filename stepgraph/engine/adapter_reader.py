"""Reading LoRA adapters beside the engine's thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

from stepgraph.models.adapters import AdapterFile


class AdapterReader:
    """Reads adapters into host memory, each in a thread of its own: a drive that does not answer holds up those who wait for what
    lies on it, and nobody else. Any thread may ask.

    Args:
        read: reads the adapter in a folder.
    """

    def __init__(self, read: Callable[[str], AdapterFile]):
        self._read = read
        self._under_way: dict[str, Future[AdapterFile]] = {}
        self._lock = threading.Lock()

    def ask(self, folder: str, *, anew: bool = False) -> Future[AdapterFile]:
        """What the folder holds, in a while; those who ask meanwhile get the same, unless `anew`: the folder may have changed."""
        with self._lock:
            future = self._under_way.get(folder)
            if future is None or anew:
                future = self._under_way[folder] = Future()
                future.set_running_or_notify_cancel()  # who leaves cannot cancel it for the others
                thread = threading.Thread(
                    target=self._run, args=(folder, future), name="stepgraph-adapter", daemon=True
                )
                thread.start()
            return future

    def _run(self, folder: str, future: Future[AdapterFile]) -> None:
        try:
            found = self._read(folder)
        except BaseException as error:
            self._forget(folder, future)
            future.set_exception(error)
        else:
            self._forget(folder, future)
            future.set_result(found)

    def _forget(self, folder: str, future: Future[AdapterFile]) -> None:
        with self._lock:
            if self._under_way.get(folder) is future:
                del self._under_way[folder]
