"""What a user may ask of one request's sampling."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from stepgraph.abi import slot_line
from stepgraph.errors import RequestError
from stepgraph.step.shape import Variant

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

MAX_N = 64
MAX_STOP_STRINGS = 16
MAX_TEXT_LEN = 1024
"""Characters of a stop string or bad word. All requests wait while one's are prepared, which takes as long as they are."""
_NUMBER = (int, float)
_MAX_TOKENS = 2**63 - 1
"""What fits a message to another process; no context holds so many."""


@dataclass(frozen=True)
class StructuredOutputs:
    """The form an answer must have: exactly one of the first six fields. Names follow vLLM's StructuredOutputsParams.

    Raises:
        RequestError: none or several are given, or one is of the wrong type.
    """

    json: Any = None
    """JSON schema: text, a dict, or a pydantic model class. Kept as a dict."""
    regex: str | None = None
    """A regular expression for the whole answer."""
    choice: Sequence[str] | None = None
    """One of these texts."""
    grammar: str | None = None
    """A grammar in EBNF, of which `root` is the whole answer."""
    json_object: bool = False
    """Any JSON object."""
    structural_tag: str | Mapping[str, Any] | None = None
    """Free text with structures that begin where a trigger appears: JSON text or a dict, as `response_format` of type
    structural_tag has it, with `format`, or `structures` and `triggers`. Kept as a dict."""
    disable_any_whitespace: bool = False
    """JSON with one space after each comma and colon; in a structural tag, with at most one character of white space between two
    parts. Otherwise there may be a few: enough to indent it."""

    def __post_init__(self) -> None:
        given = [
            name for name in ("json", "regex", "choice", "grammar", "structural_tag") if getattr(self, name) is not None
        ]
        for name in ("json_object", "disable_any_whitespace"):
            if getattr(self, name) is None:
                object.__setattr__(self, name, False)
            self._require(name, isinstance(getattr(self, name), bool), "True or False")
        given += ["json_object"] if self.json_object else []
        if len(given) != 1:
            raise RequestError(
                "structured_outputs needs exactly one of json, regex, choice, grammar, json_object, structural_tag; "
                f"{' and '.join(given) or 'none'} given",
                param="structured_outputs",
            )
        if self.json is not None:
            object.__setattr__(self, "json", _schema_of(self.json))
        if self.structural_tag is not None:
            tag = _from_json(self.structural_tag, "structural_tag")
            object.__setattr__(self, "structural_tag", tag)
            self._require("structural_tag", isinstance(tag, Mapping), "a structural tag (JSON text or dict)")
            object.__setattr__(self, "structural_tag", dict(tag))
        for name in ("regex", "grammar"):
            text = getattr(self, name)
            self._require(name, text is None or (isinstance(text, str) and text != ""), "a text that is not empty")
        if self.choice is not None:
            self._require("choice", _are_texts(self.choice) and len(self.choice) > 0, "a list of texts")
            object.__setattr__(self, "choice", tuple(self.choice))

    def _require(self, name: str, holds: bool, expected: str) -> None:
        _require(f"structured_outputs.{name}", getattr(self, name), holds, expected)


