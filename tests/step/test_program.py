"""The whole step: one captured program for every way to fill it, and the Triton kernels in it against the CPU's.

The mutants that the first claim must catch (padding, baked values, reads past the end) are in tests/graph/test_verify.py; those
of the tile bound are in tests/ops/test_attention.py.
"""

import pickle
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from triton_operators import triton_operators

from stepgraph import ops
from stepgraph.graph.eager import EagerGraph
from stepgraph.ops.attention import attention_geometry, max_tiles
from stepgraph.step.plan import StepPlan
from stepgraph.step.shape import StepShape
from stepgraph.verify.compositions import Composition, Row, random_compositions
from stepgraph.verify.graphs import verify_shape
from stepgraph.verify.trial import mostly_right_proposals, run

SHAPE = StepShape(160, 8)
"""The shape of the seed's bug: 160 tokens as [160, 0] need 13 query tiles of 64 (group 5), as [80, 80] 14."""
BLOCK_SIZE = 16


@pytest.fixture(scope="module")
def runner(create_engine):
    """Of an engine that has one graph, of 160 tokens in 8 rows."""
    engine = create_engine(max_num_batched_tokens=160, capture_sizes=(160,), num_kv_blocks=129)
    assert engine.executor.runner.policy.shapes() == [SHAPE]
    return engine.executor.runner


def partitions(total: int, max_parts: int, largest: int | None = None) -> Iterator[tuple[int, ...]]:
    """Every way to write `total` as a sum of at most `max_parts` positive parts, order aside."""
    if total == 0:
        yield ()
    elif max_parts:
        for first in range(min(total, largest or total), 0, -1):
            for rest in partitions(total - first, max_parts - 1, first):
                yield (first, *rest)


PARTITIONS = list(partitions(160, 3))


def composition(query_lens: Sequence[int], seed: int) -> Composition:
    """Rows of these lengths in random order, each after a random number of cached tokens; few are chunks of a prompt."""
    rng = random.Random(seed)
    rows = []
    for n in rng.sample(query_lens, len(query_lens)):
        computed = rng.choice((0, rng.randrange(96), rng.randrange(350)))
        rows.append(Row(computed, n, computed + n + (rng.random() < 0.1)))
    return Composition(tuple(rows), seed)


def assert_right(runner, compositions: Sequence[Composition], *, alone_rows: int = 2) -> None:
    """The graph gives on each what the same program gives eagerly, and what so many of its rows give alone."""
    report = verify_shape(runner, SHAPE, compositions, alone_rows=alone_rows)
    assert report.compositions == len(compositions)
    assert report.mismatches == []
    assert [str(record.shape) for record in runner.graphs.records()] == ["160x8"]


def test_there_are_2214_partitions_of_160_tokens_into_up_to_3_rows() -> None:
    assert len(set(PARTITIONS)) == 2214
    assert {sum(query_lens) for query_lens in PARTITIONS} == {160}


