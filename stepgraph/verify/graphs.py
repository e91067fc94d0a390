"""Are the captured graphs right? Replays every captured shape on random compositions and compares.

Three runs of the same composition must agree:

- the captured graph;
- its eager twin, the same program at the same padded shape: tokens, proposals, logits, SlotState and KV cache must be the same;
- some of its rows alone, eagerly, at their exact shape, with the experts that were chosen in the batch: logits must be the same
  up to rounding (bit for bit in a deterministic engine). This catches what graph and twin would get wrong together, such as a
  launch grid too small for the composition.

Each runs in fresh state among poison, see `stepgraph.verify.trial`. Proposals, where there are any, are right up to some place of
a row, so that verification ends at every place.

Ranks that share a model do this together, each with its part of the weights and of the cache, and must come to the same tokens,
logits, SlotState and residual stream, bit for bit. What they launch depends on no result, so that they stay together even where
one is wrong.
"""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from stepgraph.bench.report import machine, write_json
from stepgraph.config import EngineConfig
from stepgraph.executor.base import Executor
from stepgraph.executor.local import LocalExecutor, runner_of
from stepgraph.executor.ranked import build_executor
from stepgraph.graph.eager import EagerGraph
from stepgraph.models.source import resolve_configured
from stepgraph.step.runner import StepRunner
from stepgraph.step.shape import StepShape, Variant
from stepgraph.verify.compositions import Composition, random_compositions
from stepgraph.verify.routing import Choice, has_routers, imposed_choices, kept_choices
from stepgraph.verify.trial import Proposals, Result, mostly_right_proposals, run

_ROUNDING = 1e-3
"""Largest ‖difference‖ / ‖logits‖ that the order of additions may cause in float32. In 16 bits a deep model on random tokens
amplifies rounding without bound (SmolLM2: up to 0.9), so there the figure is reported and not judged."""


@dataclass
class ShapeReport:
    """What was found at one shape."""

    shape: StepShape
    compositions: int = 0
    worst_graph_difference: float = 0.0  # largest |logit difference| to the eager twin
    worst_alone_difference: float = 0.0  # largest ‖difference‖ / ‖logits‖ to rows run alone
    mismatches: list[str] = field(default_factory=list)
    digests: list[str] = field(default_factory=list, repr=False)
    """Of each composition, of all that ranks must have alike: what the graph and its twin left of it, a line for each."""


def verify_shape(
    runner: StepRunner, shape: StepShape, compositions: Sequence[Composition], alone_rows: int
) -> ShapeReport:
    """Check one captured shape; captures it if need be.

    Args:
        runner: with a KV cache that holds the compositions; its slots must be free.
        shape: one of `runner.policy.shapes()`.
        compositions: that fit the shape.
        alone_rows: rows of each composition that are also run alone: the last, and others at random.
    """
    graph = runner.graphs.store.graph(shape)
    assert graph is not None, f"{shape} is over the graph memory budget"
    twin = runner.graphs.store.eager_twin(shape)
    report = ShapeReport(shape)
    for composition in compositions:
        report.compositions += 1
        proposals = mostly_right_proposals(runner, twin, shape, composition)
        expected = run(runner, twin, shape, composition, proposals)
        with kept_choices(runner.model) as choices:
            if has_routers(runner.model):  # once more: one that is watched may not choose within a larger kernel
                run(runner, twin, shape, composition, proposals)
        if any(choice.takes_padding for choice in choices):
            report.mismatches.append(f"padding reached experts on rows {composition}")
        found = run(runner, graph, shape, composition, proposals)
        report.digests.append(f"{_shared_digest(found)} {_shared_digest(expected)}")
        report.worst_graph_difference = max(report.worst_graph_difference, _distance(found.logits, expected.logits))
        if found.strays:
            report.mismatches.append(
                f"{found.strays} cache entries of no token of the step were written on rows {composition}"
            )
        if problem := _disagreement(found, expected):
            report.mismatches.append(f"graph and eager differ in {problem} on rows {composition}")
        # NaN in a draft model's last layer leaves no trace but another proposal.
        if shape.num_drafts and run(runner, twin, shape, composition, proposals, poison=0.0).ring != expected.ring:
            report.mismatches.append(
                f"proposals depend on what nothing wrote: something read a poisoned entry on rows {composition}"
            )
        _compare_with_rows_alone(runner, report, composition, proposals, found, choices, alone_rows)
    return report


