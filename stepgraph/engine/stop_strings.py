"""Finding stop strings in a text that grows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class StopMatch(NamedTuple):
    """A stop string in a text: text[start:end]."""

    string: str
    start: int
    end: int


class StopStrings:
    """Finds the first of several strings to be complete in a text, character by character; of those that are complete with
    the same character, the longest. What it finds does not depend on the pieces in which the text arrives.

    Each string is matched as Knuth, Morris and Pratt do it ("Fast pattern matching in strings", 1977).
    """

    def __init__(self, strings: Sequence[str]):
        self._strings = sorted(strings, key=len, reverse=True)
        self._borders = [_borders(string) for string in self._strings]
        self._matched = [0] * len(self._strings)  # of each, how many characters end the text so far
        self._length = 0

    def feed(self, text: str, *, may_stop: bool) -> StopMatch | None:
        """Take in more text. Returns the match that its first characters complete, if `may_stop`."""
        for character in text:
            self._length += 1
            match = None
            for i, (string, borders) in enumerate(zip(self._strings, self._borders, strict=True)):
                matched = self._matched[i]
                while matched and string[matched] != character:
                    matched = borders[matched - 1]
                matched += string[matched] == character
                if matched == len(string):
                    match = match or StopMatch(string, self._length - len(string), self._length)
                    matched = borders[-1]
                self._matched[i] = matched
            if match is not None and may_stop:
                return match
        return None

    @property
    def num_pending(self) -> int:
        """Characters at the text's end with which a stop string may begin."""
        return max(self._matched)


def _borders(string: str) -> list[int]:
    """For each prefix: the length of its longest proper prefix that is also its suffix."""
    borders = [0] * len(string)
    matched = 0
    for i in range(1, len(string)):
        while matched and string[matched] != string[i]:
            matched = borders[matched - 1]
        matched += string[matched] == string[i]
        borders[i] = matched
    return borders
