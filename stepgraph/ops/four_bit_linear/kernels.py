"""The kernels of `four_bit_linear`: three ways to cut the product, by how many tokens share a read of the
weight.

A half byte becomes a float32 by bits alone, as conversions of integers run at a fraction of the rate of other instructions. For
a few tokens, what tensor cores multiply is the number that a code stands for, which 16 bits hold exactly, and a group's scale
multiplies the group's part of each sum; for many, it is the dequantised weight, rounded once, and the sums are left alone.

Shapes: T tokens, N outputs, K inputs, G groups of inputs, P bytes of codes, Q pieces of them with a scale each, S slices.
"""

import triton
import triton.language as tl
from triton import knobs

from stepgraph.ops.dependent_launch import wait_for_previous
from stepgraph.ops.four_bit_linear import ptx
from stepgraph.ops.four_bit_linear.reference import CHUNK
from stepgraph.ops.launched import launched
from stepgraph.ops.linear.ends import before_add, finish
from stepgraph.ops.rms_norm.triton import scale_rounded

HALF_CHUNK = tl.constexpr(CHUNK // 2)
_SIXTEEN = tl.constexpr(0x41800000)
"""16 as float32. The four uppermost bits that integers add to its mantissa count from 0 to 15."""
_CENTRE = tl.constexpr(24)
"""What an integer's code becomes that stands for zero: 16 and 8."""
_E2M1_FACTOR = tl.constexpr(2.0**126)
"""Between E2M1's numbers, and float32 with their bits in its exponent and mantissa."""
BLOCKS = 4
"""Of an iteration of `flat_kernel`. What it needs of the last iteration is nothing older, or Triton would not load ahead."""
_BLOCKS = tl.constexpr(BLOCKS)
_COMPILED = tl.constexpr(not knobs.runtime.interpret)
"""Whether PTX can be used, which takes four bytes or two numbers of 16 bits at once."""
_LOW_BITS, _HIGH_BITS = (tl.constexpr(ptx.float32_bits(first)) for first in (0, 4))
_LOW_BFLOAT16, _HIGH_BFLOAT16 = (tl.constexpr(ptx.integers("bf16", first)) for first in (0, 4))
_LOW_FLOAT16, _HIGH_FLOAT16 = (tl.constexpr(ptx.integers("f16", first)) for first in (0, 4))
_LOW_E2M1_BFLOAT16, _HIGH_E2M1_BFLOAT16 = (tl.constexpr(ptx.e2m1("bf16", first)) for first in (0, 4))
_LOW_E2M1_FLOAT16, _HIGH_E2M1_FLOAT16 = (tl.constexpr(ptx.e2m1("f16", first)) for first in (0, 4))


@triton.jit
def _numbers(codes, HIGH: tl.constexpr, IS_E2M1: tl.constexpr):
    """What the codes in the lower or upper halves of bytes stand for, as float32: E2M1's numbers, or the integers and 16."""
    if IS_E2M1:
        half = codes.to(tl.int32) >> 4 if HIGH else codes.to(tl.int32) & 15
        bits = ((half & 8) << 28) | ((half & 7) << 22)
        number = bits.to(tl.float32, bitcast=True) * _E2M1_FACTOR
    elif _COMPILED:
        bits = tl.inline_asm_elementwise(
            _HIGH_BITS if HIGH else _LOW_BITS, "=r,=r,=r,=r,r", [codes], dtype=tl.int32, is_pure=True, pack=4
        )
        number = bits.to(tl.float32, bitcast=True)
    else:
        half = codes.to(tl.int32) >> 4 if HIGH else codes.to(tl.int32) & 15
        number = ((half << 19) | _SIXTEEN).to(tl.float32, bitcast=True)
    return number


@triton.jit
def _centred_numbers(codes, dtype: tl.constexpr, HIGH: tl.constexpr, IS_E2M1: tl.constexpr):
    """Likewise in 16 bits, which hold all of them, integers as they are."""
    if not _COMPILED:
        number = _numbers(codes, HIGH, IS_E2M1)
        number = (number if IS_E2M1 else number - _CENTRE).to(dtype)
    elif dtype == tl.bfloat16:
        low: tl.constexpr = _LOW_E2M1_BFLOAT16 if IS_E2M1 else _LOW_BFLOAT16
        high: tl.constexpr = _HIGH_E2M1_BFLOAT16 if IS_E2M1 else _HIGH_BFLOAT16
        number = tl.inline_asm_elementwise(
            high if HIGH else low, "=r,=r,r", [codes], dtype=tl.bfloat16, is_pure=True, pack=4
        )
    else:
        low: tl.constexpr = _LOW_E2M1_FLOAT16 if IS_E2M1 else _LOW_FLOAT16
        high: tl.constexpr = _HIGH_E2M1_FLOAT16 if IS_E2M1 else _HIGH_FLOAT16
        number = tl.inline_asm_elementwise(
            high if HIGH else low, "=r,=r,r", [codes], dtype=tl.float16, is_pure=True, pack=4
        )
    return number


@triton.jit
def scales(scale_ptr, zero_ptr, place, inside, IS_E2M1: tl.constexpr):
    """Scale and offset, float32, so that a weight is ``number · scale + offset``; zeros outside."""
    if scale_ptr.dtype.element_ty == tl.uint8:
        exponent = tl.load(scale_ptr + place, mask=inside, other=0).to(tl.int32)
        bits = tl.where(exponent == 0, 1 << 22, exponent << 23)
        scale = tl.where(inside, bits.to(tl.float32, bitcast=True), 0.0)
    else:
        scale = tl.load(scale_ptr + place, mask=inside, other=0.0).to(tl.float32)
    if zero_ptr is None:
        offset = scale * (0.0 if IS_E2M1 else -_CENTRE)
    else:
        if zero_ptr.dtype.element_ty == tl.uint8:
            offset = scale * (-16.0 - tl.load(zero_ptr + place, mask=inside, other=0).to(tl.float32))
        else:
            offset = tl.load(zero_ptr + place, mask=inside, other=0.0).to(tl.float32) - scale * 16.0
    return scale, offset


@triton.jit
def _factors(factor_ptr, output, inside):
    """Factors of outputs, float32."""
    return tl.load(factor_ptr + output, mask=inside, other=0.0)


@triton.jit
def input_of(place):
    """The input whose code is in the lower half of a byte; that of the upper half is half a chunk further on."""
    return place // HALF_CHUNK * (2 * HALF_CHUNK) + place % HALF_CHUNK


@triton.jit
def _sum_inputs(codes_NP, low_P, high_P, scale_NQ, offset_NQ, sum_Q, IS_E2M1: tl.constexpr, PIECE: tl.constexpr):
    """A token's sums over a block of inputs, [N] float32."""
    product_NP = _numbers(codes_NP, False, IS_E2M1) * low_P[None, :]
    product_NP += _numbers(codes_NP, True, IS_E2M1) * high_P[None, :]
    N: tl.constexpr = codes_NP.shape[0]
    P: tl.constexpr = codes_NP.shape[1]
    part_NQ = tl.sum(tl.reshape(product_NP, [N, P // PIECE, PIECE]), axis=2) * scale_NQ
    if not IS_E2M1:
        part_NQ += offset_NQ * sum_Q[None, :]
    return tl.sum(part_NQ, axis=1)


@launched
@triton.jit(do_not_specialize=["N"])
def streamed_kernel(
    x_ptr,
    norm_ptr,  # None: x as it is; else K is at most the inputs of BLOCK_P
    codes_ptr,
    scale_ptr,
    zero_ptr,
    factor_ptr,
    bias_ptr,
    out_ptr,
    eps,
    multiplier,
    N,
    END: tl.constexpr,  # what becomes of the product, see `ends`
    TOKENS: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    GROUP: tl.constexpr,  # bytes of codes that share a scale
    IS_E2M1: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program per BLOCK_N outputs. Loops are unrolled, so that all of its loads are under way at once; those of the first
    weights are before the previous kernel ends."""
    is_gated: tl.constexpr = END == "swiglu" or END == "geglu"
    PIECE: tl.constexpr = 16 if GROUP > 16 else GROUP  # what a thread loads at once
    GROUPS: tl.constexpr = (P + GROUP - 1) // GROUP
    IS_EVEN: tl.constexpr = P % BLOCK_P == 0 and K == 2 * P
    output_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_N = output_N < N
    place_P = tl.arange(0, BLOCK_P)
    place_Q = tl.arange(0, BLOCK_P // PIECE) * PIECE
    token_T = tl.arange(0, TOKENS)
    low_P, high_P = input_of(place_P), input_of(place_P) + HALF_CHUNK
    codes_NP = codes_ptr + output_N.to(tl.int64)[:, None] * P + place_P[None, :]
    up_NP = codes_NP + tl.cast(N, tl.int64) * P
    first_inside_NP = inside_N[:, None] & ((place_P < P) | IS_EVEN)[None, :]
    first_NP = tl.load(codes_NP, mask=first_inside_NP, other=0)
    if is_gated:
        first_up_NP = tl.load(up_NP, mask=first_inside_NP, other=0)
    if norm_ptr is not None:
        low_norm_P = tl.load(norm_ptr + low_P, mask=low_P < K, other=0.0)
        high_norm_P = tl.load(norm_ptr + high_P, mask=high_P < K, other=0.0)
    out_NT = out_ptr + token_T[None, :] * N + output_N[:, None]
    wait_for_previous()
    before_NT = before_add(out_NT, inside_N[:, None], END)
    sum_NT = tl.zeros([BLOCK_N, TOKENS], tl.float32)
    up_NT = tl.zeros([BLOCK_N, TOKENS], tl.float32)
    for start in tl.static_range(0, P, BLOCK_P):
        inside_NP = inside_N[:, None] & ((start + place_P < P) | IS_EVEN)[None, :]
        group_Q = (start + place_Q) // GROUP
        inside_NQ = inside_N[:, None] & ((start + place_Q < P) | IS_EVEN)[None, :]
        scale_place_NQ = output_N[:, None] * GROUPS + group_Q[None, :]
        block_NP = first_NP if start == 0 else tl.load(codes_NP + start, mask=inside_NP, other=0)
        scale_NQ, offset_NQ = scales(scale_ptr, zero_ptr, scale_place_NQ, inside_NQ, IS_E2M1)
        if is_gated:
            up_block_NP = first_up_NP if start == 0 else tl.load(up_NP + start, mask=inside_NP, other=0)
            up_place_NQ = scale_place_NQ + N * GROUPS
            up_scale_NQ, up_offset_NQ = scales(scale_ptr, zero_ptr, up_place_NQ, inside_NQ, IS_E2M1)
        for token in tl.static_range(TOKENS):
            x_low_P = x_ptr + token * K + 2 * start + low_P
            low_x_P = tl.load(x_low_P, mask=(2 * start + low_P < K) | IS_EVEN, other=0.0)
            high_x_P = tl.load(x_low_P + HALF_CHUNK, mask=(2 * start + high_P < K) | IS_EVEN, other=0.0)
            if norm_ptr is not None:
                low_x_P, high_x_P = low_x_P.to(tl.float32), high_x_P.to(tl.float32)
                squares = tl.sum(low_x_P * low_x_P + high_x_P * high_x_P, axis=0)
                inverse = tl.rsqrt(squares / K + eps)
                low_x_P = scale_rounded(low_x_P, inverse, low_norm_P).to(x_ptr.dtype.element_ty)
                high_x_P = scale_rounded(high_x_P, inverse, high_norm_P).to(x_ptr.dtype.element_ty)
            low_x_P, high_x_P = low_x_P.to(tl.float32), high_x_P.to(tl.float32)
            sum_Q = tl.sum(tl.reshape(low_x_P + high_x_P, [BLOCK_P // PIECE, PIECE]), axis=1)
            sum_N = _sum_inputs(block_NP, low_x_P, high_x_P, scale_NQ, offset_NQ, sum_Q, IS_E2M1, PIECE)
            sum_NT += tl.where(token_T[None, :] == token, sum_N[:, None], 0.0)
            if is_gated:
                up_N = _sum_inputs(up_block_NP, low_x_P, high_x_P, up_scale_NQ, up_offset_NQ, sum_Q, IS_E2M1, PIECE)
                up_NT += tl.where(token_T[None, :] == token, up_N[:, None], 0.0)
    if factor_ptr is not None:
        sum_NT *= _factors(factor_ptr, output_N, inside_N)[:, None]
        if is_gated:
            up_NT *= _factors(factor_ptr, N + output_N, inside_N)[:, None]
    if bias_ptr is not None:
        sum_NT += tl.load(bias_ptr + output_N, mask=inside_N, other=0.0).to(tl.float32)[:, None]
    finish(out_NT, sum_NT, up_NT, before_NT, multiplier, inside_N[:, None], END)


@triton.jit
def _add_group(sum_NT, codes, low_x_PT, high_x_PT, scale_N, offset_N, HAS_ZERO: tl.constexpr, IS_E2M1: tl.constexpr):
    """Add the products within a part of a group, [N, T] float32."""
    part_NT = tl.dot(_centred_numbers(codes, low_x_PT.dtype, False, IS_E2M1), low_x_PT, out_dtype=tl.float32)
    part_NT = tl.dot(_centred_numbers(codes, low_x_PT.dtype, True, IS_E2M1), high_x_PT, part_NT)
    sum_NT += part_NT * scale_N[:, None]
    if HAS_ZERO:
        x_T = tl.sum(low_x_PT.to(tl.float32) + high_x_PT.to(tl.float32), axis=0)
        sum_NT += (offset_N + _CENTRE * scale_N)[:, None] * x_T[None, :]
    return sum_NT


@triton.jit
def _scales_of(scale_ptr, zero_ptr, place_N, inside_N, start, P, GROUP: tl.constexpr, IS_E2M1: tl.constexpr):
    """`scales` of the group of the bytes from `start` on; zeros behind the last."""
    return scales(scale_ptr, zero_ptr, place_N + start // GROUP, inside_N & (start < P), IS_E2M1)


@launched
@triton.jit(do_not_specialize=["T", "N"])
def flat_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    factor_ptr,
    bias_ptr,
    out_ptr,
    multiplier,
    T,
    N,
    K,
    P,
    END: tl.constexpr,  # what becomes of the product, see `ends`
    GROUP: tl.constexpr,  # bytes of codes that share a scale, a multiple of BLOCK_P
    IS_E2M1: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
    IS_EVEN: tl.constexpr,  # K is a multiple of the inputs of an iteration
    STAGES: tl.constexpr,
):
    """One program per BLOCK_N outputs, of which a warp has 16: what is between loads is little, so warps wait for none but
    themselves, and several blocks are loaded for each iteration."""
    is_gated: tl.constexpr = END == "swiglu" or END == "geglu"
    has_zero: tl.constexpr = zero_ptr is not None
    groups = tl.cdiv(P, GROUP)
    output_N = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    token_T = tl.arange(0, BLOCK_T)
    inside_N, inside_T = output_N < N, token_T < T
    place_P = tl.arange(0, BLOCK_P)
    input_P = input_of(place_P)
    codes_NP = codes_ptr + output_N.to(tl.int64)[:, None] * P + place_P[None, :]
    up_NP = codes_NP + tl.cast(N, tl.int64) * P
    x_PT = x_ptr + token_T[None, :] * K + input_P[:, None]
    sum_NT = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    up_NT = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    out_NT, inside_NT = out_ptr + token_T[None, :] * N + output_N[:, None], inside_N[:, None] & inside_T[None, :]
    place_N = output_N * groups
    # Scales are too small to be copied asynchronously: they are loaded four blocks before they are used.
    scale_0, offset_0 = scales(scale_ptr, zero_ptr, place_N, inside_N, IS_E2M1)
    scale_1, offset_1 = _scales_of(scale_ptr, zero_ptr, place_N, inside_N, BLOCK_P, P, GROUP, IS_E2M1)
    scale_2, offset_2 = _scales_of(scale_ptr, zero_ptr, place_N, inside_N, 2 * BLOCK_P, P, GROUP, IS_E2M1)
    scale_3, offset_3 = _scales_of(scale_ptr, zero_ptr, place_N, inside_N, 3 * BLOCK_P, P, GROUP, IS_E2M1)
    up_place_N = N * groups + place_N
    inside_up_N = inside_N & is_gated
    up_scale_0, up_offset_0 = scales(scale_ptr, zero_ptr, up_place_N, inside_up_N, IS_E2M1)
    up_scale_1, up_offset_1 = _scales_of(scale_ptr, zero_ptr, up_place_N, inside_up_N, BLOCK_P, P, GROUP, IS_E2M1)
    up_scale_2, up_offset_2 = _scales_of(scale_ptr, zero_ptr, up_place_N, inside_up_N, 2 * BLOCK_P, P, GROUP, IS_E2M1)
    up_scale_3, up_offset_3 = _scales_of(scale_ptr, zero_ptr, up_place_N, inside_up_N, 3 * BLOCK_P, P, GROUP, IS_E2M1)
    wait_for_previous()
    before_NT = before_add(out_NT, inside_NT, END)
    for first in tl.range(0, P, _BLOCKS * BLOCK_P, num_stages=STAGES):
        for block in tl.static_range(_BLOCKS):
            start = first + block * BLOCK_P
            inside_NP = inside_N[:, None] & ((start + place_P < P) | IS_EVEN)[None, :]
            low_P = (2 * start + input_P < K) | IS_EVEN
            high_P = (2 * start + input_P + HALF_CHUNK < K) | IS_EVEN
            codes = tl.load(codes_NP + start, mask=inside_NP, other=0)
            low_x_PT = tl.load(x_PT + 2 * start, mask=low_P[:, None] & inside_T[None, :], other=0.0)
            high_x_PT = tl.load(x_PT + 2 * start + HALF_CHUNK, mask=high_P[:, None] & inside_T[None, :], other=0.0)
            later = start + _BLOCKS * BLOCK_P
            sum_NT = _add_group(sum_NT, codes, low_x_PT, high_x_PT, scale_0, offset_0, has_zero, IS_E2M1)
            scale_0, scale_1, scale_2, offset_0, offset_1, offset_2 = (
                scale_1, scale_2, scale_3, offset_1, offset_2, offset_3,
            )  # fmt: skip
            scale_3, offset_3 = _scales_of(scale_ptr, zero_ptr, place_N, inside_N, later, P, GROUP, IS_E2M1)
            if is_gated:
                codes = tl.load(up_NP + start, mask=inside_NP, other=0)
                up_NT = _add_group(up_NT, codes, low_x_PT, high_x_PT, up_scale_0, up_offset_0, has_zero, IS_E2M1)
                up_scale_0, up_scale_1, up_scale_2, up_offset_0, up_offset_1, up_offset_2 = (
                    up_scale_1, up_scale_2, up_scale_3, up_offset_1, up_offset_2, up_offset_3,
                )  # fmt: skip
                up_scale_3, up_offset_3 = _scales_of(
                    scale_ptr, zero_ptr, up_place_N, inside_N, later, P, GROUP, IS_E2M1
                )
    if factor_ptr is not None:
        sum_NT *= _factors(factor_ptr, output_N, inside_N)[:, None]
        if is_gated:
            up_NT *= _factors(factor_ptr, N + output_N, inside_N)[:, None]
    if bias_ptr is not None:
        sum_NT += tl.load(bias_ptr + output_N, mask=inside_N, other=0.0).to(tl.float32)[:, None]
    finish(out_NT, sum_NT, up_NT, before_NT, multiplier, inside_NT, END)


@triton.jit
def weights(codes_NP, scale_NQ, offset_NQ, dtype: tl.constexpr, HIGH: tl.constexpr, IS_E2M1: tl.constexpr):
    """Dequantised weights, rounded once, of the codes in the lower or upper halves of bytes."""
    N: tl.constexpr = codes_NP.shape[0]
    P: tl.constexpr = codes_NP.shape[1]
    Q: tl.constexpr = scale_NQ.shape[1]
    number_NP = _numbers(codes_NP, HIGH, IS_E2M1)
    if Q == 1:
        weight_NP = number_NP * scale_NQ + offset_NQ
    else:
        number_NQP = tl.reshape(number_NP, [N, Q, P // Q])
        weight_NP = tl.reshape(number_NQP * scale_NQ[:, :, None] + offset_NQ[:, :, None], [N, P])
    return weight_NP.to(dtype)


@launched
@triton.jit(do_not_specialize=["T"])
def block_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    zero_ptr,
    factor_ptr,
    bias_ptr,
    out_ptr,
    multiplier,
    T,
    N,
    K,
    P,
    END: tl.constexpr,  # "store" or "add", see `ends`
    GROUP: tl.constexpr,  # bytes of codes that share a scale
    IS_E2M1: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One program per tile. Programs that share a block of the weight are neighbours, so that it is read once."""
    PIECE: tl.constexpr = BLOCK_P if GROUP > BLOCK_P else GROUP
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    groups = tl.cdiv(P, GROUP)
    blocks_T = tl.cdiv(T, BLOCK_T)
    token_T = tl.program_id(0) % blocks_T * BLOCK_T + tl.arange(0, BLOCK_T)
    output_N = tl.program_id(0) // blocks_T * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_T, inside_N = token_T < T, output_N < N
    place_P = tl.arange(0, BLOCK_P)
    place_Q = tl.arange(0, BLOCK_P // PIECE) * PIECE
    input_P = input_of(place_P)
    x_PT = x_ptr + token_T.to(tl.int64)[None, :] * K + input_P[:, None]
    codes_NP = codes_ptr + output_N.to(tl.int64)[:, None] * P + place_P[None, :]
    sum_NT = tl.zeros([BLOCK_N, BLOCK_T], tl.float32)
    wait_for_previous()
    for start in range(0, P, BLOCK_P):
        codes = tl.load(codes_NP + start, mask=inside_N[:, None] & (start + place_P < P)[None, :], other=0)
        low_P, high_P = 2 * start + input_P < K, 2 * start + input_P + HALF_CHUNK < K
        low_x_PT = tl.load(x_PT + 2 * start, mask=low_P[:, None] & inside_T[None, :], other=0.0)
        high_x_PT = tl.load(x_PT + 2 * start + HALF_CHUNK, mask=high_P[:, None] & inside_T[None, :], other=0.0)
        place_NQ = output_N[:, None] * groups + ((start + place_Q) // GROUP)[None, :]
        inside_NQ = inside_N[:, None] & (start + place_Q < P)[None, :]
        scale_NQ, offset_NQ = scales(scale_ptr, zero_ptr, place_NQ, inside_NQ, IS_E2M1)
        low_NP = weights(codes, scale_NQ, offset_NQ, dtype, False, IS_E2M1)
        sum_NT = tl.dot(low_NP, low_x_PT, sum_NT, input_precision="ieee")
        high_NP = weights(codes, scale_NQ, offset_NQ, dtype, True, IS_E2M1)
        sum_NT = tl.dot(high_NP, high_x_PT, sum_NT, input_precision="ieee")
    if factor_ptr is not None:
        sum_NT *= _factors(factor_ptr, output_N, inside_N)[:, None]
    if bias_ptr is not None:
        sum_NT += tl.load(bias_ptr + output_N, mask=inside_N, other=0.0).to(tl.float32)[:, None]
    out_NT = out_ptr + token_T.to(tl.int64)[None, :] * N + output_N[:, None]
    inside_NT = inside_N[:, None] & inside_T[None, :]
    finish(out_NT, sum_NT, sum_NT, before_add(out_NT, inside_NT, END), multiplier, inside_NT, END)
