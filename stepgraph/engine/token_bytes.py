"""The bytes of single tokens, some of which are no whole characters."""

from __future__ import annotations

import re
from functools import cache


def token_bytes(token: str, text: str) -> bytes:
    """What a token adds to the text.

    Args:
        token: as the vocabulary spells it.
        text: the token decoded by itself, with U+FFFD for what is no character.
    """
    if "\ufffd" not in text:
        return text.encode("utf-8", "replace")
    if fallback := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):  # sentencepiece
        return bytes.fromhex(fallback[1])
    alphabet = _byte_level_alphabet()
    if all(character in alphabet for character in token):
        return bytes(alphabet[character] for character in token)
    return text.encode()


@cache
def _byte_level_alphabet() -> dict[str, int]:
    """GPT-2's: bytes that print stand for themselves, the others for the characters from U+0100 on, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + index): byte for index, byte in enumerate(others)}
