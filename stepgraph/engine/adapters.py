"""Which LoRA adapters lie in the device's memory, and who makes room."""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Collection
from dataclasses import dataclass

from stepgraph.errors import RequestError
from stepgraph.models.adapters import AdapterFile


@dataclass(frozen=True)
class Adapter:
    """An adapter in the device's memory."""

    number: int  # for the slot's line; from 1 on
    key: str
    """Random, and another one whenever a folder is read again: it keeps remembered answers apart, and no user can guess it to
    read those of others."""
    digest: bytes
    """Of its files, see `AdapterFile.digest`: it keeps cached prefixes apart, here and in engines that take them over."""
    name: str = ""
    """For people and routers: the last part of its folder."""


class AdapterTable:
    """The adapters in the device's memory. Driven by the engine's thread, but for `read`.

    Args:
        read: reads the adapter in a folder into host memory, in any thread.
        write: puts it into the device's memory, under a number.
        max_loras: how many there is memory for.
    """

    def __init__(
        self, read: Callable[[str], AdapterFile], write: Callable[[int, AdapterFile], None], max_loras: int
    ) -> None:
        self.read = read
        self._write = write
        self._max_loras = max_loras
        self._adapters: dict[str, Adapter] = {}  # by their folders, least recently asked for first

    @property
    def folders(self) -> tuple[str, ...]:
        """Those of adapters that are in memory, and are found there."""
        return tuple(folder for folder, adapter in self._adapters.items() if folder != adapter.key)

    def holds(self, folder: str) -> bool:
        """Whether an adapter is in memory. Looks at no file: the drive may not answer."""
        return os.path.abspath(folder) in self._adapters

    def load(self, source: str | AdapterFile, in_use: Collection[Adapter]) -> Adapter:
        """Bring an adapter into the device's memory, unless it is there, in place of the one that was asked for least recently.

        Args:
            source: what `read` found, or the folder, which is then read here if it is not in memory.
            in_use: those that unfinished requests use. They stay.

        Raises:
            RequestError: the folder is not an adapter that this model can run, or `max_loras` others are in use.
        """
        folder = os.path.abspath(source) if isinstance(source, str) else source.folder
        adapter = self._adapters.pop(folder, None)
        if adapter is None:
            file = self.read(source) if isinstance(source, str) else source
            adapter = Adapter(self._free_number(in_use), secrets.token_hex(16), file.digest, os.path.basename(folder))
            self._keep_without_folder(adapter)  # until it is written
            self._write(adapter.number, file)
            del self._adapters[adapter.key]
        self._adapters[folder] = adapter
        return adapter

    def forget(self, folder: str) -> None:
        """Do not find a folder's adapter any more. Requests that use it keep it, and its place is the next to be taken."""
        adapter = self._adapters.pop(os.path.abspath(folder), None)
        if adapter is not None:
            self._keep_without_folder(adapter)

    def _keep_without_folder(self, adapter: Adapter) -> None:
        """Leave an adapter its number, though it is found for no folder; it is the next to make room."""
        self._adapters = {adapter.key: adapter, **self._adapters}  # no folder has that name

    def _free_number(self, in_use: Collection[Adapter]) -> int:
        if len(self._adapters) < self._max_loras:
            return len(self._adapters) + 1
        unused = next((folder for folder, adapter in self._adapters.items() if adapter not in in_use), None)
        if unused is None:
            raise RequestError(
                f"unfinished requests use {self._max_loras} LoRA adapters, as many as max_loras={self._max_loras} keeps; wait "
                "until the requests of one have ended, or start the engine with a larger max_loras",
                param="adapter",
            )
        return self._adapters.pop(unused).number
