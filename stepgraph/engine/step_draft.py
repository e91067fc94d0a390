"""A step in the making, and what the scheduler hands out when it is made."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from stepgraph.engine.logprobs import PromptSpan
from stepgraph.engine.request import Request
from stepgraph.step.plan import StepPlan
from stepgraph.step.shape import Variant


@dataclass(slots=True)
class Chunk:
    """A row of prompt tokens."""

    request: Request
    slot: int
    start: int  # position of its first token
    num_tokens: int = 0
    deltas: list[tuple[int, int, int]] = field(default_factory=list)


class ScheduledStep(NamedTuple):
    """A plan, and what the engine does before and after it runs."""

    plan: StepPlan
    admitted: tuple[Request, ...] = ()
    """Requests whose device-side state must be written first."""
    prompt_spans: tuple[PromptSpan, ...] = ()
    follows_grammar: bool = False
    """Whether it samples for a request that does."""
    ranks: tuple[ScheduledStep | None, ...] = ()
    """Where ranks have requests of their own: what was scheduled for each of them, None if nothing."""
    chunks: Sequence[Chunk] = ()
    """Its rows of prompt tokens: a request's first row in a slot is one."""


@dataclass(slots=True)
class StepDraft:
    """A step in the making."""

    budget: int  # tokens left
    num_drafts: int  # proposals to make for each row
    decodes: list[tuple[int, int]] = field(default_factory=list)  # rows of one token and its proposals
    decode_deltas: list[tuple[int, int, int]] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    admitted: list[Request] = field(default_factory=list)
    variant: Variant = Variant.PLAIN  # of the decodes
    short_of_blocks: bool = False
    follows_grammar: bool = False

    def __bool__(self) -> bool:
        """Whether it has any row."""
        return bool(self.decodes or self.chunks)

    def with_proposals(self, num_tokens: int, max_drafts: int, end: int) -> int:
        """Tokens of a request whose keys and values exist once proposals follow `num_tokens`: a draft model computes all of these
        but the last. The request takes `max_drafts` proposals and computes `end` tokens, at most."""
        return min(num_tokens + max(0, min(self.num_drafts, max_drafts) - 1), end)

    def plan(self, last: StepPlan) -> tuple[StepPlan, tuple[PromptSpan, ...]]:
        """The plan of its rows, and where prompts' log-probabilities will lie in its results. It is of the `last` plan's epoch if
        it decodes the same rows and asks for the same of them, else of the next."""
        variant, spans, first_line = self.variant, [], 0
        for chunk in self.chunks:
            request = chunk.request
            needed = request.variant
            if needed is Variant.PROMPT_LOGPROBS:
                if chunk.start < request.prompt_len - 1:
                    spans.append(PromptSpan(request, request.generation, first_line, chunk.start, chunk.num_tokens))
                else:
                    needed = Variant.EXTENDED
            variant = max(variant, needed)
            first_line += chunk.num_tokens
        # Decodes come last: they may turn out empty on the device, and the host must know where a prompt's tokens lie.
        rows = (*[(chunk.slot, chunk.num_tokens) for chunk in self.chunks], *self.decodes)
        num_prefill_rows, num_drafts = len(self.chunks), self.num_drafts
        repeats = (
            num_prefill_rows == last.num_prefill_rows == 0
            and num_drafts == last.num_drafts
            and variant == last.variant
            and rows == last.rows
        )
        assert last.epoch is not None
        plan = StepPlan(
            rows=rows,
            deltas=(*[delta for chunk in self.chunks for delta in chunk.deltas], *self.decode_deltas),
            num_prefill_rows=num_prefill_rows,
            variant=variant,
            num_drafts=num_drafts,
            epoch=last.epoch + (not repeats),
        )
        return plan, tuple(spans)
