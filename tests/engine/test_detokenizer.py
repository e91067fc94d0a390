"""Text grows by whole characters only, and ends as the tokenizer would have decoded it at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_tokenizers import create_byte_fallback_tokenizer, create_byte_tokenizer, create_piece_tokenizer

from stepgraph.engine.detokenizer import Detokenizer

TEXTS = [
    "Hello, world!",
    "naïve café Ångström",
    "日本語のテキスト",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽 🤷",
    "e\u0301 \u200b\ufeff",
    "  two  spaces \n\n",
    "\ufffd",
]


BYTES = create_byte_tokenizer()
FALLBACK = create_byte_fallback_tokenizer()


def fallback_ids(*parts: str | bytes) -> list[int]:
    """Token ids of pieces of text, and of single bytes."""
    names = [
        name for part in parts for name in ([part] if isinstance(part, str) else [f"<0x{byte:02X}>" for byte in part])
    ]
    ids = FALLBACK.convert_tokens_to_ids(names)
    assert FALLBACK.convert_tokens_to_ids("<unk>") not in ids
    return ids


def pieces(tokenizer, token_ids, skip_special_tokens: bool = True) -> list[str]:
    """What each token adds, and what the end adds."""
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=skip_special_tokens)
    added = [detokenizer.append([token_id]) for token_id in token_ids] + [detokenizer.finish()]
    assert detokenizer.text == "".join(added)
    return added


@pytest.mark.parametrize("text", TEXTS)
def test_a_character_spread_over_tokens_appears_whole_with_the_last_of_them(text) -> None:
    token_ids = BYTES.encode(text)
    assert len(token_ids) == len(text.encode())
    added = pieces(BYTES, token_ids)
    assert "".join(added) == text
    if "\ufffd" not in text:
        assert [piece for piece in added if piece] == list(text)


@given(st.lists(st.one_of(st.text(max_size=4), st.integers(0, 256)), max_size=30))
def test_any_tokens_end_as_the_tokenizer_decodes_them_at_once(parts) -> None:
    """Pieces of text and single bytes of which some never complete a character."""
    token_ids = [i for part in parts for i in (BYTES.encode(part) if isinstance(part, str) else [part])]
    for skip in (True, False):
        assert "".join(pieces(BYTES, token_ids, skip)) == BYTES.decode(token_ids, skip_special_tokens=skip)


@given(st.text(max_size=12), st.data())
def test_text_of_valid_characters_never_shows_a_half_one_however_it_arrives(text, data) -> None:
    text = text.replace("\ufffd", "")
    token_ids = BYTES.encode(text)
    detokenizer = Detokenizer(BYTES, skip_special_tokens=True)
    while token_ids:
        count = data.draw(st.integers(1, 4))
        detokenizer.append(token_ids[:count])
        token_ids = token_ids[count:]
        assert text.startswith(detokenizer.text)
    detokenizer.finish()
    assert detokenizer.text == text


def test_bytes_that_never_complete_a_character_appear_when_the_answer_ends() -> None:
    token_ids = BYTES.encode("ab€")[:-1]
    assert pieces(BYTES, token_ids) == ["a", "b", "", "", "\ufffd"]


def test_special_tokens_are_left_out_or_kept_as_asked() -> None:
    token_ids = [*BYTES.encode("ab"), BYTES.eos_token_id]
    assert "".join(pieces(BYTES, token_ids, skip_special_tokens=True)) == "ab"
    assert "".join(pieces(BYTES, token_ids, skip_special_tokens=False)) == "ab<end>"


@pytest.mark.parametrize("text", TEXTS)
def test_the_embedded_models_tokenizer_streams_to_the_same_text(smollm2, text) -> None:
    tokenizer = smollm2.tokenizer()
    token_ids = tokenizer.encode(text)
    added = pieces(tokenizer, token_ids)
    assert "".join(added) == tokenizer.decode(token_ids) == text
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in added)


CHARACTERS = st.sampled_from(["▁a", "b", "▁", "</s>", "é".encode(), "語".encode(), "👍".encode(), b"a"])


@given(st.lists(CHARACTERS, max_size=12), st.booleans())
def test_bytes_of_a_sentencepiece_tokenizer_appear_as_whole_characters(parts, skip) -> None:
    token_ids = fallback_ids(*parts)
    added = pieces(FALLBACK, token_ids, skip)
    assert "".join(added) == FALLBACK.decode(token_ids, skip_special_tokens=skip)
    assert not any("\ufffd" in piece for piece in added)


@given(st.lists(st.one_of(CHARACTERS, st.binary(min_size=1, max_size=2)), max_size=12))
def test_invalid_bytes_of_a_sentencepiece_tokenizer_take_nothing_back(parts) -> None:
    """Decoded at once, an invalid byte makes U+FFFD of all bytes beside it."""
    detokenizer = Detokenizer(FALLBACK, skip_special_tokens=True)
    for token_id in fallback_ids(*parts):
        before = detokenizer.text
        assert detokenizer.append([token_id]) == detokenizer.text[len(before) :]
        assert detokenizer.text.startswith(before)
    detokenizer.finish()
    for part in parts:
        if isinstance(part, str) and part not in ("▁", "</s>"):
            assert part.strip("▁") in detokenizer.text


def test_whole_characters_before_an_invalid_byte_stay_and_those_after_it_appear() -> None:
    token_ids = fallback_ids("語".encode(), "語".encode(), b"\xff", "a")
    assert FALLBACK.decode(token_ids) == "\ufffd" * 7 + "a"
    assert [piece for piece in pieces(FALLBACK, token_ids) if piece] == ["語", "語", "\ufffda"]


@pytest.mark.parametrize(("tokenizer", "letter"), [(BYTES, "a"), (FALLBACK, "▁a")])
def test_skipped_and_unknown_tokens_change_nothing_about_their_neighbours(tokenizer, letter) -> None:
    one = tokenizer.convert_tokens_to_ids(letter)
    special, unknown = tokenizer.eos_token_id, 10**6
    for between in (special, unknown):
        assert "".join(pieces(tokenizer, [one, between, one])) == tokenizer.decode([one, one])
        assert "".join(pieces(tokenizer, [between, one])) == tokenizer.decode([one])


def test_a_text_before_half_a_character_in_the_same_token_appears_at_once() -> None:
    tokenizer = create_piece_tokenizer([b" \xe2", b"\x82", b"\xac"])
    assert pieces(tokenizer, [0, 1, 2]) == [" ", "", "€", ""]


def test_tokens_that_never_make_a_character_are_not_kept_for_ever() -> None:
    for token_id in (BYTES.encode("é")[1], BYTES.eos_token_id, 10**6):
        detokenizer = Detokenizer(BYTES, skip_special_tokens=True)
        detokenizer.append([token_id] * 1000)
        assert len(detokenizer._window) < 200
    detokenizer.append(BYTES.encode("hello"))
    assert detokenizer.text.endswith("hello")


@pytest.mark.parametrize("size", [1, 2, 100])
def test_special_tokens_that_are_left_out_are_told_with_their_places(size) -> None:
    tokenizer = create_byte_tokenizer()
    tokens = [0, *tokenizer.encode("aé"), 0, 0, *tokenizer.encode("b"), 0]
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=True)
    for start in range(0, len(tokens), size):
        detokenizer.append(tokens[start : start + size])
    assert detokenizer.text == "aéb"
    assert detokenizer.specials == [(0, 0, 1), (0, 2, 5), (0, 2, 6), (0, 3, 8)]


def test_a_special_token_amid_a_character_stands_before_it() -> None:
    tokenizer = create_byte_tokenizer()
    a, first, second = tokenizer.encode("aé")
    detokenizer = Detokenizer(tokenizer, skip_special_tokens=True)
    assert detokenizer.append([a, first, 0, second]) == "aé"
    assert detokenizer.specials == [(0, 1, 3)]
