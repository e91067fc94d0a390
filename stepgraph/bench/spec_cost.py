"""What a speculative round costs: its graphs timed alone, and the least that its bytes and FLOPs allow.

Symbols: K proposals of a row, p the probability that a proposal stands if those before it did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from stepgraph.abi import slot_line
from stepgraph.bench.graphs import GREEDY, Contender, lay_out, time_interleaved
from stepgraph.bench.roofline import Limits, StepCost, attention_flops, experts_cost, latent_sizes, step_cost
from stepgraph.errors import ConfigError
from stepgraph.graph import create_backend
from stepgraph.layers.experts import MixtureMLP
from stepgraph.spec.mtp import MTPDrafter
from stepgraph.step.plan import StepPlan
from stepgraph.step.runner import StepRunner
from stepgraph.step.shape import StepShape


@dataclass(frozen=True)
class RoundTimes:
    """Median ms of a step's graph, from launch to completion, taken in turn on one engine."""

    plain_ms: float
    """One token of each row, nobody proposes: the step of an engine without speculation."""
    verify_ms: float
    """1 + K tokens of each row are verified, nobody proposes."""
    round_ms: float
    """1 + K tokens of each row are verified, and K proposed for the next step."""

    @property
    def draft_ms(self) -> float:
        """What proposing adds."""
        return self.round_ms - self.verify_ms


@dataclass(frozen=True)
class RoundCosts:
    """What must be read, written and computed at least, see `stepgraph.bench.roofline.StepCost`."""

    plain: StepCost
    verify: StepCost
    drafts: tuple[StepCost, ...]
    """Of each of the K sub-steps of an MTP module."""

    def speedup_by_bytes(self, tokens: float) -> float:
        """Tokens per second over those of plain steps, if time is bytes, where a row's round yields so many tokens."""
        moved = self.verify.bytes + sum(draft.bytes for draft in self.drafts)
        return tokens * self.plain.bytes / moved

    def speedup_by_roofline(self, tokens: float, limits: Limits) -> float:
        """The same, if time is the larger of what bytes and FLOPs take."""
        least_ms = self.verify.least_ms(limits) + sum(draft.least_ms(limits) for draft in self.drafts)
        return tokens * self.plain.least_ms(limits) / least_ms


def expected_tokens(num_drafts: int, probability: float) -> float:
    """Tokens of a row's round: the sum of p^j over j = 0 … K, as the j-th proposal counts only if all before it stand."""
    return sum(probability**place for place in range(num_drafts + 1))


def round_costs(runner: StepRunner, rows: int, context: int, num_drafts: int) -> RoundCosts:
    """Least cost of a plain step and of a round of K = `num_drafts` proposals by MTP.

    Args:
        runner: of an engine with method mtp whose module drafts over all of the vocabulary.
        rows: rows that decode.
        context: tokens that each of them knows.
        num_drafts: K, at least 1.
    """
    model, new = runner.model, 1 + num_drafts
    config = model.config
    drafter = runner.create_program(runner.policy.max_shape).drafter
    assert isinstance(drafter, MTPDrafter)
    parameters = list(drafter.parameters())
    size = parameters[0].element_size()
    module = sum(parameter.numel() for parameter in parameters) // drafter.lookahead
    head = config.vocab_size * config.hidden_size
    mixtures = [part for part in drafter.layers[0].modules() if isinstance(part, MixtureMLP)]
    (spec,) = drafter.attention_specs
    kv_per_token = spec.cached_numbers

    def sub_step(query_len: int, kv_len: int) -> StepCost:
        attention = attention_flops(spec, [(query_len, kv_len)] * rows, latent_sizes(model))
        less = experts_cost(mixtures, rows * query_len)
        return StepCost(
            size * (module + head + rows * kv_per_token * (kv_len + query_len)) + less.bytes,
            rows * (2 * query_len * module + 2 * head) + attention + less.flops,
        )

    verify = step_cost(model, [(new, context + num_drafts)] * rows)
    return RoundCosts(
        plain=step_cost(model, [(1, context)] * rows),
        # that cost is of one sample per row
        verify=replace(verify, flops=verify.flops + 2 * rows * num_drafts * head),
        drafts=(
            sub_step(new, context + num_drafts),
            *(sub_step(1, context + place) for place in range(1, num_drafts)),
        ),
    )


