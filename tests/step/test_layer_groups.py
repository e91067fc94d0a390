"""Which layers share a block table, what a block of theirs takes, and how plans reach the tables."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stepgraph import ops
from stepgraph.abi.block_groups import BlockGroups
from stepgraph.layers.cache import LatentSpec, PagedSpec
from stepgraph.platforms import create_platform
from stepgraph.step.admission import Admission
from stepgraph.step.memory import CacheLayout
from stepgraph.step.plan import BlockTables, StepPlan
from stepgraph.step.shape import StepShape
from stepgraph.step.slot_sampling import SlotSampling
from stepgraph.step.state import SlotState

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


def gemma_4(num_layers: int, every: int, window: int, *, heads: tuple[int, int], shared: int = 0) -> list[PagedSpec]:
    """As `repeated`, with so many heads of 256 in layers with a window and of 512 in the others. The last `shared` layers use the
    caches of earlier ones."""
    bf16 = torch.bfloat16
    specs = [
        PagedSpec(heads[1], 512, bf16) if index % every == every - 1 else PagedSpec(heads[0], 256, bf16, window)
        for index in range(num_layers)
    ]
    own = num_layers - shared
    last = {spec.window: index for index, spec in enumerate(specs[:own])}
    return specs[:own] + [replace(spec, shares=last[spec.window]) for spec in specs[own:]]


@pytest.mark.parametrize(
    ("specs", "groups", "splits", "mib", "mib_alone"),
    [
        (gemma_4(35, 5, 512, heads=(1, 1), shared=20), BlockGroups(2, 4, 512), (2, 1, 1, 1, 1), 198, 576),  # E2B
        (gemma_4(42, 6, 512, heads=(2, 2), shared=18), BlockGroups(2, 5, 512), (2, *[1] * 5), 533, 1792),  # E4B
        (gemma_4(48, 6, 1024, heads=(8, 1)), BlockGroups(1, 20, 1024), (1, *[4] * 5), 842, 10752),  # 12B
        (gemma_4(60, 6, 1024, heads=(16, 4)), BlockGroups(1, 10, 1024), (1, *[2] * 5), 3385, 28160),  # 31B
        (gemma_4(30, 6, 1024, heads=(8, 2)), BlockGroups(1, 10, 1024), (1, *[2] * 5), 846, 7040),  # 26B-A4B
        (gemma_4(30, 6, 1024, heads=(2, 1)), BlockGroups(1, 5, 1024), (1,) * 6, 372, 1920),  # a rank of four
    ],
)
def test_layers_with_more_bytes_of_a_token_have_blocks_of_fewer(specs, groups, splits, mib, mib_alone) -> None:
    """Gemma 4, and what a prompt of 32,768 tokens takes, to a MiB, apart and in one group."""
    found, alone = layout(*specs), layout(*specs, apart_for=0)
    assert (found.groups, found.splits, alone.groups, alone.splits) == (groups, splits, BlockGroups(), (1,))
    assert found.block_bytes == alone.block_bytes  # short prompts take no more
    taken = groups.most_held(32768, 1, BLOCK_SIZE) * found.block_bytes // groups.size
    assert (round(taken / 2**20), 2048 * alone.block_bytes // 2**20) == (mib, mib_alone)


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
        ((paged(24), PagedSpec(3, 128, torch.bfloat16)), {}, BlockGroups()),  # no number of blocks makes them equal
        ((paged(24), PagedSpec(32, 128, torch.bfloat16)), {}, BlockGroups()),  # eight would
        ((paged(24), PagedSpec(8, 128, torch.float8_e4m3fn)), {}, BlockGroups()),  # of another dtype
        ((paged(24), PagedSpec(2, 128, torch.bfloat16)), {}, BlockGroups(1, 2, 24)),
        ((paged(24), PagedSpec(2, 256, torch.bfloat16)), {}, BlockGroups(1, 1, 24)),
        ((paged(24), paged(24), PagedSpec(16, 128, torch.bfloat16)), {}, BlockGroups(4, 2, 24)),
        ((paged(24), PagedSpec(2, 128, torch.bfloat16), PagedSpec(8, 128, torch.bfloat16)), {}, BlockGroups(5, 2, 24)),
        ((paged(24), PagedSpec(2, 256, torch.bfloat16)), {"draft": (paged(24),)}, BlockGroups(1, 2, 24)),
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


def test_parts_of_a_block_are_as_the_layer_sees_them() -> None:
    """The narrow layer's block of 16 tokens is the wide one's of 4."""
    specs = (PagedSpec(4, 64, torch.bfloat16, 32), PagedSpec(1, 64, torch.bfloat16))
    found = layout(*specs)
    assert (found.groups, found.splits) == (BlockGroups(1, 4, 32), (1, 4))
    memory = create_platform("cpu").memory([], sleepable=False)
    wide, narrow = found.allocate(7, memory)
    assert (wide.group, narrow.group) == (1, 0)
    assert (wide.keys.shape, narrow.keys.shape) == ((31, 4, 4, 64), (31, 16, 1, 64))
    assert wide.keys.data_ptr() == narrow.keys.data_ptr() != wide.values.data_ptr() == narrow.values.data_ptr()
    narrow.keys[5] = 1
    assert wide.keys[5].eq(1).all()
    assert wide.keys.sum() == narrow.keys[5].numel()
    assert sum(found.sizes(7)) == 31 * 2 * wide.keys[0].nbytes == 30 * found.block_bytes // 5 + 2 * wide.keys[0].nbytes


@given(
    splits=st.lists(st.sampled_from([1, 2, 4]), min_size=1, max_size=4).map(tuple),
    num_places=st.integers(1, 4),
    num_known=st.integers(0, 4),
)
@settings(max_examples=40, deadline=None)
def test_every_position_is_in_the_block_of_its_place_and_group(splits, num_places, num_known) -> None:
    """By what a request is admitted with, and by what it is granted later."""
    num_known, slot = min(num_known, num_places), 2
    tables, shape = BlockTables(BLOCK_SIZE, splits, 3), StepShape(64, 2)
    platform = create_platform("cpu")
    state = SlotState(max_num_seqs=2, max_model_len=80, tables=tables, vocab_size=9, max_shape=shape, platform=platform)
    blocks = [7 + 3 * number for number in range(num_places * tables.per_place)]
    known = num_known * tables.per_place
    computed = num_known * BLOCK_SIZE
    admission = Admission(
        slot, range(computed + 1), 1, 1, 80, SlotSampling(seed=0), blocks=blocks[:known], computed=computed
    )
    state.admit(admission)
    deltas = tuple((slot, number, blocks[number]) for number in range(known, len(blocks)))
    StepPlan(((slot, 1),), deltas, 0).pack(shape, tables, state.plan.numpy())
    num_deltas = shape.num_deltas(BLOCK_SIZE, tables.per_place)
    ops.build_step(state.plan, state.lines, state.tokens, state.tables, 64, 2, 2, num_deltas, tables.block_sizes[0])
    first = 0
    for split, size, table in zip(splits, tables.block_sizes, state.block_tables, strict=True):
        for position in range(num_places * BLOCK_SIZE):
            place, within = divmod(position, BLOCK_SIZE)
            assert table[slot, position // size] == blocks[place * tables.per_place + first + within // size]
        assert not table[[0, 1]].any()
        first += split


def test_deltas_go_to_the_tables_of_their_groups() -> None:
    """In a table of each of 3 groups, of 5 slots."""
    shape, tables = StepShape(16, 2), BlockTables(BLOCK_SIZE, (1, 1, 1), 5)
    plan = StepPlan(((6, 16),), tuple((6, index, 10 + index) for index in range(3, 9)), 1)
    out = np.zeros(shape.plan_length(BLOCK_SIZE, 3), dtype=np.int32)
    plan.pack(shape, tables, out, first_slot=4)
    rows, deltas = out[:4].tolist(), out[4:].reshape(-1, 3).tolist()
    assert rows == [2, 16, 0, 0]
    assert deltas[:6] == [[2, 1, 13], [7, 1, 14], [12, 1, 15], [2, 2, 16], [7, 2, 17], [12, 2, 18]]
    assert deltas[6:] == [[0, 0, 0]] * 3
