"""Triton kernels of `sample`: a first pass over all of the logits at once, then one program per row.

The first kernel cuts every row into chunks, so that even one row keeps the whole chip busy, and leaves each chunk's best
entry. The second takes the best of those. Of a row with `min_p`, `top_k` or `top_p` the first kernel leaves instead, for
every segment of some 64 entries, the largest logit and the largest noisy one. They tell the second kernel which segments
matter, so that it reads no others:

- The k-th largest of the segments' maxima has k entries at or above it. Segments whose maximum is lower hold none of
  the k largest, which are searched among the few entries left.
- The token is the arg-max of the noisy logits kept. Segments are opened from the highest noisy maximum, kept or not,
  down to the best kept entry found. Some 1 / (share of the mass that is kept) are enough.
- `top_p` keeps an entry if those above it weigh less than its share: this needs no sort, and is asked of the token drawn only.
  If the token is not kept, then nothing at or below it is, and the draw is repeated among the entries above. What is drawn
  in the end is the arg-max of those kept.

Shapes: R rows, V vocabulary entries, N chunks of a row, B entries of a block, S entries of a segment, M segments of a row,
T segments of a tile or chunk, C candidates of the k largest, G groups of what is ranked.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from stepgraph.abi import slot_line as line
from stepgraph.ops.launched import launched

CHUNK = 4096
"""Entries per program of the first kernel."""
MAX_SEGMENTS = 4096
"""Segments of a row that the second kernel holds in registers."""
MIN_SEGMENT = 16
"""Entries of a segment, at least."""
CANDIDATES = 4096
"""Candidates of the k largest entries that the second kernel holds in registers."""

_NULL_SLOT = tl.constexpr(line.NULL_SLOT)
_LINE_WIDTH = tl.constexpr(line.LINE_WIDTH)
_LENGTH = tl.constexpr(line.LENGTH)
_TOP_K = tl.constexpr(line.TOP_K)
_TEMPERATURE = tl.constexpr(line.TEMPERATURE)
_TOP_P = tl.constexpr(line.TOP_P)
_MIN_P = tl.constexpr(line.MIN_P)
_SEED_LOW = tl.constexpr(line.SEED_LOW)
_SEED_HIGH = tl.constexpr(line.SEED_HIGH)
_NO_TOKEN = tl.constexpr(line.NO_TOKEN)

_TILE = tl.constexpr(8192)  # entries that are counted or weighed at once
_DRAW_TILE = tl.constexpr(2048)  # entries whose noise is drawn at once
_DRAW_SPAN = tl.constexpr(3.0)  # segments within this of the highest noisy logit are opened at once: e³ or so
_CANDIDATES = tl.constexpr(CANDIDATES)
KEY_OUTSIDE = tl.constexpr(-(2**31))  # below the key of any float
_KEY_HIGHEST = tl.constexpr(0x7F800000)  # `float_key(inf)`
_KEY_LOWEST = tl.constexpr(-0x7F800001)  # `float_key(-inf)`


@triton.jit
def _settings(line_ptr, V: tl.constexpr):
    """Temperature, min_p, top_k with 0 for all, top_p, and whether any of the last three may keep less than all."""
    temperature = tl.load(line_ptr + _TEMPERATURE).to(tl.float32, bitcast=True)
    top_k = tl.load(line_ptr + _TOP_K)
    top_p = tl.load(line_ptr + _TOP_P).to(tl.float32, bitcast=True)
    min_p = tl.load(line_ptr + _MIN_P).to(tl.float32, bitcast=True)
    top_k = tl.where(top_k < V, top_k, 0)
    return temperature, min_p, top_k, top_p, (temperature > 0) & ((min_p > 0) | (top_k > 0) | (top_p < 1))


@triton.jit
def _logits(logits_ptr, entry, V: tl.constexpr):
    """Some entries of a row as float32, -inf for NaN and beyond V."""
    x = tl.load(logits_ptr + entry, mask=entry < V, other=-float("inf")).to(tl.float32)
    return tl.where(x == x, x, -float("inf"))


@triton.jit
def _gumbel(line_ptr, offset, group):
    """Noise of the entries 4·group … 4·group + 3, side by side: [..., G] int32 to [..., 4·G] float32."""
    low = tl.load(line_ptr + _SEED_LOW).to(tl.uint32, bitcast=True).to(tl.uint64)
    high = tl.load(line_ptr + _SEED_HIGH).to(tl.uint32, bitcast=True).to(tl.uint64)
    position = tl.zeros_like(group) + tl.load(line_ptr + _LENGTH) + offset
    zero = tl.zeros_like(group)
    w0, w1, w2, w3 = tl.philox(low | (high << 32), group, position, zero, zero)
    bits = tl.interleave(tl.interleave(w0, w2), tl.interleave(w1, w3))
    uniform = ((bits >> 9).to(tl.int32).to(tl.float32) + 0.5) * (2.0**-23)
    return -tl.log(-tl.log(uniform))


@triton.jit
def _mass(x, peak, temperature):
    """exp((x - peak) / temperature), also where both are the same infinity."""
    return tl.where(x == peak, 1.0, tl.exp2((x - peak) * (1.4426950408889634 / temperature)))


@launched
@triton.jit(do_not_specialize_on_alignment=["mass_ptr"])  # half of a buffer: aligned for some row counts
def _chunks_kernel(
    logits_ptr,
    row_slot_ptr,
    offset_ptr,
    lines_ptr,
    value_ptr,
    token_ptr,
    mass_ptr,
    highest_ptr,
    noisiest_ptr,
    V: tl.constexpr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Best entry of one chunk, of the noisy logits where the row draws from all; else what `_draw_filtered` needs of it."""
    row = tl.program_id(0)
    chunk = tl.program_id(1)
    slot = tl.load(row_slot_ptr + row)
    if slot != _NULL_SLOT:
        line_ptr = lines_ptr + slot * _LINE_WIDTH
        offset = tl.load(offset_ptr + row)
        temperature, _, _, _, filtered = _settings(line_ptr, V)
        start = chunk * BLOCK
        x_B = _logits(logits_ptr + row.to(tl.int64) * V, start + tl.arange(0, BLOCK), V)
        segment_T = (row * N + chunk) * (BLOCK // SEGMENT) + tl.arange(0, BLOCK // SEGMENT)
        if filtered:
            peak = tl.max(x_B, 0)
            tl.store(value_ptr + row * N + chunk, peak)
            tl.store(mass_ptr + row * N + chunk, tl.sum(_mass(x_B, peak, temperature), 0))
            tl.store(highest_ptr + segment_T, tl.max(tl.reshape(x_B, [BLOCK // SEGMENT, SEGMENT]), 1))
        x_B = tl.div_rn(x_B, tl.where(temperature > 0, temperature, 1.0))
        if temperature > 0:
            x_B += _gumbel(line_ptr, offset, start // 4 + tl.arange(0, BLOCK // 4))
        if filtered:
            tl.store(noisiest_ptr + segment_T, tl.max(tl.reshape(x_B, [BLOCK // SEGMENT, SEGMENT]), 1))
        else:
            value, index = tl.max(x_B, 0, return_indices=True)
            tl.store(value_ptr + row * N + chunk, value)
            tl.store(token_ptr + row * N + chunk, start + index)


@triton.jit
def float_key(x_B):
    """int32 in the order of the floats; both zeros alike. The lowest, of -inf, is above KEY_OUTSIDE."""
    bits_B = tl.where(x_B == 0, 0.0, x_B).to(tl.int32, bitcast=True)
    return bits_B ^ ((bits_B >> 31) & 0x7FFFFFFF)


@triton.jit
def _key_float(key):
    """The float of a key."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _middle(low, high):
    """Half of low + high, rounded down, without overflow: `low` where no key lies between."""
    return (low & high) + ((low ^ high) >> 1)


@triton.jit
def _kth_largest(key_B, low, high, k):
    """Highest key with at least `k` of `key_B` at or above it, from `low` to below `high`; `low` if there is none.

    Stops early at a lower key with the same `k` above.
    """
    middle = _middle(low, high)
    while middle > low:
        count = tl.sum((key_B >= middle).to(tl.int32), 0)
        low = tl.where(count >= k, middle, low)
        high = tl.where(count < k, middle, tl.where(count == k, middle + 1, high))
        middle = _middle(low, high)
    return low


@triton.jit
def _logit_key(scaled_key, high, temperature):
    """Lowest key of a logit that divided by the temperature has at least the key given, as the logit of key `high` has.

    Several logits can give the same quotient, and quotients are what the definition compares.
    """
    near = float_key(_key_float(scaled_key) * temperature) + tl.arange(0, 32) - 16  # surely, unless something overflows
    near = tl.minimum(
        tl.maximum(near, _KEY_LOWEST), _KEY_HIGHEST
    )  # beyond lie NaNs, which a GPU's division makes positive
    enough = float_key(tl.div_rn(_key_float(near), temperature)) >= scaled_key
    low = tl.max(tl.where(enough, _KEY_LOWEST - 1, near), 0)
    high = tl.minimum(tl.min(tl.where(enough, near, high), 0), high)
    middle = _middle(low, high)
    while middle > low:
        lower = float_key(tl.div_rn(_key_float(middle), temperature)) < scaled_key
        low = tl.where(lower, middle, low)
        high = tl.where(lower, high, middle)
        middle = _middle(low, high)
    return high


@triton.jit
def _ranks(chosen_GS):
    """How many of the entries before each, row by row, are chosen, and how many are in all. Scans rows within warps."""
    chosen_GS = chosen_GS.to(tl.int32)
    count_G = tl.sum(chosen_GS, 1)
    rank_GS = tl.cumsum(chosen_GS, 1) - chosen_GS + (tl.cumsum(count_G, 0) - count_G)[:, None]
    return rank_GS, tl.sum(count_G, 0)


@triton.jit
def _list_segments(list_ptr, chosen_M):
    """Write the numbers of the segments chosen, in order, where all threads may read them. Returns how many."""
    GROUPS: tl.constexpr = chosen_M.shape[0] // 32
    chosen_GS = tl.reshape(chosen_M, [GROUPS, 32])
    segment_GS = tl.reshape(tl.arange(0, GROUPS * 32), [GROUPS, 32])
    rank_GS, count = _ranks(chosen_GS)
    tl.debug_barrier()  # what was listed before has been read
    tl.store(list_ptr + rank_GS, segment_GS, mask=chosen_GS)
    tl.debug_barrier()
    return count


@triton.jit
def _listed(list_ptr, start, num_listed, V: tl.constexpr, T: tl.constexpr, SEGMENT: tl.constexpr):
    """First entries of `T` listed segments, [T] int32; beyond the vocabulary where the list has ended."""
    index_T = start + tl.arange(0, T)
    BEYOND: tl.constexpr = (V + SEGMENT - 1) // SEGMENT
    return tl.load(list_ptr + index_T, mask=index_T < num_listed, other=BEYOND) * SEGMENT


@triton.jit
def _listed_logits(logits_ptr, list_ptr, start, num_listed, V: tl.constexpr, SEGMENT: tl.constexpr):
    """Logits of a tile of listed segments, [T, S], -inf where the list has ended."""
    first_T = _listed(list_ptr, start, num_listed, V, _TILE // SEGMENT, SEGMENT)
    return _logits(logits_ptr, first_T[:, None] + tl.arange(0, SEGMENT)[None, :], V)


@triton.jit
def _collect(logits_ptr, list_ptr, candidate_ptr, highest_M, low, V: tl.constexpr, SEGMENT: tl.constexpr):
    """Write the logits from `low` up as candidates, as many as fit. Returns how many there are."""
    num_listed = _list_segments(list_ptr, highest_M >= low)
    count = 0
    for start in range(0, num_listed, _TILE // SEGMENT):
        x_TS = _listed_logits(logits_ptr, list_ptr, start, num_listed, V, SEGMENT)
        above_TS = x_TS >= low
        rank_TS, num_above = _ranks(above_TS)
        rank_TS += count
        tl.store(candidate_ptr + rank_TS, x_TS, mask=above_TS & (rank_TS < _CANDIDATES))
        count += num_above
    tl.debug_barrier()
    return count


@triton.jit
def _top_k_key(logits_ptr, list_ptr, candidate_ptr, highest_M, peak_key, top_k, V: tl.constexpr, SEGMENT: tl.constexpr):
    """Key of the `top_k`-th largest logit, or of the lowest above -inf if there are fewer."""
    low = tl.full((), _KEY_LOWEST + 1, tl.int32)
    high = peak_key + 1
    key_M = float_key(highest_M)
    possible_M = key_M >= low
    if tl.sum(possible_M.to(tl.int32), 0) >= top_k:
        low = _kth_largest(key_M, tl.min(tl.where(possible_M, key_M, high), 0), high, top_k)
    count = _collect(logits_ptr, list_ptr, candidate_ptr, highest_M, _key_float(low), V, SEGMENT)
    middle = _middle(low, high)
    while (count > _CANDIDATES) & (middle > low):
        above = _collect(logits_ptr, list_ptr, candidate_ptr, highest_M, _key_float(middle), V, SEGMENT)
        high = tl.where(above < top_k, middle, high)
        low = tl.where(above < top_k, low, middle)
        count = tl.where(above < top_k, count, above)
        middle = _middle(low, high)
    if count <= _CANDIDATES:
        candidate_C = tl.arange(0, _CANDIDATES)
        x_C = tl.load(candidate_ptr + candidate_C, mask=candidate_C < count, other=-float("inf"))
        key_C = float_key(x_C)
        low = _kth_largest(key_C, low, high, top_k)
        low = tl.min(tl.where(key_C >= low, key_C, peak_key), 0)
    return low


@triton.jit
def _weigh(logits_ptr, list_ptr, highest_M, low, peak, temperature, V: tl.constexpr, SEGMENT: tl.constexpr):
    """Mass of the logits from `low` up, in units of the largest one's."""
    num_listed = _list_segments(list_ptr, highest_M >= low)
    mass_TS = tl.zeros([_TILE // SEGMENT, SEGMENT], tl.float32)
    for start in range(0, num_listed, _TILE // SEGMENT):
        x_TS = _listed_logits(logits_ptr, list_ptr, start, num_listed, V, SEGMENT)
        mass_TS += tl.where(x_TS >= low, _mass(x_TS, peak, temperature), 0.0)
    return tl.sum(mass_TS)


@triton.jit
def _draw(
    logits_ptr,
    line_ptr,
    offset,
    list_ptr,
    highest_M,
    noisiest_M,
    low,
    temperature,
    V: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Arg-max, over the logits from `low` up, of the noisy ones; the lowest index of a tie. V if all of them are -inf."""
    T: tl.constexpr = _DRAW_TILE // SEGMENT
    unopened_M = tl.where(highest_M >= low, noisiest_M, -float("inf"))
    bound = tl.max(unopened_M, 0)
    best = -float("inf")
    token = V
    while (bound >= best) & (bound > -float("inf")):
        opened_M = unopened_M >= bound - _DRAW_SPAN
        num_listed = _list_segments(list_ptr, opened_M)
        for start in range(0, num_listed, T):
            first_T = _listed(list_ptr, start, num_listed, V, T, SEGMENT)
            entry_TS = first_T[:, None] + tl.arange(0, SEGMENT)[None, :]
            x_TS = _logits(logits_ptr, entry_TS, V)
            noise_TS = _gumbel(line_ptr, offset, first_T[:, None] // 4 + tl.arange(0, SEGMENT // 4)[None, :])
            score_TS = tl.where(x_TS >= low, tl.div_rn(x_TS, temperature) + noise_TS, -float("inf"))
            value = tl.max(score_TS)
            first = tl.min(tl.where(score_TS == value, entry_TS, V))
            token = tl.where(value > best, first, tl.where(value == best, tl.minimum(first, token), token))
            best = tl.maximum(value, best)
        unopened_M = tl.where(opened_M, -float("inf"), unopened_M)
        bound = tl.max(unopened_M, 0)
    return token


@triton.jit
def _draw_filtered(
    logits_ptr,
    line_ptr,
    offset,
    highest_ptr,
    noisiest_ptr,
    list_ptr,
    candidate_ptr,
    peak,
    total,
    V: tl.constexpr,
    M: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Token of a row with `min_p`, `top_k` or `top_p`.

    `peak` is its largest logit, above -inf; `total` the mass of all entries in units of the largest one's.
    """
    temperature, min_p, top_k, top_p, _ = _settings(line_ptr, V)
    segment_M = tl.arange(0, BLOCK_M)
    highest_M = tl.load(highest_ptr + segment_M, mask=segment_M < M, other=-float("inf"))
    noisiest_M = tl.load(noisiest_ptr + segment_M, mask=segment_M < M, other=-float("inf"))
    peak_key = float_key(peak)
    scaled_peak = tl.div_rn(peak, temperature)
    scaled_low = tl.full((), _KEY_LOWEST, tl.int32)
    if min_p > 0:
        scaled_low = float_key(scaled_peak + tl.log(min_p))
    if top_k > 0:
        kth = _top_k_key(logits_ptr, list_ptr, candidate_ptr, highest_M, peak_key, top_k, V, SEGMENT)
        scaled_low = tl.maximum(scaled_low, float_key(tl.div_rn(_key_float(kth), temperature)))
    if top_p < 1:
        if scaled_low > _KEY_LOWEST:
            kept = _key_float(_logit_key(scaled_low, peak_key, temperature))
            total = _weigh(logits_ptr, list_ptr, highest_M, kept, peak, temperature, V, SEGMENT)
        if top_p * total <= 1:  # the largest alone is enough
            scaled_low = float_key(scaled_peak)
    low = _logit_key(scaled_low, peak_key, temperature)
    token = tl.full((), V, tl.int32)
    while low <= peak_key:
        token = _draw(
            logits_ptr, line_ptr, offset, list_ptr, highest_M, noisiest_M, _key_float(low), temperature, V, SEGMENT
        )
        low = peak_key + 1  # ends the search, unless entries above the token are enough without it
        scaled = tl.div_rn(_logits(logits_ptr, token, V), temperature)
        if (top_p < 1) & (token < V) & (scaled < scaled_peak):
            above = _logit_key(float_key(scaled) + 1, peak_key, temperature)
            mass = _weigh(logits_ptr, list_ptr, highest_M, _key_float(above), peak, temperature, V, SEGMENT)
            low = tl.where(mass >= top_p * total, above, low)
    return tl.where(token < V, token, _NO_TOKEN)


@launched
@triton.jit(do_not_specialize_on_alignment=["mass_ptr"])  # half of a buffer: aligned for some row counts
def _rows_kernel(
    logits_ptr,
    row_slot_ptr,
    offset_ptr,
    lines_ptr,
    value_ptr,
    token_ptr,
    mass_ptr,
    highest_ptr,
    noisiest_ptr,
    list_ptr,
    candidate_ptr,
    out_ptr,
    V: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SEGMENT: tl.constexpr,
):
    """Best of the chunks' entries, or a draw from those kept."""
    row = tl.program_id(0)
    slot = tl.load(row_slot_ptr + row)
    token = tl.full((), _NO_TOKEN, tl.int32)
    if slot != _NULL_SLOT:
        line_ptr = lines_ptr + slot * _LINE_WIDTH
        offset = tl.load(offset_ptr + row)
        temperature, _, _, _, filtered = _settings(line_ptr, V)
        chunk_N = tl.arange(0, BLOCK_N)
        value_N = tl.load(value_ptr + row * N + chunk_N, mask=chunk_N < N, other=-float("inf"))
        value, chunk = tl.max(value_N, 0, return_indices=True)
        if value > -float("inf"):
            if filtered:
                mass_N = tl.load(mass_ptr + row * N + chunk_N, mask=chunk_N < N, other=0.0)
                token = _draw_filtered(
                    logits_ptr + row.to(tl.int64) * V,
                    line_ptr,
                    offset,
                    highest_ptr + row * M,
                    noisiest_ptr + row * M,
                    list_ptr + row * M,
                    candidate_ptr + row * _CANDIDATES,
                    value,
                    tl.sum(mass_N * _mass(value_N, value, temperature), 0),
                    V,
                    M,
                    BLOCK_M,
                    SEGMENT,
                )
            else:
                token = tl.load(token_ptr + row * N + chunk)
    tl.store(out_ptr + row, token)


def sample(logits: Tensor, row_slot: Tensor, offset: Tensor, lines: Tensor) -> Tensor:
    """See `stepgraph.ops.sample.sample`."""
    num_rows, vocab_size = logits.shape
    num_chunks = triton.cdiv(vocab_size, CHUNK)
    segment = max(MIN_SEGMENT, triton.next_power_of_2(triton.cdiv(vocab_size, MAX_SEGMENTS)))
    num_segments = num_chunks * CHUNK // segment
    value_RN, mass_RN = logits.new_empty(2, num_rows, num_chunks, dtype=torch.float32)
    token_RN = logits.new_empty(num_rows, num_chunks, dtype=torch.int32)
    highest_RM, noisiest_RM = logits.new_empty(2, num_rows, num_segments, dtype=torch.float32)
    list_RM = logits.new_empty(num_rows, num_segments, dtype=torch.int32)
    candidate_RC = logits.new_empty(num_rows, CANDIDATES, dtype=torch.float32)
    out_R = logits.new_empty(num_rows, dtype=torch.int32)
    _chunks_kernel[(num_rows, num_chunks)](
        logits,
        row_slot,
        offset,
        lines,
        value_RN,
        token_RN,
        mass_RN,
        highest_RM,
        noisiest_RM,
        V=vocab_size,
        N=num_chunks,
        BLOCK=CHUNK,
        SEGMENT=segment,
        num_warps=8,
    )
    _rows_kernel[(num_rows,)](
        logits,
        row_slot,
        offset,
        lines,
        value_RN,
        token_RN,
        mass_RN,
        highest_RM,
        noisiest_RM,
        list_RM,
        candidate_RC,
        out_R,
        V=vocab_size,
        N=num_chunks,
        M=num_segments,
        BLOCK_N=max(16, triton.next_power_of_2(num_chunks)),
        BLOCK_M=triton.next_power_of_2(num_segments),
        SEGMENT=segment,
        num_warps=16,
    )
    return out_R