@dataclass(frozen=True)
class SamplingParams:
    """How to choose a request's tokens. Names, defaults and meanings follow vLLM.

    Lists are kept as tuples, and None in place of an empty one is accepted.

    Raises:
        RequestError: a value outside its range.
    """

    temperature: float = 1.0
    """Divides the logits; 0 is greedy: the most likely token, always."""
    top_p: float = 1.0
    """Keep the smallest set of tokens with this probability."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 or -1 keeps all."""
    max_tokens: int | None = 16
    """Of an answer; None: as many as fit the context."""
    seed: int | None = None
    """Of the random numbers that tokens are drawn with. None: chosen by the engine from its own seed; below 0: kept as the 64
    bits it has, seed + 2**64."""
    stop_token_ids: tuple[int, ...] = ()
    """The answer ends after one of these."""
    ignore_eos: bool = False
    """Do not end at the model's end token."""
    detokenize: bool = True
    """Make the text, not only the tokens."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    n: int = 1
    """Answers to one prompt; with a seed, answer i draws from seed + i."""
    min_p: float = 0.0
    """Keep tokens that have at least this share of the most likely one's probability."""
    presence_penalty: float = 0.0
    """Taken from the logits of tokens that the answer holds."""
    frequency_penalty: float = 0.0
    """Taken from the logits of tokens that the answer holds, once for each time it holds them."""
    repetition_penalty: float = 1.0
    """Divides positive logits of tokens that prompt or answer hold, multiplies negative."""
    min_tokens: int = 0
    """No stop token or stop string ends the answer before it has this many tokens."""
    stop: Sequence[str] = ()
    """One string or several; the answer ends before the first that appears in its text."""
    include_stop_str_in_output: bool = False
    """The answer ends after the string of `stop` instead."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these tokens."""
    bad_words: Sequence[str] = ()
    """Texts that cannot be completed: a word is banned where it starts a text and where it follows a space."""
    allowed_token_ids: Sequence[int] | None = None
    """No other token can be sampled; None: all can."""
    logprobs: int | None = None
    """Report the log-probability of each token and of this many most likely ones."""
    prompt_logprobs: int | None = None
    """Report the log-probability of each of the prompt's tokens and of this many most likely ones."""
    structured_outputs: StructuredOutputs | None = None
    """The form that the answer must have; also accepted as a dict."""
    speculative: Mapping[str, int] | None = None
    """`{"num_speculative_tokens": n}`: at most n proposals of speculative decoding for a step; 0: none."""
    guided_decoding: None = None
    """An older name that is refused."""

    def __post_init__(self) -> None:
        if self.guided_decoding is not None:
            raise RequestError(
                "guided_decoding is not supported; use structured_outputs=StructuredOutputs(...)",
                param="guided_decoding",
            )
        # A request leaves most of them out, and waits for this.
        given = {name: _one_form(name, value) for name, value in vars(self).items() if value is not _DEFAULTS[name]}
        for name, value in given.items():
            object.__setattr__(self, name, value)
        for name, value in given.items():
            if name in _RULES:
                holds, expected = _RULES[name]
                _require(name, value, holds(value), expected)
            if name in _ROOM and (count := len(value or ())) > _ROOM[name]:
                raise RequestError(f"{name} has {count} entries; at most {_ROOM[name]} fit", param=name)
        if "min_tokens" in given:
            most = _MAX_TOKENS if self.max_tokens is None else self.max_tokens
            holds_min = _within(self.min_tokens, int, 0, most)
            expected = f"between 0 and max_tokens, which is {self.max_tokens}"
            _require("min_tokens", self.min_tokens, holds_min, expected)
        if self.stop and not self.detokenize:
            raise RequestError(
                "stop strings are searched in the text, which detokenize=False leaves out; set it to True", param="stop"
            )

    @property
    def max_num_drafts(self) -> int:
        """Proposals a step may verify for the request, if the engine makes so many."""
        return slot_line.MAX_DRAFTS if self.speculative is None else self.speculative["num_speculative_tokens"]

    @property
    def variant(self) -> Variant:
        """The least a graph must carry to sample so."""
        if self.prompt_logprobs is not None:
            return Variant.PROMPT_LOGPROBS
        extended = (
            self.presence_penalty != 0
            or self.frequency_penalty != 0
            or self.repetition_penalty != 1
            or self.min_tokens > 0
            or self.logit_bias is not None
            or len(self.bad_words) > 0
            or self.allowed_token_ids is not None
            or self.logprobs is not None
            or self.structured_outputs is not None
        )
        return Variant.EXTENDED if extended else Variant.PLAIN


