"""Which experts the tokens of a benchmark choose: as dummy weights have it, or skewed on purpose; and what that comes to."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import torch

from stepgraph.bench.offline import Job, answered, run_round
from stepgraph.bench.roofline import ExpertLoad
from stepgraph.config import EngineConfig
from stepgraph.engine.engine import Engine
from stepgraph.errors import ConfigError
from stepgraph.executor.local import LocalExecutor, runner_of
from stepgraph.step.dispatch import mixtures_of

_SKEW = 0.5


ROUTINGS = ("uniform", "skewed")
"""As routers are drawn, which choose all experts about equally often; and with some experts favoured. In this order."""


def add_routing_flag(parser: argparse.ArgumentParser, *, several: bool = False) -> None:
    """Add ``--routing``; `several`: it takes more than one."""
    parser.add_argument(
        "--routing",
        choices=ROUTINGS,
        nargs="+" if several else None,
        default=[ROUTINGS[0]] if several else ROUTINGS[0],
        help="of dummy weights: routers as they are drawn, which choose all experts about equally often (default), or with rows "
        "of unequal norms, so that some are favoured" + ("; both: one after the other" if several else ""),
    )


def check_routing(routings: Sequence[str], config: EngineConfig) -> None:
    """Raise ConfigError if a checkpoint's routers were to be changed."""
    if "skewed" in routings and config.model.load_format != "dummy":
        raise ConfigError(
            f"routing='skewed' changes random weights, and load_format={config.model.load_format!r} reads a checkpoint's; add "
            "--load-format dummy, or leave --routing out"
        )


def apply_routing(routing: str, engine: Engine) -> None:
    """Change the routers of all ranks as the flag says, once. ConfigError if the model has none."""
    if routing == "skewed" and not any(engine.executor.on_all(_skew)):
        raise ConfigError(f"routing='skewed' has no effect: {engine.source.name} has no experts; leave --routing out")


@torch.no_grad()
def _skew(executor: LocalExecutor) -> int:
    """Give the rows of each router norms by Zipf's law: that of the r-th is r^-0.5 of the first one's, and which row is the r-th
    is drawn for each layer. With 128 experts, of which 8 are chosen, the busiest gets some 6.5 times the mean, and 8 of them a
    third of all tokens. Returns the number of routers."""
    mixtures = mixtures_of(executor.runner.model)
    for layer, mixture in enumerate(mixtures):
        weight = mixture.gate.weight
        place = torch.randperm(weight.shape[0], generator=torch.Generator().manual_seed(layer))
        weight.mul_(((1 + place) ** -_SKEW).to(weight.device)[:, None])
    return len(mixtures)


@dataclass(frozen=True)
class Census:
    """What the tokens of a round chose. All figures are means over the layers."""

    loads: tuple[tuple[ExpertLoad, ...], ...]
    """Of the step that is timed: of each part of the experts that ranks keep whole, for each layer."""
    touched: float
    """Experts that this step's tokens chose."""
    expected: float
    """As many would be chosen, were all equally likely."""
    imbalance: float
    """Over all steps: tokens of the busiest expert over the mean."""
    rank_imbalance: float
    """Likewise, of the ranks."""

    def asdict(self) -> dict[str, float]:
        """For JSON."""
        names = ("touched", "expected", "imbalance", "rank_imbalance")
        return {name: getattr(self, name) for name in names}


def take_census(engine: Engine, jobs: Sequence[Job], num_tokens: int, *, whole_round: bool) -> Census | None:
    """Run a round, and see what its tokens choose; None of a model without experts.

    Args:
        engine: which has nothing else to do.
        jobs: of the round.
        num_tokens: of the step that is timed, all ranks together; of several such steps, the middle one is taken.
        whole_round: what is timed are all steps of the round together.
    """
    runner = runner_of(engine.executor)
    mixtures = mixtures_of(runner.model)
    if not mixtures:
        return None

    def counts() -> list[list[int]]:
        return [total.tolist() for total in runner.expert_counts.totals]

    seen = [counts()]
    answered(run_round(engine, jobs, on_step=lambda _: seen.append(counts())))
    top, kept = mixtures[0].gate.routing.top, mixtures[0].experts.count
    round_ = _difference(seen[-1], seen[0])
    steps = [_difference(after, before) for before, after in pairwise(seen)]
    alike = [step for step in steps if sum(step[0]) == num_tokens * top]
    step = round_ if whole_round else (alike or steps)[len(alike or steps) // 2]
    parts = range(0, len(step[0]), kept)
    return Census(
        loads=tuple(tuple(ExpertLoad.of(layer[first : first + kept]) for layer in step) for first in parts),
        touched=fmean(ExpertLoad.of(layer).touched for layer in step),
        expected=ExpertLoad.expected(num_tokens, len(step[0]), top, len(step[0])).touched,
        imbalance=fmean(_imbalance(layer) for layer in round_),
        rank_imbalance=fmean(_imbalance([sum(layer[first : first + kept]) for first in parts]) for layer in round_),
    )


def _difference(after: Sequence[Sequence[int]], before: Sequence[Sequence[int]]) -> list[list[int]]:
    return [[a - b for a, b in zip(x, y, strict=True)] for x, y in zip(after, before, strict=True)]


def _imbalance(counts: Sequence[int]) -> float:
    return max(counts) * len(counts) / max(1, sum(counts))
