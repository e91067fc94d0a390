"""Tokenizers built from GGUF metadata, against transformers."""

import json
import shutil

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from stepgraph.errors import ModelError
from stepgraph.models.gguf import GGUFFile
from stepgraph.models.source import packaged_file
from stepgraph.models.tokenizer import tokenizer_from_folder, tokenizer_from_gguf

gguf = pytest.importorskip("gguf", reason="reading GGUF files needs the gguf package")

TEXTS = [
    "",
    " ",
    "Hello, world!",
    "   three spaces before,\t\ttabs,\n\n\nnewlines   and trailing   ",
    "In 2024, 3.14159 and 1234567890 and x86_64",
    "naïve café, Ångström, e\u0301 (combining), ﬁ ligature",
    "日本語のテキスト、한국어 текст и العربية",
    "👩‍👩‍👧‍👦 🇩🇪 👍🏽 🤷",
    "def f(x: int) -> str:\n    return f'{x!r}'  # I'm sure we'll see, they'd say\n",
    "I'M SURE WE'LL SEE",
    "<|im_start|>user\nWho?<|im_end|>\n<|endoftext|>",
    "not<|im_end|>spaced <|im_start|> <|im_star",
    "\x00\x01\u200b\ufeff",
    "https://example.org/a?b=c&d=%20#e",
]
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
LLAMA3_PATTERN = (  # as in the published tokenizer.json
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN2_PATTERN = LLAMA3_PATTERN.replace("{1,3}", "")


def split_by(pattern: str):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


def train(pre_tokenizer, normalizer=None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    return tokenizer


def write_gguf(path, tokenizer: Tokenizer, pre: str | None, *metadata) -> GGUFFile:
    """A GGUF file with only the metadata of `tokenizer`."""
    state = json.loads(tokenizer.to_str())
    tokens = sorted(state["model"]["vocab"], key=state["model"]["vocab"].get)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_tokenizer_model("gpt2")
    if pre:
        writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in SPECIAL else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in state["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    for add in metadata:
        add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GGUFFile(path)


@pytest.mark.parametrize(
    ("pre", "original"),
    [
        (None, lambda: train(pre_tokenizers.ByteLevel(add_prefix_space=False))),
        ("gpt-2", lambda: train(pre_tokenizers.ByteLevel(add_prefix_space=False))),
        ("llama-bpe", lambda: train(split_by(LLAMA3_PATTERN))),
        ("qwen2", lambda: train(split_by(QWEN2_PATTERN), normalizers.NFC())),
    ],
)
def test_token_ids_match_the_tokenizer_that_was_converted(tmp_path, pre, original) -> None:
    original = original()
    tokenizer = tokenizer_from_gguf(write_gguf(tmp_path / "model.gguf", original, pre))
    for text in TEXTS:
        assert tokenizer.encode(text, add_special_tokens=False) == original.encode(text).ids, text


def test_words_are_split_as_the_makers_of_models_with_latent_attention_split_them(tmp_path) -> None:
    original = train(pre_tokenizers.ByteLevel(add_prefix_space=False))
    text = "Hello world, it's 12345 中文 こん\n\n  x = (foo)  \nЖизнь ä:b "
    rest = ["\n\n", " ", " x", " =", " (", "foo", ")", "  \n", "Жизнь", " ä", ":b", " "]
    expected = {
        "deepseek-llm": [
            *(
                "Hello",
                " world",
                ",",
                " it",
                "'",
                "s",
                " ",
                "1",
                "2",
                "3",
                "4",
                "5",
                " ",
                "中文",
                " ",
                "こん",
                "\n",
                "\n",
                " ",
            ),
            *(" x", " =", " (", "foo", ")", "  ", "\n", "Жизнь", " ä", ":", "b", " "),
        ],
        "deepseek-v3": ["Hello", " world", ",", " it", "'s", " ", "123", "45", " ", "中文", " ", "こん", *rest],
        "glm4": ["Hello", " world", ",", " it", "'s", " ", "123", "45", " 中文", " こん", *rest],
    }
    for pre, words in expected.items():
        tokenizer = tokenizer_from_gguf(write_gguf(tmp_path / "model.gguf", original, pre))
        splits = tokenizer.backend_tokenizer.pre_tokenizer.pre_tokenize_str(text)
        assert [text[slice(*offsets)] for _, offsets in splits] == words, pre
        assert tokenizer.decode(tokenizer.encode(text, add_special_tokens=False)) == text


def test_a_bos_token_is_added_if_the_file_or_the_kind_says_so(tmp_path) -> None:
    original = train(split_by(LLAMA3_PATTERN))

    def starts_with_bos(pre, *metadata) -> bool:
        tokenizer = tokenizer_from_gguf(write_gguf(tmp_path / "model.gguf", original, pre, *metadata))
        return tokenizer.encode("Hello")[0] == tokenizer.bos_token_id

    assert starts_with_bos("llama-bpe")
    assert not starts_with_bos("llama-bpe", lambda writer: writer.add_add_bos_token(False))
    assert not starts_with_bos("gpt-2")
    assert starts_with_bos("gpt-2", lambda writer: writer.add_add_bos_token(True))


def test_an_unknown_kind_or_word_splitting_is_refused_with_the_alternative(tmp_path) -> None:
    original = train(pre_tokenizers.ByteLevel(add_prefix_space=False))
    with pytest.raises(ModelError, match=r'"tekken".*smollm.*folder of the original model'):
        tokenizer_from_gguf(write_gguf(tmp_path / "model.gguf", original, "tekken"))
    writer = gguf.GGUFWriter(tmp_path / "sentencepiece.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ModelError, match=r'"llama".*folder of the original model'):
        tokenizer_from_gguf(GGUFFile(tmp_path / "sentencepiece.gguf"))


def test_a_folder_gives_its_own_tokenizer_or_says_that_there_is_none(tmp_path) -> None:
    original = train(split_by(QWEN2_PATTERN))
    PreTrainedTokenizerFast(tokenizer_object=original).save_pretrained(tmp_path / "with")
    assert tokenizer_from_folder(tmp_path / "with").encode(TEXTS[2]) == original.encode(TEXTS[2]).ids
    (tmp_path / "without").mkdir()
    with pytest.raises(
        ModelError, match=r"holds no tokenizer \(tokenizer.json\), .*; copy the tokenizer files of the original"
    ):
        tokenizer_from_folder(tmp_path / "without")
    (tmp_path / "without" / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="holds no tokenizer that transformers can read: "):
        tokenizer_from_folder(tmp_path / "without")


@pytest.fixture(scope="module")
def embedded(smollm2):
    path = packaged_file("smollm2")
    return smollm2.tokenizer(), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("text", TEXTS)
def test_the_embedded_tokenizer_matches_transformers(embedded, text) -> None:
    ours, theirs = embedded
    assert ours.encode(text) == theirs.encode(text)
    for skip in (True, False):
        assert ours.decode(ours.encode(text), skip_special_tokens=skip) == theirs.decode(
            theirs.encode(text), skip_special_tokens=skip
        )


def test_the_embedded_tokenizer_splits_digits_before_spaces(embedded) -> None:
    """transformers ignores the file's word splitting, "smollm"; it shows where spaces meet a digit."""
    ours, _ = embedded
    assert ours.tokenize("at  12") == ["at", "ĠĠ", "1", "2"]
    assert ours.tokenize("a 1") == ["a", "Ġ", "1"]


def test_the_embedded_special_tokens_are_those_of_the_file(smollm2) -> None:
    tokenizer = smollm2.tokenizer()
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.unk_token_id) == (
        1,
        2,
        2,
        0,
    )
    assert tokenizer.decode([*range(17), *tokenizer.encode("yes")], skip_special_tokens=True) == "yes"
    assert tokenizer.model_max_length == 8192


def test_the_embedded_chat_template_renders_as_in_transformers(embedded) -> None:
    ours, theirs = embedded
    chat = [{"role": "user", "content": "What is 2 + 2?"}]
    text = ours.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n")


def test_a_folder_that_names_code_of_its_own_is_read_without_it_and_without_asking(tiny_model, tmp_path, monkeypatch):
    folder = shutil.copytree(tiny_model, tmp_path / "mimo")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "mimo", "auto_map": {"AutoConfig": "configuration_mimo.MiMoConfig"}}
    (folder / "config.json").write_text(json.dumps(config))
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("a question that nobody answers"))
    assert tokenizer_from_folder(folder)("hi")["input_ids"]