def bad_word_token_ids(words: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Token sequences of which the last token must not follow the others, for `SamplingParams.bad_words`.

    A word is banned where it starts a text and where it follows a space: as vLLM does, each is spelled with and without a
    leading space. The second is left out if it is the first behind tokens of its own for the space, and (unlike in vLLM) is
    listed even if it has another number of tokens. A word of nothing but white space is taken as it is.

    Raises:
        RequestError: a word has no tokens or more than BAD_WORD_WIDTH, or all together are more than MAX_BAD_WORDS.
    """
    found: list[list[int]] = []
    different = dict.fromkeys(words)
    if len(different) > slot_line.MAX_BAD_WORDS:  # each is a sequence at least: nobody need wait for their tokens
        raise RequestError(
            f"bad_words has {len(different)} entries; at most {slot_line.MAX_BAD_WORDS} fit", param="bad_words"
        )
    for word in different:
        bare = word.lstrip() or word
        alone = tokenizer.encode(bare, add_special_tokens=False)
        if not alone:
            raise RequestError(f"bad_words holds {word!r}, which has no tokens; leave it out", param="bad_words")
        spaced = alone if bare.isspace() else tokenizer.encode(f" {bare}", add_special_tokens=False)
        spellings = [alone] if spaced[-len(alone) :] == alone else [alone, spaced]
        if (most := max(map(len, spellings))) > slot_line.BAD_WORD_WIDTH:
            raise RequestError(
                f"bad_words holds {word!r}, which has {most} tokens; at most {slot_line.BAD_WORD_WIDTH} fit: ban a "
                "shorter part of it",
                param="bad_words",
            )
        found += spellings
    if len(found) > slot_line.MAX_BAD_WORDS:
        raise RequestError(
            f"bad_words becomes {len(found)} token sequences, with and without a space before each word; at most "
            f"{slot_line.MAX_BAD_WORDS} fit",
            param="bad_words",
        )
    return found


def _one_form(name: str, value: Any) -> Any:
    """One form for what may be given in several."""
    if name == "temperature":  # below this logits divided by it would overflow; the limit is greedy
        return 0.0 if _within(value, _NUMBER, 0, 1e-5) and value < 1e-5 else value
    if name == "top_k":
        return 0 if value == -1 else value
    if name == "seed":
        return value + 2**64 if _within(value, int, -(2**63), -1) else value
    if name in ("stop_token_ids", "bad_words", "stop"):
        if name == "stop" and isinstance(value, str):
            return (value,)
        return tuple(value or ()) if value is None or _is_list(value) else value
    if name == "allowed_token_ids":
        return tuple(value) if _is_list(value) else value
    if name == "logit_bias" and isinstance(value, Mapping):
        return {_token_id_of(key): bias for key, bias in value.items()} or None
    if name == "speculative" and isinstance(value, Mapping):
        return dict(value)
    if name == "structured_outputs" and isinstance(value, Mapping):
        known = {f.name for f in fields(StructuredOutputs)}
        if unknown := sorted(map(str, value.keys() - known)):
            raise RequestError(
                f"structured_outputs has no {unknown[0]!r:.80}; it has {', '.join(sorted(known))}",
                param=f"structured_outputs.{unknown[0]:.80}",
            )
        return StructuredOutputs(**value)
    return value


def _schema_of(schema: object) -> dict[str, Any]:
    if isinstance(schema, type) and hasattr(schema, "model_json_schema"):
        schema = schema.model_json_schema()
    schema = _from_json(schema, "json")
    if isinstance(schema, Mapping):
        return dict(schema)
    raise RequestError(
        f"structured_outputs.json must be a JSON schema (text or dict) or a pydantic model class, not {schema!r:.80}",
        param="structured_outputs.json",
    )


def _from_json(value: object, name: str) -> Any:
    """The value that a text holds as JSON; any other value as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        where = f"structured_outputs.{name}"
        raise RequestError(f"{where} is not JSON: {error}", param=where) from error


def _token_id_of(key: object) -> object:
    """JSON knows only text as keys."""
    return int(key) if isinstance(key, str) and key.isascii() and key.isdigit() and len(key) <= 10 else key


def _are_token_ids(values: object) -> bool:
    """There may be as many as the vocabulary has, and others wait meanwhile: so they are not looked at one by one."""
    if not isinstance(values, tuple) or not all(
        issubclass(kind, int) and kind is not bool for kind in set(map(type, values))
    ):
        return False
    return not values or (min(values) >= 0 and max(values) < 2**31)


def _are_texts(values: object) -> bool:
    return isinstance(values, list | tuple) and all(isinstance(value, str) for value in values)


def _is_list(value: object) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, str)