@pytest.mark.parametrize("tile", [16, 64])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8])
def test_the_tile_bound_holds_on_every_partition_and_is_reached(group, tile) -> None:
    tiles = [sum(-(-n * group // tile) for n in query_lens) for query_lens in PARTITIONS]
    assert max(tiles) == max_tiles(160, 3, group, tile) <= max_tiles(160, 8, group, tile)


@pytest.mark.slow
def test_one_graph_is_right_on_the_partitions_of_160_tokens_into_up_to_3_rows(runner, device) -> None:
    """On every one where kernels have tiles; where they have none, and tokens make no difference to a launch, on each fifth."""
    every = 1 if device == "cuda" else 5
    compositions = [composition(query_lens, seed) for seed, query_lens in enumerate(PARTITIONS)]
    extremes = sorted(compositions, key=lambda c: max(row.query_len for row in c.rows))
    with_rows_alone = {c.seed for c in (*compositions[:: 10 * every], *extremes[:10], *extremes[-10:])}
    assert_right(runner, [c for c in compositions if c.seed in with_rows_alone])
    others = [c for c in compositions[every // 2 :: every] if c.seed not in with_rows_alone]
    assert_right(runner, others, alone_rows=0)


def num_random(device: str) -> int:
    """Random compositions, of which the CPU's kernels, which have neither tiles nor splits, need fewer."""
    return 500 if device == "cuda" else 120


def test_one_graph_is_right_on_random_compositions_of_up_to_8_rows(runner, device) -> None:
    room = {"max_len": runner.max_model_len - 1, "num_blocks": runner.num_kv_blocks - 1, "block_size": BLOCK_SIZE}
    assert_right(runner, list(random_compositions(SHAPE, num_random(device), random.Random(0), **room)))


def test_one_graph_is_right_on_random_compositions_that_verify_proposals(create_engine, device) -> None:
    """Uneven numbers of them, beside chunks of prompts, in a shape whose tokens are no multiple of what a row can have."""
    shape = StepShape(40, 6, num_drafts=5)
    engine = create_engine(
        max_num_seqs=6,
        max_num_batched_tokens=40,
        capture_sizes=(40,),
        capture_rows=(6,),
        speculative_config={"method": "mtp", "num_speculative_tokens": 5},
    )
    room = {"max_len": engine.executor.runner.max_model_len - 1, "num_blocks": 128, "block_size": BLOCK_SIZE}
    compositions = list(random_compositions(shape, num_random(device) // 3, random.Random(1), **room))
    report = verify_shape(engine.executor.runner, shape, compositions, alone_rows=2)
    assert report.compositions == len(compositions)
    assert report.mismatches == []


GROUP = 2
TILE = attention_geometry(160, 8, 4, 2, multiprocessors=1).tile // GROUP
"""Tokens of a query tile of the tiny model."""
FAMILIES = {
    "all ones and the rest": [[1] * (rows - 1) + [161 - rows] for rows in range(1, 9)],
    "ones only": [[1] * rows for rows in range(1, 9)],
    "tile borders": [
        lens
        for a in (-1, 0, 1)
        for b in (-1, 0, 1)
        for lens in (
            [TILE + a, TILE + b],
            [2 * TILE + a, TILE + b, 1],
            [TILE + a] * 2 + [TILE + b] * 2,
            [TILE + a] + [1] * 7,
        )
    ],
    "one row": [[n] for n in (1, 2, TILE - 1, TILE, TILE + 1, 79, 80, 81, 159, 160)],
    "even rows": [[160 // rows] * rows for rows in range(1, 9)],
}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_graph_is_right_on_adversarial_compositions(runner, family) -> None:
    assert_right(runner, [composition(lens, seed) for lens in FAMILIES[family] for seed in range(3)])


@pytest.mark.parametrize("border", [BLOCK_SIZE, 64, 256])
def test_one_graph_is_right_with_contexts_around_borders_of_blocks_and_key_ranges(runner, border) -> None:
    assert_right(
        runner,
        [
            Composition(
                tuple(Row(c, n, c + n) for c, n in zip(computed, query_lens, strict=False)), seed=len(query_lens)
            )
            for query_lens in ([1, 1, 1], [border % 100 + 1, 1, 2])
            for computed in permutations((border - 2, border - 1, border))
        ],
    )


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")  # padding computes on what memory held
@pytest.mark.parametrize(
    "shape",
    [
        StepShape(12, 4),
        StepShape(40, 3),
        StepShape(23, 5, num_drafts=3),
        StepShape(1, 1),
        StepShape(7, 1),
        StepShape(5, 1, num_drafts=3),
    ],
    ids=str,
)
def test_a_step_of_triton_kernels_is_the_step_of_cpu_kernels(create_engine, device, shape, monkeypatch) -> None:
    """On random compositions among poisoned entries: same tokens, proposals and state, same keys, values and logits up to
    rounding."""
    settings = {"graph_backend": "eager", "num_kv_blocks": 40}
    if shape.num_drafts:
        settings["speculative_config"] = {"method": "hybrid", "num_speculative_tokens": shape.num_drafts}
    reference = create_engine(**settings, device="cpu").executor.runner
    runner = create_engine(**settings, device=device).executor.runner
    if device == "cpu":
        runner._multiprocessors = 4  # enough programs for rows to be split over their keys
        kernel_of_one_row = sys.modules[ops.rope_attention.__module__]
    room = {"max_len": 450, "num_blocks": 39, "block_size": BLOCK_SIZE}
    compositions = list(random_compositions(shape, 4, random.Random(shape.num_tokens), **room))
    for composition in compositions[1::2]:  # uneven rows, and random ones or as many proposals as fit
        eager = EagerGraph(reference.create_program(shape))
        proposals = mostly_right_proposals(reference, eager, shape, composition)
        expected = run(reference, eager, shape, composition, proposals)
        with triton_operators(), monkeypatch.context() as patch:
            if device == "cpu":
                patch.setattr(
                    kernel_of_one_row, "has_kernel", lambda _qkv, _dim, geometry, _window: geometry.is_one_row
                )
            found = run(runner, EagerGraph(runner.create_program(shape)), shape, composition, proposals)
        assert found.ring == expected.ring, composition
        assert torch.equal(found.lines.cpu(), expected.lines)
        assert torch.equal(found.tokens[1:].cpu(), expected.tokens[1:])  # what the null slot holds is nobody's
        assert found.strays == expected.strays == 0
        for name in ("written", "draft_written"):
            torch.testing.assert_close(getattr(found, name).cpu(), getattr(expected, name), atol=2e-4, rtol=2e-4)
        torch.testing.assert_close(found.logits.cpu(), expected.logits, atol=2e-3, rtol=2e-3)


def test_a_plan_of_the_epoch_that_lies_on_the_device_sends_its_deltas_only(runner) -> None:
    first = StepPlan(((1, 1), (2, 1)), ((2, 0, 5),), 0, epoch=7)

    def sent(plan: StepPlan) -> list[bool]:
        """Whether rows and deltas were written."""
        runner.state.plan.fill_(-1)
        runner.load(plan, SHAPE)
        return [
            bool((part >= 0).any())
            for part in runner.state.plan[: SHAPE.plan_length(BLOCK_SIZE)].split(SHAPE.deltas_start)
        ][:2]

    with runner.workbench():
        assert sent(first) == [True, True]
        assert sent(replace(pickle.loads(pickle.dumps(first)), deltas=())) == [False, False]
        assert sent(replace(first, deltas=((1, 0, 6),))) == [False, True]
        assert sent(replace(first, epoch=8, deltas=())) == [True, True]
        assert sent(replace(first, epoch=None)) == sent(replace(first, epoch=None, deltas=())) == [True, True]
        runner.state.plan.zero_()
