"""An answer that is printed while it grows."""

from __future__ import annotations

import logging
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from stepgraph.api import LLM
    from stepgraph.engine.harmony import HarmonyTokens
    from stepgraph.engine.outputs import CompletionOutput, RequestOutput
    from stepgraph.server.harmony import HarmonyParser
    from stepgraph.server.pieces import Paragraphs

logger = logging.getLogger(__name__)


@dataclass
class PrintedAnswer:
    """An answer as it is printed.

    Args:
        harmony: the tokens of this format, if the answer is in it. Its text is then what the model says; what it thinks is
            printed before that between tags, as other models write it.
    """

    harmony: HarmonyTokens | None = None
    text: str = ""
    finish_reason: str | None = None
    error: str | None = None
    num_tokens: int = 0
    _output: RequestOutput | None = None
    _started_at: float = 0.0
    _first_at: float = 0.0
    _messages: _Messages | None = None

    @classmethod
    def of_chat(cls, llm: LLM) -> PrintedAnswer:
        """In a conversation with this model."""
        from stepgraph.engine.chat_template import ChatTemplate
        from stepgraph.engine.harmony import HarmonyTokens

        return cls(HarmonyTokens.written(llm.tokenizer, ChatTemplate(llm.tokenizer).text))

    def __post_init__(self) -> None:
        self._started_at = time.perf_counter()

    def show(self, output: RequestOutput) -> None:
        """Print what has come."""
        if self._output is None:
            self._first_at = time.perf_counter()
        [answer] = output.outputs
        if self.harmony is None:
            printed, self.text = answer.text[len(self.text) :], answer.text
        else:
            self._messages = self._messages or _Messages.of(self.harmony, output.prompt or "")
            printed, said = self._messages.take(answer)
            self.text += said
        print(printed, end="", flush=True)
        self.finish_reason, self.error = answer.finish_reason, answer.error
        self.num_tokens, self._output = len(answer.token_ids), output

    def end_line(self) -> None:
        """Have what is printed next begin a line."""
        if self._output is not None:
            print(flush=True)

    def log_speed(self) -> None:
        """With -v."""
        if self._output is None:
            return
        now = time.perf_counter()
        first_s, rest_s = self._first_at - self._started_at, now - self._first_at
        logger.info(
            "%d tokens after a prompt of %d, of which %d were cached; the first after %.3f s%s",
            self.num_tokens,
            len(self._output.prompt_token_ids),
            self._output.num_cached_tokens,
            first_s,
            f", the others at {(self.num_tokens - 1) / rest_s:.1f} tokens/s" if self.num_tokens > 1 and rest_s else "",
        )


@dataclass
class _Messages:
    """An answer in harmony, as it is printed and as it is said."""

    parser: HarmonyParser
    paragraphs: Paragraphs
    num_read: int = 0
    num_specials: int = 0
    is_thinking: bool = False

    @classmethod
    def of(cls, tokens: HarmonyTokens, prompt: str) -> _Messages:
        from stepgraph.server.harmony import HarmonyParser
        from stepgraph.server.pieces import Paragraphs

        return cls(HarmonyParser(tokens, (), prompt=prompt), Paragraphs())

    def take(self, answer: CompletionOutput) -> tuple[str, str]:
        """What there is to print since the last call, and the part of it that the model says."""
        printed = said = ""
        ends = [(special.text_end, special.token_id) for special in answer.specials[self.num_specials :]]
        for end, special in [*ends, (len(answer.text), None)]:
            reason = answer.finish_reason if special is None else None
            text, self.num_read = answer.text[self.num_read : end], end
            piece = self.paragraphs.join(self.parser.feed(text, special=special, finish_reason=reason))
            printed += self._turned(bool(piece.reasoning), bool(piece.content)) + piece.reasoning + piece.content
            said += piece.content
        self.num_specials += len(ends)
        return printed, said

    def _turned(self, is_thinking: bool, is_saying: bool) -> str:
        """The tag between what it thinks and what it says."""
        if is_thinking and not self.is_thinking:
            self.is_thinking = True
            return "<think>\n"
        if is_saying and self.is_thinking:
            self.is_thinking = False
            return "\n</think>\n\n"
        return ""
