// Products with weights in a file's own block format, decoded in registers or into a buffer that stays in cache.
//
// Each sum runs over the inputs in their order, LANES partial sums side by side, whichever kernel takes it and however many
// tokens there are: in float32 a token's result does not depend on its neighbours.
//
// Shapes: T tokens, I inputs, O outputs.
#include <algorithm>
#include <type_traits>

#include "blocks.h"
#include "buffer.h"
#include "norm.h"
#include "products.h"
#include "torch_abi.h"

namespace stepgraph {
namespace {

constexpr int64_t FEW_TOKENS = 8;
constexpr int64_t BUFFER_ROWS = 32;  // decoded at a time: of 1,536 inputs 192 KiB, half that in bfloat16
constexpr int TILE_ROWS = 4;
#if defined(__AVX512F__)
constexpr int TILE_TOKENS = 4;  // 16 sums are added up at once
#else
constexpr int TILE_TOKENS = 3;  // 12 sums, 3 of x and one weight are all registers
#endif

// Few tokens: weights go from memory through registers, once. Rows side by side hide how long a sum waits for itself.
template <typename Format, int ROWS, int TOKENS>
void direct(const uint8_t* codes, int64_t row_bytes, const float* x, int64_t inputs, float* out, int64_t outputs) {
  Lanes total[ROWS][TOKENS];
  for (auto& row : total)
    for (auto& lanes : row) lanes = zero();
  for (int64_t i = 0; i < inputs; i += BLOCK, codes += Format::BYTES) {
    for (int r = 0; r < ROWS; r++) {
      // The hardware does not foresee several rows of a few hundred bytes side by side: without this, a third of the speed.
      _mm_prefetch(reinterpret_cast<const char*>(codes + (r + 2 * ROWS) * row_bytes), _MM_HINT_T0);
      Lanes w[PARTS];
      Format::decode(codes + r * row_bytes, w);
      for (int part = 0; part < PARTS; part++)
        for (int t = 0; t < TOKENS; t++)
          total[r][t] = fma(w[part], load(x + t * inputs + i + part * LANES), total[r][t]);
    }
  }
  for (int t = 0; t < TOKENS; t++)
    for (int r = 0; r < ROWS; r++) out[t * outputs + r] = sum(total[r][t]);
}

template <typename Format, int TOKENS>
void direct_rows(const uint8_t* codes, const float* x, int64_t inputs, float* out, int64_t outputs, int64_t begin,
                 int64_t end) {
  constexpr int ROWS = TOKENS <= 2 ? 4 : LANES / 8;  // as many sums as there are registers for
  const int64_t row_bytes = inputs / BLOCK * Format::BYTES;
  int64_t row = begin;
  for (; row + ROWS <= end; row += ROWS)
    direct<Format, ROWS, TOKENS>(codes + row * row_bytes, row_bytes, x, inputs, out + row, outputs);
  for (; row < end; row++)
    direct<Format, 1, TOKENS>(codes + row * row_bytes, row_bytes, x, inputs, out + row, outputs);
}

template <typename Format, int TOKENS = FEW_TOKENS>
void few(const uint8_t* codes, const float* x, int64_t tokens, int64_t inputs, float* out, int64_t outputs,
         int64_t begin, int64_t end) {
  if constexpr (TOKENS > 1)
    if (tokens < TOKENS) return few<Format, TOKENS - 1>(codes, x, tokens, inputs, out, outputs, begin, end);
  direct_rows<Format, TOKENS>(codes, x, inputs, out, outputs, begin, end);
}

// Many tokens: a tile of sums over decoded rows.
template <int ROWS, int TOKENS>
void tile(const float* w, const float* x, int64_t inputs, float* out, int64_t outputs) {
  Lanes total[TOKENS][ROWS];
  for (auto& token : total)
    for (auto& lanes : token) lanes = zero();
  for (int64_t i = 0; i < inputs; i += LANES)
    for (int r = 0; r < ROWS; r++)
      for (int t = 0; t < TOKENS; t++)
        total[t][r] = fma(load(w + r * inputs + i), load(x + t * inputs + i), total[t][r]);
#if defined(__AVX512F__)
  if constexpr (ROWS == 4 && TOKENS == 4) {
    alignas(64) float added[16];
    store(added, sums(total[0]));
    for (int t = 0; t < TOKENS; t++) std::memcpy(out + t * outputs, added + t * ROWS, ROWS * sizeof(float));
    return;
  }
#endif
  for (int t = 0; t < TOKENS; t++)
    for (int r = 0; r < ROWS; r++) out[t * outputs + r] = sum(total[t][r]);
}

template <int TOKENS>
void tile_rows(const float* w, int64_t rows, const float* x, int64_t inputs, float* out, int64_t outputs) {
  int64_t r = 0;
  for (; r + TILE_ROWS <= rows; r += TILE_ROWS) tile<TILE_ROWS, TOKENS>(w + r * inputs, x, inputs, out + r, outputs);
  for (; r < rows; r++) tile<1, TOKENS>(w + r * inputs, x, inputs, out + r, outputs);
}

// Rows `begin` … `end` of the weight for all tokens.
template <typename Format>
void many(const uint8_t* codes, const float* x, int64_t tokens, int64_t inputs, float* out, int64_t outputs,
          int64_t begin, int64_t end) {
  const Buffer<float> decoded(BUFFER_ROWS * inputs);
  for (int64_t first = begin; first < end; first += BUFFER_ROWS) {
    const int64_t rows = std::min(BUFFER_ROWS, end - first), blocks = inputs / BLOCK;
    for (int64_t block = 0; block < rows * blocks; block++) {
      Lanes w[PARTS];
      Format::decode(codes + (first * blocks + block) * Format::BYTES, w);
      for (int part = 0; part < PARTS; part++) store(decoded.get() + block * BLOCK + part * LANES, w[part]);
    }
    // Tokens outside: a tile's tokens stay in the first cache while the rows, in the second, pass by.
    int64_t t = 0;
    for (; t + TILE_TOKENS <= tokens; t += TILE_TOKENS)
      tile_rows<TILE_TOKENS>(decoded.get(), rows, x + t * inputs, inputs, out + t * outputs + first, outputs);
    for (; t < tokens; t++)
      tile_rows<1>(decoded.get(), rows, x + t * inputs, inputs, out + t * outputs + first, outputs);
  }
}

#if defined(__AVX512BF16__)

// Many tokens in bfloat16: lanes are outputs, and pairs of neighbouring inputs are multiplied and added at once.
constexpr int PANELS = 2;
constexpr int PANEL_TOKENS = 8;

using Pairs = __m512i;  // two bfloat16 of each of 16 rows or of one row's 32

inline Pairs rounded(const Lanes* w) {
  const __m512bh both = _mm512_cvtne2ps_pbh(w[1], w[0]);
  Pairs pairs;
  std::memcpy(&pairs, &both, sizeof pairs);
  return pairs;
}

// Exchange lanes and registers that are DISTANCE apart, then those at half of it, and so on.
template <int DISTANCE = 8>
inline void transpose(Pairs* a) {
  const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  const __m512i distance = _mm512_set1_epi32(DISTANCE), second = _mm512_set1_epi32(16);
  const __mmask16 upper = _mm512_test_epi32_mask(lane, distance);
  // Of two registers, 0 … 15 are the lanes of the first and 16 … 31 those of the second.
  const __m512i low = _mm512_mask_add_epi32(lane, upper, _mm512_sub_epi32(lane, distance), second);
  const __m512i high = _mm512_mask_add_epi32(_mm512_add_epi32(lane, distance), upper, lane, second);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++)
    if (!(i & DISTANCE)) {
      const Pairs x = a[i], y = a[i + DISTANCE];
      a[i] = _mm512_permutex2var_epi32(x, low, y);
      a[i + DISTANCE] = _mm512_permutex2var_epi32(x, high, y);
    }
  if constexpr (DISTANCE > 1) transpose<DISTANCE / 2>(a);
}

// Rows `row` … of the weight, as [I / 2][PANELS][16] pairs; those from `end` on repeat the last.
template <typename Format>
void decode_panels(const uint8_t* codes, int64_t inputs, int64_t row, int64_t end, Pairs* out) {
  const int64_t row_bytes = inputs / BLOCK * Format::BYTES;
  for (int64_t block = 0; block < inputs / BLOCK; block++)
    for (int panel = 0; panel < PANELS; panel++) {
      Pairs pairs[16];
#pragma GCC unroll 16
      for (int r = 0; r < 16; r++) {
        Lanes w[PARTS];
        Format::decode(codes + std::min(row + panel * 16 + r, end - 1) * row_bytes + block * Format::BYTES, w);
        pairs[r] = rounded(w);
      }
      transpose(pairs);
#pragma GCC unroll 16
      for (int i = 0; i < 16; i++) out[(block * 16 + i) * PANELS + panel] = pairs[i];
    }
}

inline Lanes add_pairs(Lanes total, Pairs w, Pairs x) {
  __m512bh pairs_w, pairs_x;
  std::memcpy(&pairs_w, &w, sizeof pairs_w);
  std::memcpy(&pairs_x, &x, sizeof pairs_x);
  return _mm512_dpbf16_ps(total, pairs_w, pairs_x);
}

// `count` … outputs of up to PANEL_TOKENS tokens; x: [T, I / 2] pairs.
template <int TOKENS = PANEL_TOKENS>
void panel_tile(const Pairs* w, const uint32_t* x, int64_t tokens, int64_t inputs, float* out, int64_t outputs,
                int64_t count) {
  if constexpr (TOKENS > 1)
    if (tokens < TOKENS) return panel_tile<TOKENS - 1>(w, x, tokens, inputs, out, outputs, count);
  Lanes total[TOKENS][PANELS];
  for (auto& token : total)
    for (auto& lanes : token) lanes = zero();
  for (int64_t i = 0; i < inputs / 2; i++)
    for (int t = 0; t < TOKENS; t++)
      for (int panel = 0; panel < PANELS; panel++)
        total[t][panel] = add_pairs(total[t][panel], w[i * PANELS + panel], _mm512_set1_epi32(x[t * (inputs / 2) + i]));
  for (int t = 0; t < TOKENS; t++)
    for (int panel = 0; panel < PANELS; panel++) {
      const int64_t left = std::clamp<int64_t>(count - panel * 16, 0, 16);
      _mm512_mask_storeu_ps(out + t * outputs + panel * 16, (1 << left) - 1, total[t][panel]);
    }
}

template <typename Format>
void many_in_bfloat16(const uint8_t* codes, const float* x, int64_t tokens, int64_t inputs, float* out,
                      int64_t outputs) {
  const Buffer<Pairs> x_pairs(tokens * inputs / BLOCK);
  parallel(tokens * inputs / BLOCK, 256, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; i++) {
      const Lanes values[PARTS] = {load(x + i * BLOCK), load(x + i * BLOCK + LANES)};
      x_pairs.get()[i] = rounded(values);
    }
  });
  constexpr int64_t ROWS = PANELS * 16;
  parallel((outputs + ROWS - 1) / ROWS, 1, [&](int64_t begin, int64_t end) {
    const Buffer<Pairs> w(inputs / 2 * PANELS);
    for (int64_t row = begin * ROWS; row < std::min(end * ROWS, outputs); row += ROWS) {
      decode_panels<Format>(codes, inputs, row, outputs, w.get());
      for (int64_t t = 0; t < tokens; t += PANEL_TOKENS)
        panel_tile(w.get(), reinterpret_cast<const uint32_t*>(x_pairs.get()) + t * inputs / 2,
                   std::min<int64_t>(PANEL_TOKENS, tokens - t), inputs, out + t * outputs + row, outputs, outputs - row);
    }
  });
}

