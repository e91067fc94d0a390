import pytest
from tokenizers import pre_tokenizers

from stepgraph.engine.token_bytes import token_bytes


@pytest.mark.parametrize("data", [bytes([byte]) for byte in range(256)] + [b"\xe2\x82", b" \xf0\x9f"])
def test_bytes_that_are_no_character_are_found_in_a_byte_level_token(data) -> None:
    alphabet = dict(zip(range(256), _alphabet_by_byte(), strict=True))
    token = "".join(alphabet[byte] for byte in data)
    assert token_bytes(token, data.decode(errors="replace")) == data


def test_a_byte_of_a_sentencepiece_vocabulary_is_itself() -> None:
    assert token_bytes("<0xE2>", "\ufffd") == b"\xe2"


def test_a_token_of_whole_characters_is_its_text() -> None:
    assert token_bytes("▁é", " é") == " é".encode()


def _alphabet_by_byte() -> list[str]:
    """The characters of the tokenizers library's byte-level alphabet, by the byte each stands for."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    by_byte = {}
    for number in [
        *range(128),
        *range(0x80, 0x800),
        0xFFFF,
        *range(0x1000, 0x11000, 0x1000),
        *range(0x10000, 0x110000, 0x10000),
    ]:
        character = chr(number)
        if 0xD800 <= number < 0xE000:
            continue
        [(spelled, _)] = split.pre_tokenize_str(character)
        by_byte |= dict(zip(character.encode(), spelled, strict=True))
    spare = iter(sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set(by_byte.values())))
    return [by_byte[byte] if byte in by_byte else next(spare) for byte in range(256)]
