"""Tokenizers that cut a text into bytes, or into any pieces."""

from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode


def create_byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte and a special one, so that every character beyond ASCII is spread over tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({"<end>": 0} | {c: i for i, c in enumerate(alphabet, start=1)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", clean_up_tokenization_spaces=False)


def create_byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """A few letters with and without a space before them, as sentencepiece has them, a special token, and all bytes."""
    pieces = ["<unk>", "</s>", "▁", "a", "b", "▁a", "▁b"] + [f"<0x{byte:02X}>" for byte in range(256)]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", clean_up_tokenization_spaces=False)


def create_piece_tokenizer(pieces: Sequence[bytes]) -> PreTrainedTokenizerFast:
    """Token i is pieces[i], any bytes; the pieces differ."""
    letters = bytes_to_unicode()
    tokenizer = Tokenizer(models.BPE({"".join(letters[b] for b in piece): i for i, piece in enumerate(pieces)}, []))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