#endif

}  // namespace

bool is_rounded(const Operands& p) {
#if defined(__AVX512BF16__)
  return p.tokens >= p.bfloat16_from;
#else
  (void)p;
  return false;
#endif
}

void columns_of_product(const Operands& p, const Ends& ends, int64_t begin, int64_t end) {
  const int64_t parts = ends.gated != nullptr ? 2 : 1, columns = p.outputs / parts;
  with_format(p.block_bytes, [&](auto format) {
    using Format = decltype(format);
    for (int64_t part = 0; part < parts; part++) {
      const int64_t offset = part * columns;
      if (p.tokens <= FEW_TOKENS)
        few<Format>(p.codes, p.x, p.tokens, p.inputs, ends.out, p.outputs, offset + begin, offset + end);
      else
        many<Format>(p.codes, p.x, p.tokens, p.inputs, ends.out, p.outputs, offset + begin, offset + end);
    }
  });
  ends.finish(p.tokens, p.outputs, begin, end);
}

void product(const Operands& p, const Ends& ends) {
  const int64_t columns = p.outputs / (ends.gated != nullptr ? 2 : 1);
#if defined(__AVX512BF16__)
  if (is_rounded(p)) {
    with_format(p.block_bytes, [&](auto format) {
      many_in_bfloat16<decltype(format)>(p.codes, p.x, p.tokens, p.inputs, ends.out, p.outputs);
    });
    return parallel(p.tokens, SHARE_TOKENS, [&](int64_t begin, int64_t end) {
      const int64_t first = begin * p.outputs;
      Ends{ends.out + first, ends.residual ? ends.residual + first : nullptr, ends.multiplier,
           ends.gated ? ends.gated + first / 2 : nullptr}
          .finish(end - begin, p.outputs, 0, columns);
    });
  }
#endif
  parallel((columns + LANES - 1) / LANES, 1, [&](int64_t first, int64_t last) {
    columns_of_product(p, ends, first * LANES, std::min(last * LANES, columns));
  });
}

