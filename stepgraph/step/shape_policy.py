"""ShapePolicy: which shape serves a step, which shapes exist, and which steps run without a graph. A function of settings alone:
no device, no measurement and no history, so that whoever has the same settings decides the same."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from stepgraph.config import GraphConfig, SchedulerConfig
from stepgraph.errors import ConfigError
from stepgraph.step.eager_reason import EagerReason
from stepgraph.step.plan import StepKind, StepPlan
from stepgraph.step.shape import StepShape, Variant, row_sizes, token_sizes


@dataclass(frozen=True)
class ShapePolicy:
    """The ladder of captured sizes and the rule that picks one. Hashable."""

    token_sizes: tuple[int, ...]
    """Captured token counts, ascending."""
    row_sizes: tuple[tuple[int, ...], ...]
    """Of each token count: captured row counts, ascending."""
    draft_levels: tuple[int, ...]
    """Numbers of proposals of a row that steps are planned with, ascending."""
    graphs_off: bool
    """No step runs in a graph."""
    only_prefill: bool
    """Steps that decode run without a graph."""
    longest_prefill: int
    """Steps that only prefill, more tokens than these, run without a graph."""

    @classmethod
    def of(
        cls,
        config: GraphConfig,
        scheduler: SchedulerConfig,
        *,
        draft_levels: Sequence[int] = (0,),
        graphs_off: bool = False,
    ) -> ShapePolicy:
        """The policy of an engine.

        Args:
            config: which sizes to capture.
            scheduler: how large a step it may plan.
            draft_levels: numbers of proposals of a row that steps are planned with, ascending.
            graphs_off: the graph backend captures nothing.

        Raises:
            ConfigError: the sizes cannot serve every step, or no step could use one of them.
        """
        max_tokens, max_rows = scheduler.max_num_batched_tokens, scheduler.max_num_seqs
        tokens = _token_sizes(config, max_tokens, max_rows)
        return cls(
            token_sizes=tokens,
            row_sizes=tuple(_row_sizes(config, size, max_rows) for size in tokens),
            draft_levels=tuple(draft_levels),
            graphs_off=graphs_off,
            only_prefill=config.cudagraph_only_prefill,
            longest_prefill=config.max_prefill_capture_size or max_tokens,
        )

    @property
    def max_tokens(self) -> int:
        """Most tokens of a step."""
        return self.token_sizes[-1]

    @property
    def max_shape(self) -> StepShape:
        """The largest step: no buffer of any other is larger."""
        return StepShape(self.token_sizes[-1], self.row_sizes[-1][-1], num_drafts=self.draft_levels[-1])

    def shapes(self, variant: Variant = Variant.PLAIN, num_drafts: int = 0) -> list[StepShape]:
        """All shapes of a variant and a number of proposals that steps may have, largest first."""
        return [
            StepShape(tokens, rows, variant, num_drafts)
            for tokens, sizes in zip(reversed(self.token_sizes), reversed(self.row_sizes), strict=True)
            for rows in reversed(sizes)
        ]

    def shapes_ahead(self, draft_levels: Sequence[int]) -> list[StepShape]:
        """Plain shapes of these numbers of proposals, ascending, that are captured before a step needs them: most proposals
        first, then the largest. Where only prefills run in graphs, these are the shapes that prefills come to as a rule."""
        return [
            shape
            for level in reversed(draft_levels)
            for shape in self.shapes(num_drafts=level)
            if not self.only_prefill or self._is_for_prefills(shape)
        ]

    def round_up(
        self, num_tokens: int, num_rows: int, variant: Variant = Variant.PLAIN, num_drafts: int = 0
    ) -> StepShape:
        """The smallest shape of a variant that holds so many tokens in so many rows, with room for proposals.

        From two to four tokens the costs hardly differ on all platforms, so that rows of fewer proposals than there may be get no
        graphs of their own; those of none do.
        """
        if num_tokens > num_rows:
            num_tokens = max(num_tokens, min(1 + num_drafts, 4, self.max_tokens))
        assert num_tokens <= self.max_tokens, (num_tokens, self.max_tokens)
        for i in range(bisect_left(self.token_sizes, max(num_tokens, num_rows, 1)), len(self.token_sizes)):
            rows = self.row_sizes[i]
            if num_rows <= rows[-1]:
                return StepShape(self.token_sizes[i], rows[bisect_left(rows, num_rows)], variant, num_drafts)
        raise AssertionError(f"{num_rows} rows fit no captured shape")

    def shape_of(self, plan: StepPlan) -> StepShape:
        """The shape that `plan` runs at, in a graph or without one, on all ranks."""
        return self.round_up(plan.most_tokens, plan.most_rows, plan.variant, plan.num_drafts)

    def eager_reason(self, plan: StepPlan) -> EagerReason | None:
        """Why `plan` is to run without a graph; None if it is to run in one."""
        if self.graphs_off:
            return EagerReason.GRAPHS_OFF
        if self.only_prefill and plan.kind is not StepKind.PREFILL:
            return EagerReason.NOT_PURE_PREFILL
        if plan.most_tokens > self.longest_prefill and plan.kind is StepKind.PREFILL:
            return EagerReason.LONG_PREFILL
        return None

    def _is_for_prefills(self, shape: StepShape) -> bool:
        """Whether steps of prompts alone come to `shape` as a rule. Others are captured at their first use: one of more tokens
        than they may run in a graph never, one of many rows, most of one token, should prompts need it."""
        longest = self.token_sizes[bisect_left(self.token_sizes, min(self.longest_prefill, self.max_tokens))]
        return shape.num_tokens <= longest and not (shape.num_rows > 8 and shape.num_tokens < 2 * shape.num_rows)


def _token_sizes(config: GraphConfig, max_tokens: int, max_rows: int) -> tuple[int, ...]:
    """Token counts to capture, ascending."""
    largest = min(config.max_capture_size or max_tokens, max_tokens)
    sizes = set(config.capture_sizes or token_sizes(largest))
    too_large = sorted(size for size in sizes if size > max_tokens)
    if too_large:
        raise ConfigError(
            f"capture_sizes={too_large} are above max_num_batched_tokens={max_tokens}, so no step could use them; drop "
            "them or raise max_num_batched_tokens"
        )
    sizes = {size for size in sizes if size <= largest}
    if not sizes or max(sizes) < max_rows:
        raise ConfigError(
            f"the largest captured size {max(sizes, default=0)} is below max_num_seqs={max_rows}, so a decode step of all "
            "running requests would fit no graph; capture a size of at least that, or lower max_num_seqs"
        )
    return tuple(sorted(sizes))


def _row_sizes(config: GraphConfig, num_tokens: int, max_rows: int) -> tuple[int, ...]:
    """Row counts to capture beside so many tokens, ascending."""
    if not config.capture_rows:
        return tuple(row_sizes(num_tokens, max_rows))
    most = min(num_tokens, max_rows)
    return tuple(sorted({min(rows, most) for rows in config.capture_rows} | {most}))
