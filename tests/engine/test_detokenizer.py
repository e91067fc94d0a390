"""Text grows by whole characters only, and ends as the tokenizer would have decoded it at once."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

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


def create_byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte and a special one, so that every character beyond ASCII is spread over tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<end>": 0} | {c: i for i, c in enumerate(alphabet, start=1)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", clean_up_tokenization_spaces=False)


BYTES = create_byte_tokenizer()


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
