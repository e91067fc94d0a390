"""Texts become tokens without a word on stderr that is not ours."""

import logging

from transformers import AutoTokenizer

from stepgraph.engine.prompts import encode_text


def test_a_text_beyond_the_tokenizers_length_is_encoded_without_a_warning_of_indexing_errors(
    tiny_model, caplog
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model, model_max_length=4)
    theirs = logging.getLogger("transformers")
    theirs.addHandler(caplog.handler)
    try:
        assert len(encode_text("longer than four", tokenizer)) == 16
    finally:
        theirs.removeHandler(caplog.handler)
    assert caplog.messages == []