def _compare_with_rows_alone(
    runner: StepRunner,
    report: ShapeReport,
    composition: Composition,
    proposals: Proposals,
    found: Result,
    choices: Sequence[Choice],
    alone_rows: int,
) -> None:
    """Run some rows of a composition without the others and compare their logits with those of the batch. `choices`: of experts,
    in the batch, which rows alone are to make too, but in a deterministic engine, where they do."""
    judged = runner.deterministic or runner.model.dtype == torch.float32
    allowed = 0.0 if runner.deterministic else _ROUNDING
    starts = list(accumulate((row.num_samples for row in composition.rows), initial=-found.first_logits))
    emitting = [i for i, row in enumerate(composition.rows) if row.emits and starts[i] >= 0]
    others = random.Random(composition.seed).sample(emitting[:-1], len(emitting[:-1]))
    chosen = [*emitting[-1:], *others][:alone_rows]
    for index in sorted(chosen):
        shape = StepShape(composition.rows[index].query_len, 1, num_drafts=report.shape.num_drafts)
        first = sum(row.query_len for row in composition.rows[:index] if row.active)
        tokens = slice(first, first + shape.num_tokens)
        with imposed_choices(() if runner.deterministic else choices, tokens) as wrong:
            alone = run(runner, EagerGraph(runner.create_program(shape)), shape, composition, proposals, only=index)
        if wrong:
            report.mismatches.append(
                f"row {index} went to other experts than alone, in routers {', '.join(map(str, wrong))} of {len(choices)}, on "
                f"rows {composition}"
            )
        reference = alone.logits
        difference = (found.logits[starts[index] : starts[index + 1]] - reference).norm() / reference.norm()
        report.worst_alone_difference = max(report.worst_alone_difference, _nan_as_inf(difference.item()))
        if (judged and not difference <= allowed) or difference.isnan():
            report.mismatches.append(
                f"row {index} differs from the same row alone by {difference:.3g} of its logits' norm "
                f"(allowed: {allowed}) on rows {composition}"
            )


def verify_graphs(
    executor: Executor,
    *,
    rounds: int,
    seed: int,
    variants: Sequence[Variant] = (Variant.PLAIN,),
    draft_levels: Sequence[int] = (0,),
    alone_rows: int = 3,
    progress: bool = False,
) -> list[ShapeReport]:
    """Check every shape that can be captured, in each of `variants` and with each of `draft_levels` as the most
    proposals of a row, on `rounds` compositions each, on all ranks; no request may be running."""
    runner = runner_of(executor)
    rng = random.Random(seed)
    room = {
        "max_len": runner.max_model_len - 1,
        "num_blocks": runner.num_kv_blocks - 1,
        "block_size": runner.block_size,
    }
    reports = []
    shapes = [
        shape
        for num_drafts in draft_levels
        for variant in variants
        for shape in runner.policy.shapes(variant, num_drafts)
    ]
    for shape in tqdm(
        shapes, desc="verifying graphs", unit="graph", disable=not progress, leave=False, file=sys.stderr
    ):
        compositions = list(random_compositions(shape, rounds, rng, **room))
        found = executor.on_all(_verify_if_captured, shape, compositions, alone_rows)
        if ranks := [report for report in found if report is not None]:
            reports.append(_together(ranks, compositions))
    return reports


def _verify_if_captured(
    executor: LocalExecutor, shape: StepShape, compositions: Sequence[Composition], alone_rows: int
) -> ShapeReport | None:
    """`verify_shape` of one rank; None if the graph is over the memory budget, which it is then on all of them."""
    if executor.runner.graphs.store.graph(shape) is None:
        return None
    return verify_shape(executor.runner, shape, compositions, alone_rows)


def _together(ranks: Sequence[ShapeReport], compositions: Sequence[Composition]) -> ShapeReport:
    """One report of what all ranks have found at a shape."""
    if len(ranks) == 1:
        return ranks[0]
    mismatches = [f"rank {rank}: {text}" for rank, report in enumerate(ranks) for text in report.mismatches]
    for composition, *digests in zip(compositions, *(report.digests for report in ranks), strict=True):
        others = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
        if others:
            mismatches.append(
                f"rank {', '.join(others)} and rank 0 differ in tokens, logits, slots or residual stream on rows {composition}"
            )
    return replace(
        ranks[0],
        worst_graph_difference=max(report.worst_graph_difference for report in ranks),
        worst_alone_difference=max(report.worst_alone_difference for report in ranks),
        mismatches=mismatches,
    )


