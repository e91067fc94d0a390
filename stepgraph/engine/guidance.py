"""Guided generation: which tokens a grammar lets follow. xgrammar compiles the grammars and follows them.

Whatever the user asked for holds for every finished answer, or the request is refused on arrival: `guided_text`,
`guided_schema` and `guided_tags` hold it against what xgrammar follows exactly, and against limits on what takes long.

Neither a compilation nor a mask has a bound on its time, and nothing can stop one. So what is here runs in processes of its own,
one for each grammar, see `stepgraph.engine.grammar_process`; the engine has a `RemoteGuide` for each of its requests.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from stepgraph.abi.slot_line import MASK_BITS
from stepgraph.engine.guided_schema import SchemaConverter
from stepgraph.engine.guided_tags import TagConverter
from stepgraph.engine.guided_text import Limits, Regex, check_grammar, check_text, grammar_of_choices
from stepgraph.engine.harmony import HarmonyTokens
from stepgraph.errors import ConfigError, RequestError

# Shapes: V logits of the model, W = ceil(V / MASK_BITS) words of a token mask.

if TYPE_CHECKING:
    import xgrammar
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast

    from stepgraph.engine.sampling_params import StructuredOutputs

XGRAMMAR_SERIES = "0.2."
"""Releases whose behaviour the rewriting of schemas, tags and expressions was found by; pyproject.toml asks for the same."""
MAX_WHITESPACE = 20
"""Characters of white space between two parts of a JSON text: enough to indent it, and no place for a model to stay."""
_NO_TEXT = b"\xff"
"""With which no text begins, nor goes on: a token of these bytes is where a grammar names it by its id, and nowhere else.
xgrammar takes one of no bytes for a token that is never allowed."""
_THREADS = max(1, min(8, (os.cpu_count() or 1) // 2))
"""Of one compilation."""


class Vocabulary(NamedTuple):
    """What grammars need to know of a tokenizer and its model."""

    tokens: list[bytes]
    """What each adds to the text; b"" for special ones, which are never part of an answer, and those the tokenizer lacks."""
    vocab_size: int
    """V, which may exceed the tokenizer's vocabulary; tokens that the tokenizer lacks are never allowed."""
    stop_token_ids: tuple[int, ...]
    """Allowed where the grammar is complete only."""
    structure_token_ids: tuple[int, ...] = ()
    """Special tokens that set an answer in parts, and that structural tags may name."""


class CompiledGuide(NamedTuple):
    """A grammar compiled for one tokenizer. Immutable: any number of guides may follow it at once."""

    grammar: xgrammar.CompiledGrammar
    vocab_size: int


def require_xgrammar() -> None:
    """ConfigError if xgrammar is not installed, or in a release that nobody has held against what is relied on here."""
    if importlib.util.find_spec("xgrammar") is None:
        raise ConfigError(
            "structured outputs need the package xgrammar, which is not installed: pip install 'stepgraph[guidance]'",
            param="structured_outputs",
        )
    version = importlib.metadata.version("xgrammar")
    if not version.startswith(XGRAMMAR_SERIES):
        raise ConfigError(
            f"structured outputs are exact with xgrammar {XGRAMMAR_SERIES}x, and {version} is installed: "
            "pip install 'stepgraph[guidance]'",
            param="structured_outputs",
        )


def stop_tokens(stop_token_ids: Sequence[int], vocab_size: int) -> tuple[int, ...]:
    """The tokens that end a guided answer: a model's end tokens that it can sample. ConfigError if there are none."""
    stops = sorted({t for t in stop_token_ids if 0 <= t < vocab_size})
    if not stops:
        raise ConfigError(
            f"structured outputs need an end token below vocab_size={vocab_size}, to end an answer with; the model's "
            f"are {list(stop_token_ids)}. Set eos_token_id in its generation_config.json",
            param="structured_outputs",
        )
    return tuple(stops)


def read_vocabulary(tokenizer: PreTrainedTokenizerFast, vocab_size: int, stop_token_ids: Sequence[int]) -> Vocabulary:
    """Takes about a second.

    Raises:
        ConfigError: xgrammar is not installed, or there is no end token.
    """
    require_xgrammar()
    stops = stop_tokens(stop_token_ids, vocab_size)
    structure = [id for id in HarmonyTokens.of(tokenizer) or () if id < vocab_size and id not in stops]
    return Vocabulary(_token_bytes(tokenizer, vocab_size, stops), vocab_size, stops, tuple(structure))


