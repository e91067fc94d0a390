"""Tokenizers, always as transformers' fast class: read from a folder, or built from the metadata of a GGUF file."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from stepgraph.errors import ModelError
from stepgraph.models.gguf import GGUFFile
from stepgraph.models.json_file import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4
"""Values of ``tokenizer.ggml.token_type`` that are found in a text before it is split into words."""


_FILES = re.compile(r"token|vocab|merges|tekken|\.(model|tiktoken)$")
"""Found in the name of any file that a tokenizer of transformers is read from."""


def require_tokenizer_files(folder: Path) -> None:
    """Raise a ModelError if a checkpoint folder holds nothing that a tokenizer could be read from. Opens no file."""
    if not any(_FILES.search(path.name) for path in folder.iterdir()):
        raise ModelError(
            f"{folder} holds no tokenizer (tokenizer.json), without which prompts can only be token ids, in Python and over "
            "HTTP; copy the tokenizer files of the original model into it."
        )


def may_have_chat_template(folder: Path) -> bool:
    """Whether a checkpoint folder holds a chat template, as far as that shows without reading its tokenizer."""
    of_files = ("chat_template.jinja", "chat_template.json", "additional_chat_templates", "tekken.json")
    if any((folder / name).exists() for name in of_files):
        return True
    settings = folder / "tokenizer_config.json"
    return settings.is_file() and read_json(settings).get("chat_template") is not None


def no_chat_template(name: str) -> str:
    """What to say of a model without one."""
    return (
        f"{name} has no chat template, which makes a prompt of a conversation: it is no chat model. Let it continue a text "
        "(`stepgraph generate`, LLM.generate, /v1/completions), or use the variant of it that was trained to chat."
    )


def tokenizer_from_folder(folder: Path) -> PreTrainedTokenizerFast:
    """Load the tokenizer files in a checkpoint folder; ModelError if there are none that transformers can read."""
    require_tokenizer_files(folder)
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        tokenizer.encode("a")  # a setting of the wrong type shows here, and not in each request
    except Exception as error:  # transformers raises many types here, ImportError and bare Exception among them
        raise ModelError(f"{folder} holds no tokenizer that transformers can read: {error}") from error
    return tokenizer


def require_known_tokenizer(file: GGUFFile) -> None:
    """Raise a ModelError if a GGUF file's tokenizer is not byte-level BPE, or splits words in a way that is not known here."""
    kind = file.value("tokenizer.ggml.model", str)
    if kind != "gpt2":
        raise ModelError(
            f'{file.path} has a tokenizer of kind "{kind}"; byte-level BPE ("gpt2") can be built from GGUF metadata. '
            "Use the folder of the original model, with its tokenizer files, instead."
        )
    splitting_name = _splitting_name(file)
    if splitting_name not in _WORD_SPLITTING:
        raise ModelError(
            f'{file.path} splits words by "{splitting_name}"; known are {", ".join(_WORD_SPLITTING)}. '
            "Use the folder of the original model, with its tokenizer files, instead."
        )


def tokenizer_from_gguf(file: GGUFFile) -> PreTrainedTokenizerFast:
    """Build the byte-level BPE tokenizer that a GGUF file describes; ModelError where `require_known_tokenizer` raises it, or if
    its parts do not fit each other."""
    require_known_tokenizer(file)
    splitting = _WORD_SPLITTING[_splitting_name(file)]
    tokens = _texts(file, "tokenizer.ggml.tokens")
    merges: Any = [tuple(merge.split(" ", 1)) for merge in _texts(file, "tokenizer.ggml.merges")]
    names = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    ids = {short: file.value(f"tokenizer.ggml.{long}_token_id", int, None) for short, long in names.items()}
    special = {}
    for short, index in ids.items():
        if index is not None and not 0 <= index < len(tokens):
            raise ModelError(
                f"{file.path}: tokenizer.ggml.{names[short]}_token_id is {index}, and there are {len(tokens)} tokens; convert "
                "the model to GGUF again."
            )
        if index is not None:
            special[f"{short}_token"] = tokens[index]
    types = file.value("tokenizer.ggml.token_type", list, [])
    adds_bos = file.value("tokenizer.ggml.add_bos_token", bool, splitting.adds_bos)
    try:
        tokenizer = Tokenizer(
            BPE({token: index for index, token in enumerate(tokens)}, merges, ignore_merges=splitting.ignore_merges)
        )
        tokenizer.add_tokens(
            [
                AddedToken(token, special=type_ != _USER_DEFINED, normalized=False)
                for token, type_ in zip(tokens, types, strict=False)
                if type_ in (_UNKNOWN, _CONTROL, _USER_DEFINED)
            ]
        )
        if ids["bos"] is not None and adds_bos:
            bos = special["bos_token"]
            tokenizer.post_processor = processors.TemplateProcessing(
                single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, ids["bos"])]
            )
    except Exception as error:  # tokenizers raises just that
        raise ModelError(f"{file.path} holds a tokenizer that cannot be built: {error}. Download it again.") from error
    if splitting.nfc:
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = splitting.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()

    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=file.value("tokenizer.chat_template", str, None),
        model_max_length=file.value(file.value("general.architecture", str) + ".context_length", int),
        clean_up_tokenization_spaces=False,
        **special,
    )


def _texts(file: GGUFFile, key: str) -> list[str]:
    texts: list[str] = file.value(key, list)
    if not all(isinstance(text, str) for text in texts):
        raise ModelError(f"{file.path}: {key} must be a list of texts; convert the model to GGUF again.")
    return texts


def _splitting_name(file: GGUFFile) -> str:
    name: str = file.value("tokenizer.ggml.pre", str, "default")
    return name


@dataclass(frozen=True)
class _WordSplitting:
    """What llama.cpp's name of a pre-tokenizer stands for."""

    pre_tokenizer: Callable[[], Any]
    nfc: bool = False  # text is normalised to NFC first
    ignore_merges: bool = False  # a word that is a token stays whole even if the merges do not lead to it
    adds_bos: bool = False  # where the file does not say


def _gpt2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt2()])


def _by_regex(digits: str) -> Callable[[], Any]:
    """The word pattern that Llama 3 and Qwen2 share but for the number of digits that stay together."""
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
        + digits
        + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    return lambda: pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_LLAMA3 = _WordSplitting(_by_regex(r"\p{N}{1,3}"), ignore_merges=True, adds_bos=True)
_WORD_SPLITTING = {
    "default": _WordSplitting(_gpt2),
    "gpt-2": _WordSplitting(_gpt2),
    "smollm": _WordSplitting(_smollm),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _WordSplitting(_by_regex(r"\p{N}"), nfc=True),
}