@dataclass(frozen=True)
class TimedStep:
    """A decode step to be timed."""

    shape: StepShape
    num_proposed: tuple[int, ...]
    """Proposals that wait in each row."""
    drafts: bool = True
    """Propose for the next step as the engine does; else the graph has no drafter."""


def spread(num_tokens: int, num_rows: int) -> tuple[int, ...]:
    """Proposals of each row of a decode step of so many tokens, as even as can be."""
    each, more = divmod(num_tokens - num_rows, num_rows)
    return tuple(each + (row < more) for row in range(num_rows))


def time_round(runner: StepRunner, rows: int, context: int, num_drafts: int, repeats: int) -> RoundTimes:
    """Time a plain step, verification alone and a whole round, in turn. Arguments are as for `round_costs` and `time_steps`."""
    plain = runner.policy.round_up(rows, rows)
    whole = runner.policy.round_up(rows * (1 + num_drafts), rows, num_drafts=num_drafts)
    steps = [
        TimedStep(plain, (0,) * rows, drafts=False),
        TimedStep(whole, (num_drafts,) * rows, drafts=False),
        TimedStep(whole, (num_drafts,) * rows),
    ]
    return RoundTimes(*time_steps(runner, steps, context, repeats))


def time_steps(runner: StepRunner, steps: Sequence[TimedStep], context: int, repeats: int) -> list[float]:
    """Median ms from launch to completion of each step, run in turn.

    Args:
        runner: of an engine in which no request runs.
        steps: no step has more rows or proposals than the engine's.
        context: tokens that each row knows, the last of them not computed yet.
        repeats: timed runs of each.

    Raises:
        ConfigError: the KV cache is too small for these rows.
    """
    for step in steps:
        blocks = sum(-(-(context + proposed) // runner.block_size) for proposed in step.num_proposed)
        if blocks >= runner.num_kv_blocks:
            raise ConfigError(
                f"{len(step.num_proposed)} rows of {context} tokens need {blocks} KV blocks and there are "
                f"{runner.num_kv_blocks - 1}; raise num_kv_blocks"
            )
    backend = create_backend(runner.graphs.store.backend_name)
    with runner.workbench():
        runner.state.plan.zero_()  # captures run on nothing
        runner.state.lines.zero_()
        graphs = []
        for step in steps:
            if step.drafts:
                graphs.append(runner.graphs.store.graph(step.shape) or runner.graphs.store.eager_twin(step.shape))
            else:
                program = runner.create_program(step.shape)
                acceptance = program.acceptance if step.shape.num_drafts else None
                graphs.append(backend.capture(replace(program, drafter=None, acceptance=acceptance), 1))
        contenders = []
        for step, graph in zip(steps, graphs, strict=True):
            plan, lines = _lay_out_decodes(runner, step.num_proposed, context, step.shape.num_drafts)
            contenders.append(Contender(plan, step.shape, graph, lines))
        return time_interleaved(runner, contenders, repeats)


def _lay_out_decodes(
    runner: StepRunner, num_proposed: Sequence[int], context: int, num_drafts: int
) -> tuple[StepPlan, Tensor]:
    """The plan of rows that know `context` tokens, with proposals behind them, and SlotState's lines before the step."""
    rows = [(1 + proposed, context + proposed) for proposed in num_proposed]
    plan = replace(lay_out(runner, rows, GREEDY), num_prefill_rows=0, num_drafts=num_drafts)
    lines = runner.state.lines.clone()
    proposed_R = torch.tensor(num_proposed, dtype=torch.int32, device=lines.device)
    lines[1 : 1 + len(rows), slot_line.LENGTH] -= proposed_R
    lines[1 : 1 + len(rows), slot_line.NUM_DRAFTS] = proposed_R
    return plan, lines
