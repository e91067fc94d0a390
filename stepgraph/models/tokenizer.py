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
    return _in_turn(pattern)


def _in_turn(*patterns: str) -> Callable[[], Any]:
    """Matches of each pattern, and what is between them, are split by the next."""
    return lambda: pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


_DEEPSEEK_LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af\u0370-\u0373\u0376\u0377"
    "\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556"
    "\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15"
    "\u1f18-\u1f1d\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    "\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113"
    "\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184"
    "\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e"
    "\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    "\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
"""Letters that DeepSeek's first tokenizer keeps together in a word."""
_DEEPSEEK = _in_turn(
    r"[\r\n]",
    rf"\s?[{_DEEPSEEK_LETTERS}]+",
    "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+",
    r"\s+$",
    "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+",
    r"\p{N}",
)
_DEEPSEEK_V3 = _in_turn(
    r"\p{N}{1,3}",
    "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+",
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)
_GLM4 = _WordSplitting(_by_regex(r"\p{N}{1,3}"))
_LLAMA3 = _WordSplitting(_by_regex(r"\p{N}{1,3}"), ignore_merges=True, adds_bos=True)
_WORD_SPLITTING = {
    "default": _WordSplitting(_gpt2),
    "gpt-2": _WordSplitting(_gpt2),
    "smollm": _WordSplitting(_smollm),
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "qwen2": _WordSplitting(_by_regex(r"\p{N}"), nfc=True),
    "deepseek-llm": _WordSplitting(_DEEPSEEK),
    "deepseek-v3": _WordSplitting(_DEEPSEEK_V3),
    "chatglm-bpe": _GLM4,
    "glm4": _GLM4,
}
