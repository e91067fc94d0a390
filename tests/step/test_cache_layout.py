"""What caches take, layer by layer, and how many blocks that leaves room for."""

from dataclasses import dataclass

import pytest
import torch

from stepgraph.abi.block_groups import BlockGroups
from stepgraph.config import EngineConfig
from stepgraph.errors import ConfigError
from stepgraph.layers.cache import CacheSpec, Item, PagedSpec
from stepgraph.layers.inputs import AttentionSpec
from stepgraph.layers.recurrent import RecurrentSpec
from stepgraph.platforms import create_platform
from stepgraph.step.attention import AttentionSizes
from stepgraph.step.memory import CacheLayout, CacheSizes, choose_sizes
from stepgraph.step.shape import StepShape

FULL = PagedSpec(2, 16, torch.bfloat16)
WINDOWED = PagedSpec(1, 8, torch.float8_e4m3fn, window=24)
SHARING = PagedSpec(2, 16, torch.bfloat16, window=40, shares=0)
STATE = RecurrentSpec((Item((4, 8), torch.float32),), (Item((4,), torch.bfloat16), Item((), torch.float32)))


def layout(*specs, num_drafts: int = 3, lookahead: int = 0) -> CacheLayout:
    return CacheLayout(specs[:1], specs[1:], block_size=4, num_lines=5, num_drafts=num_drafts, lookahead=lookahead)


def test_a_layout_counts_every_byte_that_it_allocates() -> None:
    memory = create_platform("cpu").memory([], sleepable=False)
    for specs in ((FULL, WINDOWED, SHARING, STATE), (STATE,), (FULL,)):
        for num_drafts in (0, 3):
            found = layout(*specs, num_drafts=num_drafts)
            caches = found.allocate(7, memory)
            tensors = {t.data_ptr(): t for c in caches for t in (*c.block_tensors, *c.line_tensors)}.values()
            assert sorted(found.sizes(7)) == sorted(tensor.nbytes for tensor in tensors)
            assert sum(found.sizes(7)) == 7 * found.block_bytes + found.line_bytes
            assert all(tensor.shape[0] in (7, 5) for tensor in tensors)
    assert layout(FULL, WINDOWED, SHARING).block_bytes == 2 * 4 * (2 * 16 * 2 + 8)
    assert layout(FULL, STATE).line_bytes == 5 * (4 + 4 * 4 * 8 + 3 * (2 * 4 + 4))
    assert layout(FULL, STATE, num_drafts=0).line_bytes == 5 * 4 * 4 * 8


@pytest.mark.parametrize(
    ("specs", "lookahead", "reach"),
    [
        ((WINDOWED,), 0, 24),
        ((WINDOWED,), 1, 24),
        ((WINDOWED,), 3, 26),
        ((WINDOWED, PagedSpec(1, 8, torch.float32, window=30), STATE), 0, 30),
        ((FULL, WINDOWED), 0, 0),
        ((PagedSpec(2, 16, torch.bfloat16, window=8), SHARING), 0, 40),
        ((STATE,), 0, 0),
    ],
)
def test_a_step_reaches_as_far_back_as_the_widest_window(specs, lookahead, reach) -> None:
    assert layout(*specs, lookahead=lookahead).groups == BlockGroups.one(reach)


def test_prefixes_are_reused_where_blocks_hold_all_there_is() -> None:
    assert layout(FULL, WINDOWED, SHARING).reuses_prefixes
    assert not layout(FULL, STATE).reuses_prefixes


@dataclass(frozen=True)
class LatentSpec(CacheSpec):
    """A kind that none of the code knows: one vector per token, in blocks."""

    width: int

    @property
    def reach(self) -> int:
        return 0

    def per_block(self, block_size: int) -> tuple[Item, ...]:
        return (Item((block_size, self.width), torch.bfloat16),)

    def per_line(self, num_drafts: int) -> tuple[Item, ...]:
        return ()

    def cache(self, block_tensors, line_tensors):
        (latent,) = block_tensors
        return latent


def test_a_kind_of_cache_of_its_own_needs_nothing_but_its_spec() -> None:
    found = layout(LatentSpec(576), WINDOWED)
    assert found.block_bytes == 4 * 576 * 2 + 2 * 4 * 8
    assert (found.groups, found.reuses_prefixes) == (BlockGroups(), True)
    latent, paged = found.allocate(7, create_platform("cpu").memory([], sleepable=False))
    assert (tuple(latent.shape), tuple(paged.keys.shape)) == ((7, 4, 576), (7, 4, 1, 8))


