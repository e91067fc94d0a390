"""Which layers share a block table, what a block of theirs takes, and how plans reach the tables."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from stepgraph.abi.block_groups import BlockGroups
from stepgraph.layers.cache import LatentSpec, PagedSpec
from stepgraph.platforms import create_platform
from stepgraph.step.memory import CacheLayout
from stepgraph.step.plan import BlockTables, StepPlan
from stepgraph.step.shape import StepShape

BLOCK_SIZE = 16


def paged(window: int = 0, **options) -> PagedSpec:
    return PagedSpec(4, 128, torch.bfloat16, window, **options)


def layout(*specs, draft=(), apart_for: int = 1 << 17, lookahead: int = 0) -> CacheLayout:
    return CacheLayout(specs, draft, BLOCK_SIZE, 3, 0, lookahead, apart_for)


def repeated(num_layers: int, every: int, window: int) -> list[PagedSpec]:
    """Every so many layers, one sees all tokens."""
    return [paged(0 if index % every == every - 1 else window) for index in range(num_layers)]


@pytest.mark.parametrize(
    ("specs", "groups", "num_layers_kept"),
    [
        (repeated(62, 6, 1024), BlockGroups(1, 5, 1024), 11),  # Gemma 3 27B: ten layers of 62 see all tokens
        (repeated(48, 6, 1024), BlockGroups(1, 5, 1024), 8),  # 12B
        (repeated(26, 6, 512), BlockGroups(1, 6, 512), 4),  # 1B
        (repeated(24, 2, 128), BlockGroups(1, 1, 128), 12),  # gpt-oss 20B
        (repeated(64, 4, 4096), BlockGroups(1, 3, 4096), 16),  # OLMo 3 32B
    ],
)
def test_a_long_context_takes_what_the_layers_keep_that_see_all_tokens(specs, groups, num_layers_kept) -> None:
    found, alone = layout(*specs), layout(*specs, apart_for=0)
    assert (found.groups, alone.groups) == (groups, BlockGroups())
    of_layer = 2 * BLOCK_SIZE * 4 * 128 * 2
    assert alone.block_bytes == len(specs) * of_layer
    assert found.block_bytes <= 1.15 * alone.block_bytes  # short prompts take hardly more
    group_bytes = found.block_bytes // groups.size
    assert group_bytes == num_layers_kept * of_layer
    num_tokens = 1 << 17
    taken = groups.most_held(num_tokens, 1, BLOCK_SIZE) * group_bytes
    share = num_layers_kept / len(specs)
    assert share <= taken / (num_tokens // BLOCK_SIZE * alone.block_bytes) <= share + 0.04


def test_gemma_3_27b_takes_a_fifth_at_32k_tokens() -> None:
    specs = repeated(62, 6, 1024)
    found = layout(*specs)
    taken = found.groups.most_held(32768, 1, BLOCK_SIZE) * found.block_bytes // found.groups.size
    assert taken < 0.21 * 2048 * layout(*specs, apart_for=0).block_bytes


@pytest.mark.parametrize(
    ("specs", "options", "groups"),
    [
        ((paged(), paged()), {}, BlockGroups()),
        ((paged(24), paged(40)), {}, BlockGroups.one(40)),
        ((paged(24), paged(40), paged()), {}, BlockGroups(1, 2, 40)),
        ((paged(24), paged()), {"apart_for": 24}, BlockGroups()),  # no request is longer than the window
        ((paged(24), paged()), {"apart_for": 25}, BlockGroups(1, 1, 24)),
        ((paged(24), PagedSpec(2, 128, torch.bfloat16)), {}, BlockGroups()),  # of other sizes
        ((paged(24), LatentSpec(1024, torch.bfloat16)), {}, BlockGroups()),
        ((paged(), *[paged()] * 9, paged(24)), {}, BlockGroups()),  # hardly anything to gain
        ((paged(24), paged(), paged(40, shares=0)), {}, BlockGroups(1, 1, 40)),
        ((paged(24), paged(), paged(shares=0)), {}, BlockGroups()),  # all layers' blocks are needed
        ((paged(24), paged()), {"draft": (paged(24),), "lookahead": 1}, BlockGroups(1, 2, 24)),
        ((paged(24), paged()), {"draft": (paged(),) * 2, "lookahead": 2}, BlockGroups()),  # two groups of a drafter's
        ((paged(24),) * 2 + (paged(),) * 2, {"draft": (paged(24),) * 2, "lookahead": 2}, BlockGroups(1, 2, 25)),
    ],
)
def test_layers_are_apart_where_it_saves_memory_and_all_are_alike(specs, options, groups) -> None:
    assert layout(*specs, **options).groups == groups


def test_layers_of_different_groups_share_tensors_and_those_of_one_group_do_not() -> None:
    specs = (*repeated(6, 3, 32), paged(32, shares=3))
    found = layout(*specs)
    assert found.groups == BlockGroups(1, 2, 32)
    caches = found.allocate(7, create_platform("cpu").memory([], sleepable=False))
    assert [cache.group for cache in caches] == [1, 1, 0, 2, 2, 0, 2]
    addresses = [cache.keys.data_ptr() for cache in caches]
    assert addresses[6] == addresses[3]
    assert len({(cache.group, cache.keys.data_ptr()) for cache in caches}) == 6
    tensors = {t.data_ptr(): t for cache in caches for t in cache.block_tensors}.values()
    assert all(tensor.shape[0] == 6 * 3 + 1 for tensor in tensors)
    assert sorted(found.sizes(7)) == sorted(tensor.nbytes for tensor in tensors)
    assert sum(found.sizes(7)) == found.block_bytes // 3 * 19
    assert replace(found, num_lines=1).groups == found.groups


def test_deltas_go_to_the_tables_of_their_groups() -> None:
    """In a table of each of 3 groups, of 5 slots."""
    shape, tables = StepShape(16, 2), BlockTables(BLOCK_SIZE, 3, 5)
    plan = StepPlan(((6, 16),), tuple((6, index, 10 + index) for index in range(3, 9)), 1)
    out = np.zeros(shape.plan_length(BLOCK_SIZE, 3), dtype=np.int32)
    plan.pack(shape, tables, out, first_slot=4)
    rows, deltas = out[:4].tolist(), out[4:].reshape(-1, 3).tolist()
    assert rows == [2, 16, 0, 0]
    assert deltas[:6] == [[2, 1, 13], [7, 1, 14], [12, 1, 15], [2, 2, 16], [7, 2, 17], [12, 2, 18]]
    assert deltas[6:] == [[0, 0, 0]] * 3
