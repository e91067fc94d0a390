"""Guided generation: which tokens a grammar lets follow. xgrammar compiles the grammars and follows them.

Whatever the user asked for holds for every finished answer, or the request is refused at the door: `guided_text`,
`guided_schema` and `guided_tags` hold it against what xgrammar follows exactly, and against limits on what takes long to compile.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from stepgraph.engine.guided_schema import SchemaConverter
from stepgraph.engine.guided_tags import TagConverter
from stepgraph.engine.guided_text import Limits, Regex, check_grammar, check_text, grammar_of_choices
from stepgraph.errors import ConfigError, RequestError
from stepgraph.step.slot_line import MASK_BITS

# Shapes: V logits of the model, W = ceil(V / MASK_BITS) words of a token mask.

if TYPE_CHECKING:
    import xgrammar
    from numpy.typing import NDArray
    from transformers import PreTrainedTokenizerFast

    from stepgraph.engine.sampling_params import StructuredOutputs

MAX_TOKEN_SECONDS = 0.25
"""CPU time the host may spend on one token of one request, which all others wait for."""
CACHE_BYTES = 256 * 2**20
"""Of compiled grammars kept for the next request that asks the same."""


class CompiledGuide(NamedTuple):
    """A grammar compiled for one tokenizer. Immutable: any number of guides may follow it at once."""

    grammar: xgrammar.CompiledGrammar
    vocab_size: int


def require_xgrammar() -> None:
    """ConfigError if xgrammar is not installed."""
    if importlib.util.find_spec("xgrammar") is None:
        raise ConfigError(
            "structured outputs need the package xgrammar, which is not installed: pip install 'stepgraph[guidance]'"
        )


class GuidanceCompiler:
    """Compiles grammars for one tokenizer. Thread-safe; `compile` may take seconds and runs off the engine's thread.

    Args:
        tokenizer: gives each token's bytes. Special tokens are never part of an answer.
        vocab_size: V, which may exceed the tokenizer's vocabulary; tokens that the tokenizer lacks are never allowed.
        stop_token_ids: the model's end tokens, at least one below V. They are allowed where the grammar is complete only.

    Raises:
        ConfigError: xgrammar is not installed, or there is no end token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, *, vocab_size: int, stop_token_ids: Sequence[int]) -> None:
        require_xgrammar()
        import xgrammar

        stops = sorted({t for t in stop_token_ids if 0 <= t < vocab_size})
        if not stops:
            raise ConfigError(
                f"structured outputs need an end token below vocab_size={vocab_size}, to end an answer with; the model's "
                f"are {list(stop_token_ids)}. Set eos_token_id in its generation_config.json"
            )
        self._vocab_size = vocab_size
        self._compiler = xgrammar.GrammarCompiler(
            xgrammar.TokenizerInfo(
                _token_bytes(tokenizer, vocab_size, stops),
                xgrammar.VocabType.RAW,
                vocab_size=vocab_size,
                stop_token_ids=stops,
            ),
            max_threads=min(8, os.cpu_count() or 1),
            cache_limit_bytes=CACHE_BYTES,
        )

    def compile(self, spec: StructuredOutputs) -> CompiledGuide:
        """Compile what a request asks for. Keeps what it compiled, up to `CACHE_BYTES`.

        Raises:
            RequestError: it is malformed, over a limit, cannot be followed exactly, or allows no answer at all.
        """
        compiler, name = self._compiler, ""
        try:
            if spec.json is not None:
                name = "json"
                schema = json.dumps(SchemaConverter(spec.json).convert())
                grammar = compiler.compile_json_schema(schema, any_whitespace=not spec.disable_any_whitespace)
            elif spec.json_object:
                name = "json_object"
                grammar = compiler.compile_json_schema(
                    '{"type": "object"}', any_whitespace=not spec.disable_any_whitespace
                )
            elif spec.regex is not None:
                name = "regex"
                limits = Limits("structured_outputs.regex")
                check_text(spec.regex, limits.where)
                grammar = compiler.compile_regex(Regex(spec.regex, limits).rewritten)
            elif spec.choice is not None:
                name = "choice"
                grammar = compiler.compile_grammar(grammar_of_choices(spec.choice))
            elif isinstance(spec.structural_tag, Mapping):
                name = "structural_tag"
                grammar = compiler.compile_structural_tag(json.dumps(TagConverter(spec.structural_tag).convert()))
            else:
                name = "grammar"
                assert spec.grammar is not None
                check_grammar(spec.grammar, Limits("structured_outputs.grammar"))
                grammar = compiler.compile_grammar(spec.grammar)
        except (RuntimeError, UnicodeDecodeError) as error:  # what xgrammar raises for all it refuses
            raise RequestError(f"structured_outputs.{name} cannot be used: {_reason(error)}") from error
        compiled = CompiledGuide(grammar, self._vocab_size)
        mask_W = np.zeros(-(-self._vocab_size // MASK_BITS), np.int32)
        try:
            Guide(compiled).fill(mask_W)
        except GuideError as error:
            raise RequestError(f"structured_outputs.{name} cannot be used: {error}") from error
        if not mask_W.any():
            raise RequestError(
                f"structured_outputs.{name} allows no answer: no token can be the first; make it matchable"
            )
        return compiled


class Guide:
    """Where one request stands in its grammar. A host object, used by the engine's thread only.

    Raises:
        GuideError: from `accept` and `fill`; the request cannot go on, others can.
    """

    finished: bool
    """An end token was accepted: the answer is complete. From then on only end tokens are allowed."""

    def __init__(self, compiled: CompiledGuide) -> None:
        import xgrammar

        self.finished = False
        self._matcher = xgrammar.GrammarMatcher(compiled.grammar)
        self._stop_token_ids = frozenset(self._matcher.stop_token_ids)
        self._vocab_size = compiled.vocab_size
        self._accept_seconds = 0.0

    def accept(self, token: int) -> None:
        """Take in the token that was sampled. GuideError if the grammar does not allow it here."""
        if self.finished and token in self._stop_token_ids:
            return
        start = time.thread_time()
        if not (0 <= token < self._vocab_size and self._matcher.accept_token(token)):
            raise GuideError(f"token {token} is outside the request's grammar at this point")
        self.finished = self._matcher.is_terminated()
        self._accept_seconds = time.thread_time() - start

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
            if self.finished or not self._matcher.accept_token(token):
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
        start = time.thread_time()
        if self.finished:
            self._fill_stops(mask_W)
            return
        self._fill_next(mask_W)
        seconds = self._accept_seconds + time.thread_time() - start
        if seconds > MAX_TOKEN_SECONDS:
            raise GuideError(
                f"following the grammar took {seconds:.2f} s for one token, at most {MAX_TOKEN_SECONDS} are allowed: it can "
                "read the answer in too many ways; nest fewer repetitions"
            )

    def _fill_stops(self, mask_W: NDArray[np.int32]) -> None:
        mask_W.fill(0)
        for token in self._stop_token_ids:
            mask_W.view(np.uint32)[token // MASK_BITS] |= np.uint32(1 << token % MASK_BITS)

    def _fill_next(self, mask_W: NDArray[np.int32]) -> None:
        self._matcher.fill_next_token_bitmask(mask_W.reshape(1, -1))
        if used := self._vocab_size % MASK_BITS:  # xgrammar may set bits that stand for no token
            mask_W.view(np.uint32)[-1] &= np.uint32((1 << used) - 1)


class GuideError(RuntimeError):
    """A request left its grammar, or following it takes too long; says which. Ends this request only."""


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