@dataclass
class Machine:
    """What `choose_sizes` asks of a platform."""

    free: int
    shares_host_memory: bool = False

    def free_memory_bytes(self) -> int:
        return self.free

    def total_memory_bytes(self) -> int:
        return 1 << 20


def sizes(*specs, free: int, shares_host_memory: bool = False, max_model_len: int = 400, **settings) -> CacheSizes:
    config = EngineConfig.from_settings(**{"max_num_seqs": 4, "gpu_memory_utilization": 1.0} | settings)
    machine = Machine(free, shares_host_memory)
    return choose_sizes(
        layout(*specs), config, machine, max_model_len=max_model_len, activation_bytes=1000, later_bytes=500
    )


def num_blocks(*specs, **settings) -> int:
    return sizes(*specs, enable_prefix_caching=False, **settings).num_blocks


def test_blocks_get_what_lines_and_the_rest_leave() -> None:
    free = 50_000
    block_bytes, line_bytes = layout(FULL, STATE).block_bytes, layout(FULL, STATE).line_bytes
    assert num_blocks(FULL, free=free) == (free - 2500) // block_bytes
    assert num_blocks(FULL, STATE, free=free) == (free - 2500 - line_bytes) // block_bytes
    assert num_blocks(FULL, STATE, free=free, num_kv_blocks=20) == 20
    most = 4 * 100 + 1
    assert num_blocks(STATE, free=free) == num_blocks(FULL, free=1 << 20) == most


def test_of_the_hosts_memory_half_of_what_is_free_is_left_to_others() -> None:
    block_bytes, line_bytes = layout(FULL, STATE).block_bytes, layout(FULL, STATE).line_bytes
    assert num_blocks(FULL, free=50_000, shares_host_memory=True) == 25_000 // block_bytes
    assert num_blocks(FULL, STATE, free=50_000, shares_host_memory=True) == (25_000 - line_bytes) // block_bytes


def test_lines_that_leave_no_room_are_refused() -> None:
    with pytest.raises(ConfigError, match="no memory is left for the KV cache"):
        num_blocks(FULL, STATE, free=2500 + layout(FULL, STATE).line_bytes)
    with pytest.raises(ConfigError, match="the KV cache needs"):
        num_blocks(FULL, STATE, free=20 * layout(FULL).block_bytes, num_kv_blocks=20)


def test_there_is_a_checkpoint_for_each_slot_as_far_as_memory_allows() -> None:
    block_bytes, line_bytes = layout(FULL, STATE).block_bytes, layout(FULL, STATE).line_bytes
    state_bytes = line_bytes // 5
    free = 50_000
    left = free - 2500 - line_bytes
    assert sizes(FULL, STATE, free=free, max_model_len=100) == ((left - 4 * state_bytes) // block_bytes, 4)
    # Not what a request of max_model_len needs,
    assert sizes(FULL, STATE, free=2500 + line_bytes + 11 * block_bytes + 2 * state_bytes, max_model_len=40) == (11, 2)
    assert sizes(FULL, STATE, free=2500 + line_bytes + 11 * block_bytes, max_model_len=40) == (11, 0)
    # nor more than blocks get,
    half = sizes(FULL, STATE, free=2500 + line_bytes + 5 * block_bytes, max_model_len=4, max_num_seqs=16)
    assert half == (2, 5 * block_bytes // 2 // state_bytes)
    few = sizes(FULL, STATE, free=free, num_kv_blocks=2, max_num_seqs=16)
    assert few == (2, 2 * block_bytes // state_bytes)
    assert sizes(FULL, STATE, free=free, num_kv_blocks=20) == (20, 4)
    # and none where prefixes are not reused, or blocks are all there is.
    assert sizes(FULL, STATE, free=free, enable_prefix_caching=False).num_checkpoints == 0
    assert sizes(FULL, free=free).num_checkpoints == 0
    on_host = sizes(FULL, STATE, free=1 << 20, shares_host_memory=True, max_model_len=40)
    assert on_host == (4 * 10 + 1, 4)


def test_attention_of_other_heads_has_sizes_of_its_own() -> None:
    specs = [AttentionSpec(8, 2, 16, 16), AttentionSpec(8, 2, 16, 16, window=9), AttentionSpec(6, 6, 8, 8, window=9)]
    sizes = AttentionSizes(
        reversed(specs * 2),
        create_platform("cpu"),
        dtype=torch.float32,
        cache_dtype=torch.float32,
        block_size=16,
        deterministic=False,
    ).of(StepShape(64, 2))
    assert list(sizes) == [specs[2], specs[0], specs[1]]
    assert sizes[specs[0]] == sizes[specs[1]] != sizes[specs[2]]
