"""The parts of a GGUF file: metadata values and tensors, each checked to lie within the file before it is taken.

The format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import struct
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from stepgraph.errors import ModelError

_ARRAY, _LENGTH = struct.Struct("<IQ"), struct.Struct("<Q")
"""In a GGUF file: type and count of a list; length of a text."""


@dataclass(frozen=True)
class Texts:
    """Texts that follow each other in a GGUF file: the length of each, then its bytes."""

    file: memoryview
    start: int
    count: int
    nbytes: int  # named as in an array, which gguf takes it for

    @classmethod
    def at(cls, file: memoryview, start: int, count: int) -> Texts:
        """The texts from byte `start` on; struct.error if the file ends in them."""
        end, length_at = start, _LENGTH.unpack_from
        for _ in range(count):
            end += 8 + length_at(file, end)[0]
        if end > len(file):
            raise struct.error("it ends within a text")
        return cls(file, start, count, end - start)

    def read(self) -> list[str]:
        """All texts; UnicodeDecodeError if one is not UTF-8."""
        texts, end, length_at = [], self.start, _LENGTH.unpack_from
        for _ in range(self.count):
            begin = end + _LENGTH.size
            end = begin + length_at(self.file, end)[0]
            texts.append(str(self.file[begin:end], "utf-8"))
        return texts

    def find(self, wanted: Iterable[str]) -> dict[int, str]:
        """Which of some texts are among these, and at which place, in much less time than it takes to read all."""
        stored = bytes(self.file[self.start : self.start + self.nbytes])
        at = {stored.find(_LENGTH.pack(len(text.encode())) + text.encode()): text for text in wanted}
        found, begin, length_at = {}, 0, _LENGTH.unpack_from
        for place in range(self.count if at.keys() - {-1} else 0):
            if begin in at:
                found[place] = at[begin]
                if begin == max(at):
                    break
            begin += 8 + length_at(stored, begin)[0]
        return found


def open_gguf(path: Path) -> Any:
    """Open `path` with gguf's reader, its errors translated to ModelError."""
    try:
        import gguf
    except ImportError as error:
        raise ModelError(f"Reading {path} needs the gguf package: pip install gguf.") from error

    class Reader(gguf.GGUFReader):
        """Reads from a plain view of the mapped file, as slicing a numpy.memmap costs several times as much, and takes a list for
        one part: a vocabulary has a hundred thousand texts and numbers, of which gguf makes an array or two each."""

        @property
        def data(self) -> np.ndarray:
            return self._plain

        @data.setter
        def data(self, mapped: np.memmap) -> None:
            self._plain = mapped.view(np.ndarray)

        def _get(self, offset: int, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
            nbytes = int(count) * np.dtype(dtype).itemsize
            if offset + nbytes > len(self.data):
                raise ValueError(f"{nbytes:,} bytes are said to begin at byte {offset:,}")
            return super()._get(offset, dtype, count, override_order)

        def _get_field_parts(self, orig_offs: int, raw_type: int) -> Any:
            types = gguf.GGUFValueType
            if raw_type != types.ARRAY or self.byte_order != "I" or sys.byteorder != "little":
                return super()._get_field_parts(orig_offs, raw_type)
            kind, count = _ARRAY.unpack(self.data[orig_offs : orig_offs + _ARRAY.size].tobytes())
            start = orig_offs + _ARRAY.size
            if kind == types.STRING:
                texts = Texts.at(self.data.data, start, count)
                return _ARRAY.size + texts.nbytes, [texts], [], [types.ARRAY, types.STRING]
            if kind in self.gguf_scalar_to_np:
                values = self._get(start, self.gguf_scalar_to_np[kind], count)
                return _ARRAY.size + values.nbytes, [values], [0], [types.ARRAY, types(kind)]
            return super()._get_field_parts(orig_offs, raw_type)

    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise ModelError(f"{path} is not a GGUF file: it does not begin with the letters GGUF.")
    try:
        return Reader(path)
    except (ValueError, IndexError, KeyError, OverflowError, RecursionError, struct.error) as error:
        raise ModelError(
            f"{path} ({path.stat().st_size:,} bytes) cannot be read as GGUF: {error}. "
            "It may be truncated; download it again."
        ) from error
