"""How entries come to Hopper's kernel of latent attention: copies to shared memory, and to the second-level cache before them.

Shapes: K keys of a block; X keys that are copied at once, which lie within one block of the cache.
"""

from triton.experimental.gluon import jit
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

KEYS = gl.constexpr(64)
COLUMNS = gl.constexpr(64)
"""Of a copy: 128 bytes, the widest that shared memory is arranged by."""


@jit
def keys_of(item, keys_per_split, H: gl.constexpr, TILE: gl.constexpr, CAUSAL: gl.constexpr):
    """First key of an item, the end of its keys, and how many keys its tile sees."""
    _, _, query_len, kv_len, tile, split, _ = item
    visible = kv_len
    if CAUSAL:
        visible += gl.minimum((tile * TILE + TILE - 1) // H, query_len - 1) + 1 - query_len
    begin = split * keys_per_split
    return begin, gl.minimum(begin + keys_per_split, visible), visible


@jit
def boxes_of(smem, BOX: gl.constexpr):
    """Columns of a block, or of queries, as the copies see them: [columns / 64 · lines / X, X, 64]."""
    return smem._reinterpret(
        smem.dtype, [smem.shape[1] // COLUMNS * (smem.shape[0] // BOX), BOX, COLUMNS], gl.NVMMASharedLayout(128, 16, 2)
    )


@jit
def copy(desc, lines, column: gl.constexpr, full, smem):
    """Start to copy lines of entries, or of queries, from a column on: as many columns as `smem` has."""
    BOX: gl.constexpr = desc.block_type.shape[0]
    NUM_BOXES: gl.constexpr = smem.shape[0] // BOX
    boxes = boxes_of(smem, BOX)
    for part in gl.static_range(smem.shape[1] // COLUMNS):
        for box in gl.static_range(NUM_BOXES):
            target = boxes.index(part * NUM_BOXES + box)
            tma.async_copy_global_to_shared(desc, [lines[box], column + part * COLUMNS], full, target)


@jit
def lines_of(table_ptr, start, end, BOX: gl.constexpr, BLOCK_SIZE: gl.constexpr):
    """Where in the cache the boxes of the block lie whose first key is `start`. A box outside of it is filled with zeros."""
    lines = ()
    for box in gl.static_range(KEYS // BOX):
        key = start + box * BOX
        entry = gl.load(table_ptr + key // BLOCK_SIZE, mask=(key >= 0) & (key < end), other=-1)
        lines += (gl.where(entry < 0, -BOX, entry * BLOCK_SIZE + key % BLOCK_SIZE),)
    return lines


@jit
def prefetch(cache_ptr, lines, BOX: gl.constexpr, ENTRY: gl.constexpr):
    """Have boxes of entries brought from memory to the second-level cache."""
    BYTES: gl.constexpr = BOX * ENTRY * cache_ptr.dtype.element_ty.primitive_bitwidth // 8
    for box in gl.static_range(len(lines)):
        line = lines[box]
        address = (cache_ptr + gl.maximum(line, 0).to(gl.int64) * ENTRY).to(gl.int64)
        gl.inline_asm_elementwise(
            "{ .reg .pred one, there; elect.sync _|one, -1; setp.ge.and.s32 there, $2, 0, one; "
            "@there cp.async.bulk.prefetch.L2.global [$1], $3; mov.b32 $0, 0; }",
            "=r,l,r,r",
            [address, line, gl.to_tensor(BYTES)],
            dtype=gl.int32,
            is_pure=False,
            pack=1,
        )


@jit
def zero_unwritten(smem, first, BOX: gl.constexpr):
    """Zero values of a block, whose columns `smem` has, from its key `first` to the end of the box: they may be NaN, and 0 · NaN
    is NaN. Boxes behind it were not read from the cache."""
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    boxes = boxes_of(smem, BOX)
    written_X = gl.arange(0, BOX, layout=gl.SliceLayout(1, layout)) < first % BOX
    for part in gl.static_range(smem.shape[1] // COLUMNS):
        box = boxes.index(part * (KEYS // BOX) + first // BOX)
        box.store(gl.where(written_X[:, None], box.load(layout), 0.0))
    fence_async_shared()