def _within(value: Any, kind: type[Any] | tuple[type[Any], ...], low: float, high: float) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


def _require(name: str, value: object, holds: bool, expected: str) -> None:
    if not holds:
        raise RequestError(f"{name}={value!r:.200} must be {expected}", param=name)


def _number(kind: type[Any] | tuple[type[Any], ...], low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: _within(value, kind, low, high)


def _or_none(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or holds(value)


_DEFAULTS = {f.name: f.default for f in fields(SamplingParams)}
_FLAG = (lambda value: isinstance(value, bool), "True or False")
_PENALTY = (_number(_NUMBER, -2, 2), "between -2 and 2")
_TEXTS = (
    lambda value: _are_texts(value) and all(0 < len(text) <= MAX_TEXT_LEN for text in value),
    f"a list of texts, none of them empty or of more than {MAX_TEXT_LEN} characters",
)
_NUM_LOGPROBS = (_or_none(_number(int, 0, slot_line.MAX_LOGPROBS)), f"between 0 and {slot_line.MAX_LOGPROBS}, or None")
_RULES: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "temperature": (_number(_NUMBER, 0, 100), "between 0 (greedy) and 100"),
    "top_p": (lambda value: _within(value, _NUMBER, 0, 1) and value > 0, "above 0 and at most 1"),
    "top_k": (_number(int, 0, 2**31 - 1), "0 or -1 (all tokens), or a positive count"),
    "max_tokens": (_or_none(_number(int, 1, _MAX_TOKENS)), "between 1 and 2**63 - 1, or None"),
    "seed": (_or_none(_number(int, 0, 2**64 - 1)), "between -2**63 and 2**64 - 1, or None"),
    "stop_token_ids": (_are_token_ids, "token ids, whole numbers from 0 up"),
    "ignore_eos": _FLAG,
    "detokenize": _FLAG,
    "skip_special_tokens": _FLAG,
    "n": (_number(int, 1, MAX_N), f"between 1 and {MAX_N}"),
    "min_p": (_number(_NUMBER, 0, 1), "between 0 (all tokens) and 1"),
    "presence_penalty": _PENALTY,
    "frequency_penalty": _PENALTY,
    "repetition_penalty": (_number(_NUMBER, 0.01, 10), "between 0.01 and 10; 1 changes nothing"),
    "stop": _TEXTS,
    "include_stop_str_in_output": _FLAG,
    "logit_bias": (
        _or_none(
            lambda value: (
                isinstance(value, dict)
                and _are_token_ids(tuple(value))
                and all(_within(bias, _NUMBER, -100, 100) for bias in value.values())
            )
        ),
        "a dict of token ids and what to add to their logits, between -100 and 100",
    ),
    "bad_words": _TEXTS,
    "allowed_token_ids": (
        _or_none(lambda value: _are_token_ids(value) and len(value) > 0),
        "a list of at least one token id, or None",
    ),
    "logprobs": _NUM_LOGPROBS,
    "prompt_logprobs": _NUM_LOGPROBS,
    "structured_outputs": (
        _or_none(lambda value: isinstance(value, StructuredOutputs)),
        "a StructuredOutputs, a dict of its fields, or None",
    ),
    "speculative": (
        _or_none(
            lambda value: (
                isinstance(value, dict)
                and set(value) == {"num_speculative_tokens"}
                and _within(value["num_speculative_tokens"], int, 0, slot_line.MAX_DRAFTS)
            )
        ),
        f'{{"num_speculative_tokens": n}} with n between 0 (none) and {slot_line.MAX_DRAFTS}, or None',
    ),
}
"""What each of `SamplingParams` must be, in `_one_form`, and how to say so; `min_tokens` depends on another."""
_ROOM = {
    "stop_token_ids": slot_line.MAX_STOP_TOKENS,
    "stop": MAX_STOP_STRINGS,
    "logit_bias": slot_line.MAX_BIASES,
    "bad_words": slot_line.MAX_BAD_WORDS,
}
"""How many entries fit."""
