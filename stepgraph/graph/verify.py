"""Are the captured graphs right? Replays every captured shape on random compositions and compares.

Three runs of the same composition must agree:

- the captured graph;
- its eager twin, the same program at the same padded shape: tokens, logits, SlotState and KV cache must be the same;
- some of its rows alone, eagerly, at their exact shape: logits must be the same up to rounding (bit for bit in a
  deterministic engine). This catches what graph and twin would get wrong together, such as a launch grid too small for the
  composition.

Everything a step must not read is poisoned: every KV entry outside the rows' contexts, the null block's included, is NaN.
And it must write to its own tokens' entries and to the null block only.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from stepgraph.config import EngineConfig
from stepgraph.engine.engine import Engine
from stepgraph.graph.base import Graph
from stepgraph.graph.eager import EagerGraph
from stepgraph.ops import slot_line
from stepgraph.step.plan import StepPlan
from stepgraph.step.program import StepOutput
from stepgraph.step.runner import StepRunner
from stepgraph.step.shape import StepShape, Variant
from stepgraph.step.state import SlotSampling

Value = TypeVar("Value")

_ROUNDING = 1e-3
"""Largest ‖difference‖ / ‖logits‖ that the order of additions may cause in float32. In 16 bits a deep model on random tokens
amplifies rounding without bound (SmolLM2: up to 0.9), so there the figure is reported and not judged."""


@dataclass(frozen=True)
class Row:
    """One row of a composition: `query_len` tokens after `computed` cached ones, of `length` known."""

    computed: int
    query_len: int
    length: int
    active: bool = True

    @property
    def emits(self) -> bool:
        return self.active and self.computed + self.query_len == self.length


@dataclass(frozen=True)
class Composition:
    """A batch for one step; `seed` decides its tokens, blocks and cached values."""

    rows: tuple[Row, ...]
    seed: int

    def __str__(self) -> str:
        return " ".join(f"{row.query_len}@{row.computed}{'' if row.active else '!'}" for row in self.rows)


@dataclass
class ShapeReport:
    """What was found at one shape."""

    shape: StepShape
    compositions: int = 0
    worst_graph_difference: float = 0.0  # largest |logit difference| to the eager twin
    worst_alone_difference: float = 0.0  # largest ‖difference‖ / ‖logits‖ to rows run alone
    mismatches: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class _Result:
    logits: Tensor  # [rows that emit, V] float32
    ring: list[list[int]]
    lines: Tensor
    tokens: Tensor
    written: Tensor  # keys and values this step wrote, all layers
    strays: int  # cache entries that changed beside those and the null block's
    logprobs: Tensor  # what the step reported, bits


def random_compositions(
    shape: StepShape, count: int, rng: random.Random, *, max_len: int, num_blocks: int, block_size: int
) -> Iterator[Composition]:
    """Compositions of up to `shape.num_rows` rows and up to `shape.num_tokens` tokens, of sequences that an engine can hold.

    The first are adversarial: one row of everything; all rows one token and the last the rest; all rows one token. The
    others mix decodes, whole prompts and chunks at random, now and then with a row that the device has already ended.

    Args:
        shape: to fill.
        count: how many.
        rng: decides everything.
        max_len: tokens of the longest sequence.
        num_blocks: KV blocks for all rows together.
        block_size: tokens per KV block.
    """
    T, R = shape.num_tokens, shape.num_rows
    max_len = min(max_len, num_blocks * block_size)
    families = [[T], [1] * (R - 1) + [T - R + 1], [1] * R]
    for index in range(count):
        if index < len(families):
            lengths = families[index]
        else:
            rows = rng.randint(1, R)
            cuts = sorted(rng.sample(range(1, rng.randint(rows, T) + 1), rows))
            lengths = [b - a for a, b in zip([0, *cuts], cuts, strict=False)]
            rng.shuffle(lengths)
        lengths = [min(n, max_len) for n in lengths]
        while (spare := num_blocks - sum(-(-n // block_size) for n in lengths)) < 0:
            lengths = lengths[1:]
        max_computed = min(max_len // 2 // len(lengths), spare // len(lengths) * block_size)
        yield Composition(
            tuple(_random_row(n, max_computed, max_len, rng, may_end=index >= len(families)) for n in lengths),
            seed=rng.getrandbits(32),
        )


def _random_row(query_len: int, max_computed: int, max_len: int, rng: random.Random, *, may_end: bool) -> Row:
    computed = rng.choice((0, rng.randint(0, min(max_computed, max_len - query_len))))
    end = computed + query_len
    unread = rng.choice((0, 0, rng.randint(0, min(64, max_len - end))))  # prompt left for later steps
    return Row(computed, query_len, end + unread, active=not may_end or rng.random() > 0.1)


def random_sampling(rng: random.Random, variant: Variant, vocab_size: int) -> SlotSampling:
    """What a row may ask of a graph of `variant`, each feature with some chance."""

    def maybe(value: Value, nothing: Value) -> Value:
        return value if rng.random() < 0.4 else nothing

    plain = SlotSampling(
        seed=rng.getrandbits(64),
        temperature=maybe(rng.uniform(0.2, 2.0), 0.0),
        top_k=maybe(rng.randint(1, vocab_size), 0),
        top_p=maybe(rng.uniform(0.1, 1.0), 1.0),
        min_p=maybe(rng.uniform(0.0, 0.2), 0.0),
    )
    if variant is Variant.PLAIN:
        return plain
    token = partial(rng.randrange, vocab_size)
    return replace(
        plain,
        repetition_penalty=maybe(rng.uniform(0.5, 2.0), 1.0),
        presence_penalty=maybe(rng.uniform(-2.0, 2.0), 0.0),
        frequency_penalty=maybe(rng.uniform(-2.0, 2.0), 0.0),
        min_tokens=maybe(rng.randint(0, 40), 0),
        logit_bias=maybe(tuple((token(), rng.uniform(-5, 5)) for _ in range(rng.randint(1, 9))), ()),
        bad_words=maybe(tuple((token(),) for _ in range(rng.randint(1, 9))), ()),
        masked=maybe(True, False),
        num_logprobs=maybe(rng.randint(1, 1 + slot_line.MAX_LOGPROBS), 0),
        num_prompt_logprobs=maybe(rng.randint(1, 1 + slot_line.MAX_LOGPROBS), 0),
    )


def _poison(cache: Tensor) -> None:
    if cache.dtype == torch.float8_e4m3fn:  # on CPU, torch cannot fill it
        cache.view(torch.uint8).fill_(0x7F)
    else:
        cache.fill_(torch.nan)


def _random_mask(rng: random.Random, vocab_size: int) -> npt.NDArray[np.int32]:
    """Allows about half of the tokens."""
    words = -(-vocab_size // slot_line.MASK_BITS)
    return np.frombuffer(rng.randbytes(4 * words), dtype=np.int32)


def verify_shape(
    runner: StepRunner, shape: StepShape, compositions: Sequence[Composition], alone_rows: int
) -> ShapeReport:
    """Check one captured shape; captures it if need be.

    Args:
        runner: with a KV cache that holds the compositions; its slots must be free.
        shape: one of `runner.pool.shapes()`.
        compositions: that fit the shape.
        alone_rows: rows of each composition that are also run alone; the last is always among them.
    """
    graph = runner.pool.graph(shape)
    assert graph is not None, f"{shape} is over the graph memory budget"
    twin = runner.pool.eager_twin(shape)
    report = ShapeReport(shape)
    judged = runner.deterministic or next(runner.model.parameters()).dtype == torch.float32
    allowed = 0.0 if runner.deterministic else _ROUNDING
    for composition in compositions:
        report.compositions += 1
        expected = _run(runner, twin, shape, composition)
        found = _run(runner, graph, shape, composition)
        report.worst_graph_difference = max(report.worst_graph_difference, _distance(found.logits, expected.logits))
        if found.strays:
            report.mismatches.append(
                f"{found.strays} cache entries of no token of the step were written on rows {composition}"
            )
        if problem := _disagreement(found, expected):
            report.mismatches.append(f"graph and eager differ in {problem} on rows {composition}")
        emitting = [i for i, row in enumerate(composition.rows) if row.emits]
        chosen = set(emitting[-1:]) | set(
            random.Random(composition.seed).sample(emitting, min(alone_rows, len(emitting)))
        )
        for index in sorted(chosen):
            row_shape = StepShape(composition.rows[index].query_len, 1)
            alone = _run(runner, EagerGraph(runner.create_program(row_shape)), row_shape, composition, only=index)
            reference = alone.logits[0]
            difference = (found.logits[emitting.index(index)] - reference).norm() / reference.norm()
            report.worst_alone_difference = max(report.worst_alone_difference, _nan_as_inf(difference.item()))
            if (judged and not difference <= allowed) or difference.isnan():
                report.mismatches.append(
                    f"row {index} differs from the same row alone by {difference:.3g} of its logits' norm "
                    f"(allowed: {allowed}) on rows {composition}"
                )
    return report


def verify_pool(
    runner: StepRunner,
    *,
    rounds: int,
    seed: int,
    variants: Sequence[Variant] = (Variant.PLAIN,),
    alone_rows: int = 2,
    progress: bool = False,
) -> list[ShapeReport]:
    """Check every shape of the pool that can be captured, in each of `variants`, on `rounds` compositions each."""
    rng = random.Random(seed)
    room = {
        "max_len": runner.max_model_len - 1,
        "num_blocks": runner.num_kv_blocks - 1,
        "block_size": runner.block_size,
    }
    reports = []
    shapes = [shape for variant in variants for shape in runner.pool.shapes(variant)]
    for shape in tqdm(
        shapes, desc="verifying graphs", unit="graph", disable=not progress, leave=False, file=sys.stderr
    ):
        if runner.pool.graph(shape) is None:
            continue  # over the memory budget
        compositions = list(random_compositions(shape, rounds, rng, **room))
        reports.append(verify_shape(runner, shape, compositions, alone_rows))
    return reports


def _run(
    runner: StepRunner, graph: Graph[StepOutput], shape: StepShape, composition: Composition, only: int | None = None
) -> _Result:
    """Lay a composition out in fresh state and run one step of it, or of one of its rows."""
    with runner.workbench():
        return _lay_out_and_run(runner, graph, shape, composition, only)


def _lay_out_and_run(
    runner: StepRunner, graph: Graph[StepOutput], shape: StepShape, composition: Composition, only: int | None
) -> _Result:
    state, block_size, device = runner.state, runner.block_size, runner.platform.device
    generator = torch.Generator().manual_seed(composition.seed)
    vocab = runner.vocab_size
    state.lines.zero_()
    state.block_table.zero_()
    state.tokens.copy_(torch.randint(vocab, state.tokens.shape, generator=generator, dtype=torch.int32))
    for ring in (state.logprob_ring, state.prompt_logprob_ring):
        ring.zero_()
    for caches in runner.kv_caches:
        for cache in caches:
            _poison(cache)

    free_blocks = (torch.randperm(runner.num_kv_blocks - 1, generator=generator) + 1).tolist()
    settings = random.Random(composition.seed)
    plan_rows: list[tuple[int, int]] = []
    deltas: list[tuple[int, int, int]] = []
    prefix_slots: list[int] = []
    written_slots: list[int] = []
    emitting: list[int] = []
    for slot, row in enumerate(composition.rows, start=1):
        end = row.computed + row.query_len
        blocks = [free_blocks.pop() for _ in range(-(-end // block_size))]
        known = -(-row.computed // block_size)
        sampling = random_sampling(settings, shape.variant, vocab)
        state.admit(
            slot,
            tokens=state.tokens[slot, : row.length].tolist(),
            prompt_len=settings.randint(1, row.length),
            blocks=blocks[:known],
            computed=row.computed,
            generation=slot - 1,
            max_length=row.length + 100,
            sampling=sampling,
        )
        if sampling.masked:
            state.set_mask(slot, _random_mask(settings, vocab))
        if not row.active:
            state.lines[slot, slot_line.ACTIVE] = 0
        entries = [blocks[p // block_size] * block_size + p % block_size for p in range(end)]
        prefix_slots.extend(entries[: row.computed])
        if only is None or slot - 1 == only:
            plan_rows.append((slot, row.query_len))
            deltas.extend((slot, i, blocks[i]) for i in range(known, len(blocks)))
            if row.active:
                written_slots.extend(entries[row.computed :])
            if row.emits:
                emitting.append(len(plan_rows) - 1)

    prefix = torch.tensor(prefix_slots, device=device, dtype=torch.long)
    for caches in runner.kv_caches:
        for cache in caches:
            values = torch.randn(len(prefix_slots), cache[0, 0].numel(), generator=generator)
            flat = cache.view(-1, cache[0, 0].numel())
            flat[prefix] = values.to(device, cache.dtype)

    plan = StepPlan(tuple(plan_rows), tuple(deltas), 0, shape.variant)
    runner.load(plan, shape)
    first_cache = runner.kv_caches[0][0].flatten(0, 1).flatten(1)  # one will do: all layers write to the same entries
    prefix_before = first_cache[prefix]
    output = graph.replay()
    runner.platform.synchronize()
    written = torch.tensor(written_slots, device=device, dtype=torch.long)
    changed = ~first_cache[:, 0].isnan()
    changed[prefix] = (first_cache[prefix] != prefix_before).any(1)
    changed[written] = False
    changed[: block_size * (slot_line.NULL_BLOCK + 1)] = False
    return _Result(
        logits=output.logits[emitting].float().clone(),
        ring=state.ring[0, : len(plan_rows)].tolist(),
        lines=state.lines.clone(),
        tokens=state.tokens.clone(),
        written=torch.stack(
            [cache.view(-1, *cache.shape[2:])[written] for caches in runner.kv_caches for cache in caches]
        ),
        strays=int(changed.sum()),
        logprobs=torch.cat((state.logprob_ring[0], state.prompt_logprob_ring[0])),
    )


def _disagreement(found: _Result, expected: _Result) -> str | None:
    """The first part of two results that is not the same."""
    if found.ring != expected.ring:
        return f"tokens ({_first_difference(found.ring, expected.ring)})"
    for name in ("lines", "tokens", "written", "logits", "logprobs"):
        if not torch.equal(getattr(found, name), getattr(expected, name)):
            if bool(getattr(expected, name).isnan().any()):
                return f"{name}, which hold NaN: something read a poisoned entry"
            return {"lines": "slot lines", "tokens": "token history", "written": "KV cache"}.get(name, name)
    return None


def _first_difference(found: list[list[int]], expected: list[list[int]]) -> str:
    row = next(i for i, (a, b) in enumerate(zip(found, expected, strict=True)) if a != b)
    return f"row {row}: {found[row]} in the graph, {expected[row]} eagerly"


def _distance(a: Tensor, b: Tensor) -> float:
    return _nan_as_inf((a - b).abs().max().item()) if a.numel() else 0.0


def _nan_as_inf(value: float) -> float:
    return value if value == value else float("inf")


def main_verify(
    config: EngineConfig, *, rounds: int, seed: int, variants: Sequence[Variant] = (Variant.PLAIN,), progress: bool
) -> int:
    """`stepgraph graphs verify`: build the engine's graphs, check them all, print a table.

    Returns:
        Exit code: 0 if everything agrees, 1 on a mismatch.
    """
    engine = Engine(config, progress=progress)
    runner = engine.runner
    print(
        f"{engine.source.name}, {str(engine.dtype).removeprefix('torch.')}, {runner.pool.backend_name} graphs on "
        f"{engine.platform.name}; {rounds} compositions a shape, seed {seed}"
    )
    reports = verify_pool(runner, rounds=rounds, seed=seed, variants=variants, progress=progress)
    print(f"{'tokens x rows':>24} {'compositions':>13} {'graph - eager':>14} {'batch - alone':>14}  result")
    for report in reports:
        print(
            f"{report.shape!s:>24} {report.compositions:>13} {report.worst_graph_difference:>14.3g} "
            f"{report.worst_alone_difference:>14.3g}  {'ok' if not report.mismatches else 'MISMATCH'}"
        )
    mismatches = [mismatch for report in reports for mismatch in report.mismatches]
    for mismatch in mismatches[:20]:
        print(f"  {mismatch}")
    print(
        f"{len(reports)} graphs, {sum(report.compositions for report in reports)} compositions, "
        f"{len(mismatches)} mismatches (graph - eager: largest logit difference; batch - alone: relative)"
    )
    if engine.dtype != torch.float32 and not runner.deterministic:
        print("batch - alone is rounding here, and not judged; run with --dtype float32 for that check")
    return 1 if mismatches else 0