class GuidanceCompiler:
    """Compiles grammars for one vocabulary. `compile` may take seconds, or for ever unless its process ends."""

    def __init__(self, vocabulary: Vocabulary) -> None:
        import xgrammar

        def info(tokens: list[bytes]) -> xgrammar.TokenizerInfo:
            return xgrammar.TokenizerInfo(
                tokens,
                xgrammar.VocabType.RAW,
                vocab_size=vocabulary.vocab_size,
                stop_token_ids=list(vocabulary.stop_token_ids),
            )

        self._vocab_size = vocabulary.vocab_size
        self._structure_token_ids = frozenset(vocabulary.structure_token_ids)
        self._info = self._structure_info = info(vocabulary.tokens)
        if self._structure_token_ids:
            tokens = list(vocabulary.tokens)
            for id in self._structure_token_ids:
                tokens[id] = _NO_TEXT + str(id).encode()
            self._structure_info = info(tokens)

    def compile(self, spec: StructuredOutputs) -> CompiledGuide:
        """Compile what a request asks for.

        Raises:
            RequestError: it is malformed, over a limit, cannot be followed exactly, or allows no answer at all.
        """
        import xgrammar

        compiler, name = xgrammar.GrammarCompiler(self._info, max_threads=_THREADS), ""
        try:
            if spec.json is not None:
                name = "json"
                schema = json.dumps(SchemaConverter(spec.json).convert())
                grammar = _compile_schema(compiler, schema, spec)
            elif spec.json_object:
                name = "json_object"
                grammar = _compile_schema(compiler, '{"type": "object"}', spec)
            elif spec.regex is not None:
                name = "regex"
                limits = Limits("structured_outputs.regex")
                check_text(spec.regex, limits.param)
                grammar = compiler.compile_regex(Regex(spec.regex, limits).rewritten)
            elif spec.choice is not None:
                name = "choice"
                grammar = compiler.compile_grammar(grammar_of_choices(spec.choice))
            elif isinstance(spec.structural_tag, Mapping):
                name = "structural_tag"
                max_whitespace = 1 if spec.disable_any_whitespace else MAX_WHITESPACE
                converter = TagConverter(spec.structural_tag, max_whitespace=max_whitespace)
                converted = converter.convert()
                if converter.token_ids:
                    self._check_structure(converter.token_ids)
                    compiler = xgrammar.GrammarCompiler(self._structure_info, max_threads=_THREADS)
                for text in converter.grammars:  # which may come to their turn when much has been said
                    self._require_answer(compiler.compile_grammar(text), f"{name} holds a grammar that")
                grammar = compiler.compile_structural_tag(json.dumps(converted))
            else:
                name = "grammar"
                assert spec.grammar is not None
                check_grammar(spec.grammar, Limits("structured_outputs.grammar"))
                grammar = compiler.compile_grammar(spec.grammar)
        except (RuntimeError, UnicodeDecodeError) as error:  # what xgrammar raises for all it refuses
            where = f"structured_outputs.{name}"
            raise RequestError(f"{where} cannot be used: {_reason(error)}", param=where) from error
        return self._require_answer(grammar, name)

    def _require_answer(self, grammar: xgrammar.CompiledGrammar, what: str) -> CompiledGuide:
        """RequestError if a grammar allows nothing. `what` it is begins with a field of StructuredOutputs."""
        compiled = CompiledGuide(grammar, self._vocab_size)
        mask_W = np.zeros(-(-self._vocab_size // MASK_BITS), np.int32)
        Guide(compiled).fill(mask_W)
        if not mask_W.any():
            raise RequestError(
                f"structured_outputs.{what} allows no answer: no token can be the first; make it matchable",
                param=f"structured_outputs.{what.split(' ')[0]}",
            )
        return compiled

    def _check_structure(self, token_ids: Collection[int]) -> None:
        if unknown := sorted(set(token_ids) - self._structure_token_ids):
            known = ", ".join(map(str, sorted(self._structure_token_ids))) or "none"
            raise RequestError(
                f"structured_outputs.structural_tag names the token {unknown[0]}, which does not set answers of this model in "
                f"parts; those that do: {known}",
                param="structured_outputs.structural_tag",
            )


def _compile_schema(
    compiler: xgrammar.GrammarCompiler, schema: str, spec: StructuredOutputs
) -> xgrammar.CompiledGrammar:
    any_whitespace = not spec.disable_any_whitespace
    return compiler.compile_json_schema(
        schema, any_whitespace=any_whitespace, max_whitespace_cnt=MAX_WHITESPACE if any_whitespace else None
    )


class Guide:
    """Where one request stands in its grammar.

    Raises:
        GuideError: from `accept`; the request cannot go on, others can.
    """

    finished: bool
    """An end token was accepted: the answer is complete. From then on only end tokens are allowed."""

    def __init__(self, compiled: CompiledGuide) -> None:
        import xgrammar

        self.finished = False
        self._matcher = xgrammar.GrammarMatcher(compiled.grammar)
        self._stop_token_ids = frozenset(self._matcher.stop_token_ids)
        self._vocab_size = compiled.vocab_size

    def accept(self, token: int) -> None:
        """Take in the token that was sampled. GuideError if the grammar does not allow it here."""
        if self.finished and token in self._stop_token_ids:
            return
        if not (0 <= token < self._vocab_size and self._matcher.accept_token(token)):
            raise GuideError(f"token {token} is outside the request's grammar at this point")
        self.finished = self._matcher.is_terminated()

    def fill_along(self, masks_JW: NDArray[np.int32], drafts: Sequence[int]) -> None:
        """Write the tokens that may follow now, and after each of the proposals.

        Lines after a proposal that may not stand there are left alone: it falls, and what is sampled behind it with it.

        Args:
            masks_JW: [1 + len(drafts), W], as for `fill`.
            drafts: that follow what was accepted.
        """
        num_accepted = 0
        self.fill(masks_JW[0])
        for place, token in enumerate(drafts, 1):
            # Of a special token that may not stand there, the matcher would write to the process's stderr.
            may_stand = token < self._vocab_size and masks_JW[place - 1, token // MASK_BITS] >> token % MASK_BITS & 1
            if self.finished or not may_stand or not self._matcher.accept_token(token):
                break
            num_accepted += 1
            if self._matcher.is_terminated():
                for mask_W in masks_JW[place:]:
                    self._fill_stops(mask_W)
                break
            self._fill_next(masks_JW[place])
        if num_accepted:
            self._matcher.rollback(num_accepted)

    def fill(self, mask_W: NDArray[np.int32]) -> None:
        """Write the tokens that may follow: bit v % 32 of word v // 32 is set if token v may. Bits from V on are 0.

        Changes nothing but `mask_W`, int32 [W], contiguous; all zero means that no token of the vocabulary can go on.
        """
        if self.finished:
            self._fill_stops(mask_W)
        else:
            self._fill_next(mask_W)

    def _fill_stops(self, mask_W: NDArray[np.int32]) -> None:
        mask_W.fill(0)
        for token in self._stop_token_ids:
            mask_W.view(np.uint32)[token // MASK_BITS] |= np.uint32(1 << token % MASK_BITS)

    def _fill_next(self, mask_W: NDArray[np.int32]) -> None:
        self._matcher.fill_next_token_bitmask(mask_W.reshape(1, -1))
        if used := self._vocab_size % MASK_BITS:  # xgrammar may set bits that stand for no token
            mask_W.view(np.uint32)[-1] &= np.uint32((1 << used) - 1)


class GuideError(RuntimeError):
    """A request left its grammar. Ends this request only."""


def _token_bytes(tokenizer: PreTrainedTokenizerFast, vocab_size: int, stop_token_ids: Sequence[int]) -> list[bytes]:
    """What each token adds to the text; b"" for special tokens, which xgrammar never allows unless they end the answer."""
    import xgrammar

    tokens = xgrammar.TokenizerInfo.from_huggingface(
        tokenizer, vocab_size=vocab_size, stop_token_ids=list(stop_token_ids)
    ).decoded_vocab
    for index, token in tokenizer.added_tokens_decoder.items():
        if index < vocab_size:  # added tokens are stored as text, not in the alphabet of a byte-level vocabulary
            tokens[index] = b"" if token.special else token.content.encode()
    return tokens


def _reason(error: RuntimeError | UnicodeDecodeError) -> str:
    """xgrammar's message without the time, source line and condition before it. It may quote a part of a character, and is then
    the object of another error."""
    message = error.object.decode(errors="replace") if isinstance(error, UnicodeDecodeError) else str(error)
    return re.sub(r"^(\[[\d:]+\] \S+:\d+: )?(Check failed: \(.*?\) is false: )?", "", message).strip()