def _shared_digest(result: Result) -> str:
    """Of what every rank computes, or gets from the others: not of its own part of the cache."""
    digest = hashlib.sha256(repr((result.sampled, result.ring)).encode())
    for tensor in (result.lines, result.tokens, result.logits, result.logprobs, result.hidden):
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def _disagreement(found: Result, expected: Result) -> str | None:
    """The first part of two results that is not the same."""
    if found.ring != expected.ring:
        return f"tokens ({_first_difference(found.ring, expected.ring)})"
    names = {
        "lines": "slot lines",
        "tokens": "token history",
        "written": "KV cache",
        "draft_written": "the draft model's KV cache",
        "states": "layers' state of slots",
        "logits": "logits",
        "logprobs": "logprobs",
    }
    for name, title in names.items():
        if not torch.equal(getattr(found, name), getattr(expected, name)):
            if bool(getattr(expected, name).isnan().any()):
                return f"{name}, which hold NaN: something read a poisoned entry, or did not write one"
            return title
    return None


def _first_difference(found: list[list[int]], expected: list[list[int]]) -> str:
    row = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
    return f"row {row}: {found[row]} in the graph, {expected[row]} eagerly"


def _distance(a: Tensor, b: Tensor) -> float:
    return _nan_as_inf((a - b).abs().max().item()) if a.numel() else 0.0


def _as_json(report: ShapeReport) -> dict[str, Any]:
    fields = asdict(report) | {"shape": str(report.shape)}
    del fields["digests"]
    return fields


def _nan_as_inf(value: float) -> float:
    return value if value == value else float("inf")


def main_verify(
    config: EngineConfig,
    *,
    rounds: int,
    seed: int,
    variants: Sequence[Variant] = (Variant.PLAIN,),
    progress: bool,
    json_file: Path | None = None,
) -> int:
    """`stepgraph graphs verify`: build the engine's graphs, check them all, print a table, and write it to `json_file`.

    Returns:
        Exit code: 0 if everything agrees, 1 on a mismatch.
    """
    source = resolve_configured(config.model)
    executor = build_executor(config, source, progress=progress)
    specs, deterministic = executor.specs, config.model.deterministic
    ranks = f", {specs.num_ranks} ranks" if specs.num_ranks > 1 else ""
    print(
        f"{source.name}, {specs.dtype}, {specs.graph_backend} graphs on "
        f"{specs.platform}{ranks}; {rounds} compositions a shape, seed {seed}"
    )
    try:
        reports = verify_graphs(
            executor, rounds=rounds, seed=seed, variants=variants, draft_levels=specs.draft_levels, progress=progress
        )
    finally:
        executor.close()
    experts = "" if specs.dispatch is None else f"{'experts':>8} "
    print(f"{'tokens x rows':>24} {experts}{'compositions':>13} {'graph - eager':>14} {'batch - alone':>14}  result")
    for report in reports:
        way = experts and f"{specs.dispatch_of(report.shape):>8} "
        print(
            f"{report.shape!s:>24} {way}{report.compositions:>13} {report.worst_graph_difference:>14.3g} "
            f"{report.worst_alone_difference:>14.3g}  {'ok' if not report.mismatches else 'MISMATCH'}"
        )
    mismatches = [mismatch for report in reports for mismatch in report.mismatches]
    for mismatch in mismatches[:20]:
        print(f"  {mismatch}")
    print(
        f"{len(reports)} graphs, {sum(report.compositions for report in reports)} compositions, "
        f"{len(mismatches)} mismatches (graph - eager: largest logit difference; batch - alone: relative)"
    )
    if specs.dtype != "float32" and not deterministic:
        print("batch - alone is rounding here, and not judged; run with --dtype float32 for that check")
    if json_file is not None:
        write_json(
            json_file,
            {
                "machine": machine(specs.device),
                "model": source.name,
                "dtype": specs.dtype,
                "deterministic": deterministic,
                "num_ranks": specs.num_ranks,
                "backend": specs.graph_backend,
                "rounds": rounds,
                "seed": seed,
                "graphs": [_as_json(report) | {"dispatch": specs.dispatch_of(report.shape)} for report in reports],
                "mismatches": len(mismatches),
            },
        )
    return 1 if mismatches else 0