namespace {

Tensor normalised(const Tensor& x_TI, const Tensor& weight_I, float eps) {
  const int64_t tokens = x_TI.size(0), width = x_TI.size(1);
  Tensor out_TI = Tensor::empty({tokens, width});
  const float *x = x_TI.data<float>(), *weight = weight_I.data<float>();
  float* out = out_TI.data<float>();
  parallel(tokens, SHARE_TOKENS, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) rms_norm_row(x + t * width, weight, eps, width, out + t * width);
  });
  return out_TI;
}

void packed_linear(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Tensor x_TI = stack.tensor(), codes_OB = stack.tensor();
  Tensor out_TO = Tensor::empty({x_TI.size(0), codes_OB.size(0)});
  product(Operands::of(x_TI, codes_OB, stack.integer()), {out_TO.data<float>()});
  stack.give(std::move(out_TO));
}

void packed_linear_out(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Tensor x_TI = stack.tensor(), codes_OB = stack.tensor();
  const int64_t bfloat16_from = stack.integer();
  const Tensor out_TO = stack.tensor();
  product(Operands::of(x_TI, codes_OB, bfloat16_from), {out_TO.data<float>()});
}

void packed_linear_add(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Tensor x_TI = stack.tensor(), codes_OB = stack.tensor();
  const int64_t bfloat16_from = stack.integer();
  const Tensor residual_TO = stack.tensor();
  const float multiplier = stack.real();
  const Buffer<float> out(x_TI.size(0) * codes_OB.size(0));
  product(Operands::of(x_TI, codes_OB, bfloat16_from), {out.get(), residual_TO.data<float>(), multiplier});
}

