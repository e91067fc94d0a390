"""Which kernels are chosen, and how large their work is cut: numbers found by timing on one architecture.

A platform has the numbers of its architecture, and operators take them from there; they ask no device what it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf
from typing import TypeAlias


@dataclass(frozen=True)
class FlatTile:
    """What one program of a product of few tokens computes, and how, with all of its warps on one product."""

    outputs: int
    inputs: int  # per iteration
    num_stages: int
    num_warps: int = 4

    def tokens(self, num_tokens: int) -> int:
        """Tokens with padding."""
        return max(16, _next_power_of_2(num_tokens))

    def shared_bytes(self, num_tokens: int) -> int:
        """Shared memory of a program, of numbers of 16 bits."""
        return 2 * (self.num_stages - 1) * self.inputs * (self.outputs + self.tokens(num_tokens))


@dataclass(frozen=True)
class SlicedTile:
    """What one program of a product of few tokens computes, and how, whose warps share the inputs. All are powers of two, but
    `num_stages`."""

    outputs: int  # at least 8, which tensor cores take at once; 16 waste none
    inputs: int  # per slice and iteration
    slices: int  # warps
    num_stages: int  # one less is the number of iterations whose loads are under way

    @property
    def min_size(self) -> int:
        """The least number of outputs, and of tokens with padding, at which Triton lays slices out one after the other in
        shared memory: 512 bytes of a warp's load, `slices` warps, and one row more. With fewer it interleaves them, so that
        eight rows of a slice, which a warp reads at once, lie in the same banks: an eighth of the bandwidth."""
        return 512 * self.slices // self.inputs

    def tokens(self, num_tokens: int) -> int:
        """Tokens with padding: a tensor core takes 8."""
        return max(8, self.min_size, _next_power_of_2(num_tokens))

    def shared_bytes(self, num_tokens: int) -> int:
        """Shared memory of a program, of numbers of 16 bits; a Hopper multiprocessor has 227 KiB for all that it runs at once."""
        return 2 * (self.num_stages - 1) * self.slices * self.inputs * (self.outputs + self.tokens(num_tokens))


FewTokensTile: TypeAlias = FlatTile | SlicedTile


@dataclass(frozen=True)
class TileRange:
    """The products that a tile is for."""

    tokens: range
    outputs: range
    """Rows of the weight; of a gated product, those of gate and partner together."""
    tile: FewTokensTile
    only_gated: bool = False


def tile_for(ranges: Sequence[TileRange], tokens: int, outputs: int, *, gated: bool = False) -> FewTokensTile | None:
    """The tile of the range that holds this product, None if none does."""
    for r in ranges:
        if tokens in r.tokens and outputs in r.outputs and (gated or not r.only_gated):
            return r.tile
    return None


@dataclass(frozen=True)
class ExpertTile:
    """What one program of a product of pairs with their expert's weight computes, and how. All are powers of two, but
    `num_stages`."""

    rows: int  # pairs, at least 16
    outputs: int  # rows of the weight, a gate's partners included; at least 64, which a tensor core of Hopper takes
    inputs: int  # per iteration; divides the inputs that share a scale
    num_warps: int
    num_stages: int
    copied: bool = False  # the weight, by the copy engine that Hopper has for blocks of tensors
    group: int = 16  # tiles that read a part of the weight together before they go on to the next part


@dataclass(frozen=True)
class ExpertTiles:
    """For how many pairs tiles are."""

    max_average: float
    """Pairs of an average expert."""
    gated: ExpertTile
    down: ExpertTile


def _copied(rows: int, outputs: int, inputs: int, num_warps: int, num_stages: int) -> ExpertTile:
    return ExpertTile(rows, outputs, inputs, num_warps, num_stages, copied=True)


EXPERTS = (
    ExpertTiles(8, gated=ExpertTile(16, 64, 128, 4, 3), down=ExpertTile(16, 64, 128, 4, 3)),
    ExpertTiles(16, gated=ExpertTile(32, 64, 128, 4, 3), down=ExpertTile(32, 64, 128, 4, 3)),
    ExpertTiles(inf, gated=ExpertTile(64, 128, 64, 4, 3), down=ExpertTile(64, 128, 64, 4, 3)),
)
"""Of GPUs without a copy engine, some of which have less than 100 KiB of shared memory. Up to some 64 pairs an expert, products
are a read of the weights, which a tile of twice the average has done once of nearly all experts."""
HOPPER_EXPERTS = (
    ExpertTiles(8, gated=_copied(16, 128, 128, 4, 3), down=_copied(16, 128, 128, 4, 3)),
    ExpertTiles(16, gated=_copied(32, 128, 64, 4, 5), down=_copied(32, 128, 64, 4, 5)),
    ExpertTiles(32, gated=_copied(64, 128, 64, 4, 3), down=_copied(64, 128, 64, 4, 4)),
    ExpertTiles(inf, gated=_copied(128, 256, 64, 8, 4), down=_copied(128, 256, 64, 8, 4)),
)
"""Chosen by timing on an H200 with Qwen3-30B-A3B's experts, 128 of 768 by 2,048, 8 of them for a token: with sort and sum, 64
tokens of bfloat16 take 285 us, 512 take 320, 2,048 take 438 and 8,192 take 1,240; a read of the weights alone is 288."""
HOPPER_EXPERTS_FP8 = (
    ExpertTiles(8, gated=ExpertTile(16, 64, 128, 4, 3), down=_copied(16, 128, 128, 4, 3)),
    ExpertTiles(16, gated=ExpertTile(32, 64, 128, 4, 3), down=_copied(32, 128, 64, 4, 4)),
    ExpertTiles(32, gated=_copied(64, 256, 64, 8, 4), down=_copied(64, 256, 64, 8, 4)),
    ExpertTiles(inf, gated=_copied(64, 128, 64, 4, 3), down=_copied(64, 128, 64, 4, 3)),
)
"""Likewise of 8 bits."""


@dataclass(frozen=True)
class PairTile:
    """What one program computes of a pair of a token and an expert, or of all pairs of a token, and how."""

    outputs: int  # of each expert; of gates, each with its partner
    inputs: int  # of a load; of weights whose scales are of groups, a group
    loads: int  # of each weight, under way
    num_warps: int


@dataclass(frozen=True)
class KernelTuning:
    """Of one architecture. What is not given is what NVIDIA GPUs before Hopper get."""

    dependent_launch: bool = False
    """Whether a kernel's programs may start while those of the kernel before it finish, see `ops.dependent_launch`."""
    hopper_attention: bool = False
    """Whether there is `stepgraph.ops.attention.hopper`, if Triton has what it is written in."""
    hopper_mla: bool = False
    """Likewise `stepgraph.ops.mla_attention.hopper`."""
    hopper_expanded: bool = False
    """Likewise `stepgraph.ops.expanded_attention.hopper`."""

    min_split_keys: int = 256
    """Keys of attention: below this a split costs more than it saves. On an H100 (8 KV heads of 128, bf16), eight rows of 129
    keys take 7.9 us unsplit and 8.9 us in splits of 128. A row or two, which leave most of a machine idle, have splits of no more
    than an iteration: one row of 500 keys takes 6.6 us with heads of 128, 9.5 otherwise; 6.3 in place of 14.0 with
    four of 256."""
    min_split_keys_tall: int = 1024
    """Of tall tiles: a long prompt has enough of them, and to combine one costs more."""
    hopper_min_tokens: int = 512
    """Of a step whose tiles are for `hopper_attention`. Among a layer's other kernels, such a launch costs an H100 some 6 us
    more than one of other tiles, which 80 tokens do not make up for, and 2,048 do several times over."""
    min_expanded_tokens: float = inf
    """Tokens of a step beyond those that its rows have if all of them decode, from which on latent attention makes each head's
    keys and values of all tokens of the step, see `ops.expanded_attention`. Infinity: never. A layer of DeepSeek-V2-Lite on an
    H200: a prompt of 512 tokens takes 61 us, 83 otherwise, and 128 beside 64 rows that decode, 141 otherwise; one of 256 takes
    45 and 107, 48 and 92 otherwise; one of 2,048 takes 165, 744 otherwise."""
    max_prompt_of_small_tiles: int = 256
    """Tokens of a step beyond those that its rows have if all of them decode. They may be a prompt, which small tiles have
    read its keys again for every 16 of its queries: beside 200 rows of 576 keys, a prompt of 1,848 tokens took 8 of 13 ms."""

    min_split_keys_latent: int = 128
    """Of latent attention, whose splits are combined by a launch of its own that is there in any case."""
    latent_wide_keys: bool = False
    """Whether small tiles of latent attention read 64 keys at once, not 32, which takes all of a Hopper multiprocessor's shared
    memory. On an H200, one row of 1,024 keys takes 9.0 us in place of 14.7 (with splits of 64), 128 such rows 54 in place of 65,
    and 128 rows of 32,768 keys 1,399 in place of 1,306."""
    latent_tall_tile: int = 16
    """Rows of its tallest tiles, 16, 32 or 64. With entries of 576 numbers of 16 bits, those of 16 take 91 KiB of shared memory,
    of which some GPUs have 99 for a program; those of 64 take 185."""

    streamed_tokens: int = 2
    """Up to this many tokens, streaming a weight of 16 bits beats the library's kernels: on an H100, one token times the four
    weights of a Qwen3-0.6B layer takes 4.8 + 3.5 + 6.1 + 4.7 us against 5.9 + 6.0 + 7.2 + 7.9 us (the copy limit is 2.8 + 1.4
    + 4.2 + 2.1); at four tokens the arithmetic in its inner loop takes longer than the memory, and the two are even."""
    streamed_inputs: int = 4096
    """Read at once; more in turn."""
    streamed_bytes: int = 16 * 1024
    """Of weight under way per program, at least. On an H200, one token of 2,560 inputs takes 25.1 us with 18,432 gated outputs
    and 20 KiB under way, 28.1 with 10."""
    streamed_normed_bytes: int = 32 * 1024
    """Likewise where each program normalises the token first, without a gate's partners: 12,288 outputs take 17.8 us with 40 KiB
    under way, 18.9 with 20 and 22.9 with 10."""
    streamed_fp8_bytes: int = 8 * 1024
    """Likewise, of a weight of 8 bits."""
    streamed_4bit_bytes: int = 16 * 1024
    """Likewise, of a weight of 4 bits."""
    min_large_tiles: int = 128
    """Large tiles of a product that is the same for every row pay from so many on: about one per multiprocessor."""
    min_fp8_programs: int = 96
    """A Hopper GPU has 132 multiprocessors; large tiles of a weight of 8 bits pay while three quarters of them have one."""
    gated_pairs: PairTile = PairTile(outputs=4, inputs=256, loads=4, num_warps=4)
    """Of experts' gates, where each pair of a token and an expert reads its expert's weights. On an H200, pairs of four tokens
    with experts of Qwen3-30B-A3B, which are 187 MB, take 51 us, and 53 to 67 in tiles of other sizes."""
    gated_pairs_of_one: PairTile = PairTile(outputs=4, inputs=512, loads=4, num_warps=4)
    """Of one token. Likewise 15.2 us for 50 MB, beside 17 in tiles of 16 outputs; DeepSeek-V2-Lite's 69 MB take 19.8 beside 23,
    and GLM-4.7-Flash's 50 MB 15.0 beside 16.5."""
    gated_pairs_fp8: PairTile = PairTile(outputs=8, inputs=256, loads=4, num_warps=4)
    """Of weights of 8 bits: of eight tokens 62 us, beside 70 to 104; with scales of groups 64, beside 65 to 88."""
    summed_pairs: PairTile = PairTile(outputs=4, inputs=128, loads=12, num_warps=4)
    """Of what is added up: of one token 8.7 us for 25 MB, beside 9.3 with two warps. All that a program reads of an
    expert may be under way at once: of DeepSeek-V2-Lite, 11 blocks, which takes 11.7 us for 35 MB, beside 14.6 with six."""
    summed_pairs_fp8: PairTile = PairTile(outputs=8, inputs=128, loads=6, num_warps=4)
    """Of weights of 8 bits: of one token 8.4 us for 13 MB, beside 9.1 to 10.5."""
    few_tokens: tuple[TileRange, ...] = (
        TileRange(range(17), range(1 << 16, 1 << 62), SlicedTile(outputs=32, inputs=128, slices=2, num_stages=5)),
        TileRange(range(33), range(2048, 8192), FlatTile(outputs=64, inputs=128, num_stages=5), only_gated=True),
        TileRange(range(33), range(8192, 16384), FlatTile(outputs=64, inputs=64, num_stages=6), only_gated=True),
        TileRange(range(33, 65), range(8192), FlatTile(outputs=64, inputs=128, num_stages=5), only_gated=True),
        TileRange(range(33, 65), range(8192, 16384), FlatTile(outputs=64, inputs=128, num_stages=3), only_gated=True),
        TileRange(range(9), range(2560), SlicedTile(outputs=8, inputs=256, slices=4, num_stages=4)),
        TileRange(range(9), range(2560, 4096), SlicedTile(outputs=8, inputs=256, slices=4, num_stages=3)),
        TileRange(range(9), range(4096, 16384), SlicedTile(outputs=8, inputs=128, slices=2, num_stages=4)),
        TileRange(range(9), range(16384, 1 << 16), SlicedTile(outputs=8, inputs=256, slices=4, num_stages=3)),
        TileRange(range(9, 17), range(2048), SlicedTile(outputs=8, inputs=256, slices=4, num_stages=3)),
        TileRange(range(17, 33), range(2048), SlicedTile(outputs=16, inputs=128, slices=4, num_stages=4)),
        TileRange(range(9, 33), range(2048, 16384), FlatTile(outputs=64, inputs=128, num_stages=5)),
        TileRange(range(9, 33), range(16384, 1 << 16), FlatTile(outputs=64, inputs=128, num_stages=3)),
    )
    """Products of weights of 16 bits; others are the library's. Weights of 2^16 outputs are output heads; beyond 64 tokens,
    no tile was faster than the library by more than a few percent.

    Chosen by timing on an H100, with Qwen3-0.6B's and 8B's weights in bfloat16 coming from memory: of 3 to 8 tokens the
    library takes 1.49 times as long for 1,024 outputs, 1.08 for about 5,000, 1.06 for 24,576 and 1.08 for an output head; of
    16 tokens 1.14, 1.23, 1.11, 1.07 and 1.02 times for the flat tile's 4,096 to 24,576 outputs; of 24 to 32 tokens 1.18 times
    for 1,024 outputs. What an activation at the end spares, a launch and the traffic of two matrices, comes on top.

    The parts of those weights that two and four ranks have were timed on an H200, and some whole ones again. Alone, flat tiles
    took 49 us in place of 52 for 24,576 gated outputs and 8 tokens, and 15.6 in place of 18.3 for 6,144 outputs, but a step of
    the 8B with both took 4 % longer: among other kernels, programs of small tiles begin earlier."""
    few_tokens_fp8: tuple[TileRange, ...] = (
        TileRange(range(17), range(1 << 62), SlicedTile(outputs=16, inputs=128, slices=4, num_stages=4)),
        TileRange(range(17, 33), range(4097), SlicedTile(outputs=16, inputs=64, slices=4, num_stages=5)),
        TileRange(range(17, 33), range(4097, 16384), SlicedTile(outputs=16, inputs=64, slices=4, num_stages=4)),
        TileRange(range(33, 65), range(4097), SlicedTile(outputs=16, inputs=64, slices=4, num_stages=4)),
    )
    """Products of weights of 8 bits; others go in tiles of many tokens."""
    few_tokens_4bit: tuple[TileRange, ...] = (
        TileRange(range(3, 17), range(8192), FlatTile(outputs=16, inputs=512, num_stages=4, num_warps=1)),
        TileRange(range(3, 17), range(8192, 1 << 62), FlatTile(outputs=32, inputs=512, num_stages=4, num_warps=2)),
        TileRange(range(3), range(16384, 1 << 62), FlatTile(outputs=32, inputs=512, num_stages=4, num_warps=2)),
        TileRange(range(17, 65), range(1 << 62), FlatTile(outputs=64, inputs=256, num_stages=3)),
    )
    """Likewise of 4 bits. Chosen by counting instructions and shared memory, not by timing yet: one or two tokens are streamed
    where outputs are few, which keeps more warps busy, though it takes twice the instructions."""

    expert_tiles: tuple[ExpertTiles, ...] = EXPERTS
    """Products of experts' weights of 16 bits, in ascending order."""
    expert_tiles_fp8: tuple[ExpertTiles, ...] = EXPERTS
    """Likewise of 8 bits."""


DEFAULT = KernelTuning()
SM_90 = replace(
    DEFAULT,
    dependent_launch=True,
    hopper_attention=True,
    hopper_mla=True,
    hopper_expanded=True,
    min_expanded_tokens=512,
    min_split_keys_latent=64,
    latent_wide_keys=True,
    latent_tall_tile=64,
    expert_tiles=HOPPER_EXPERTS,
    expert_tiles_fp8=HOPPER_EXPERTS_FP8,
)
"""Hopper: H100, H200."""


def of_capability(capability: tuple[int, int]) -> KernelTuning:
    """Of NVIDIA GPUs with this compute capability."""
    if capability[0] == 9:
        return SM_90
    return replace(DEFAULT, dependent_launch=capability > (9, 0))


def _next_power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()