void packed_norm_linear(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Tensor x_TI = stack.tensor(), norm_I = stack.tensor();
  const float eps = stack.real();
  const Tensor codes_OB = stack.tensor();
  Tensor out_TO = Tensor::empty({x_TI.size(0), codes_OB.size(0)});
  product(Operands::of(normalised(x_TI, norm_I, eps), codes_OB, stack.integer()), {out_TO.data<float>()});
  stack.give(std::move(out_TO));
}

void packed_norm_swiglu(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Tensor x_TI = stack.tensor(), norm_I = stack.tensor();
  const float eps = stack.real();
  const Tensor codes_OB = stack.tensor();
  const int64_t tokens = x_TI.size(0), outputs = codes_OB.size(0);
  Tensor gated_TM = Tensor::empty({tokens, outputs / 2});
  const Buffer<float> out(tokens * outputs);
  product(Operands::of(normalised(x_TI, norm_I, eps), codes_OB, stack.integer()),
          {out.get(), nullptr, 1.0f, gated_TM.data<float>()});
  stack.give(std::move(gated_TM));
}

void packed_rows(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Tensor codes_OB = stack.tensor(), index_T = stack.tensor();
  const int64_t inputs = stack.integer(), tokens = index_T.size(0), row_bytes = codes_OB.size(1);
  Tensor out_TI = Tensor::empty({tokens, inputs});
  const uint8_t* codes = codes_OB.data<uint8_t>();
  const int32_t* index = index_T.data<int32_t>();
  float* out = out_TI.data<float>();
  with_format(row_bytes * BLOCK / inputs, [&](auto format) {
    using Format = decltype(format);
    parallel(tokens, 64, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; t++)
        for (int64_t block = 0; block < inputs / BLOCK; block++) {
          Lanes w[PARTS];
          Format::decode(codes + index[t] * row_bytes + block * Format::BYTES, w);
          for (int part = 0; part < PARTS; part++) store(out + t * inputs + block * BLOCK + part * LANES, w[part]);
        }
    });
  });
  stack.give(std::move(out_TI));
}

}  // namespace

void register_linear(TorchLibraryHandle library) {
  kernel(library, "packed_linear", packed_linear);
  kernel(library, "packed_linear_out", packed_linear_out);
  kernel(library, "packed_linear_add", packed_linear_add);
  kernel(library, "packed_norm_linear", packed_norm_linear);
  kernel(library, "packed_norm_swiglu", packed_norm_swiglu);
  kernel(library, "packed_rows", packed_rows);
}

}  // namespace stepgraph
