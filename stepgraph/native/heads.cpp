// Products of heads with weights of their own, around latent attention, in float32: no token's result depends on its neighbours.
//
// Shapes: T tokens, H heads, N dimensions of a head that are not rotated, P that are, R of a latent, V of a head's values.
#include <algorithm>
#include <cstring>

#include "buffer.h"
#include "norm.h"
#include "products.h"
#include "rotate.h"
#include "torch_abi.h"

namespace stepgraph {
namespace {

constexpr int64_t COLUMNS = 256;     // of a product that a thread takes at a time
constexpr int64_t BLOCK_TOKENS = 16;  // whose sums of so many columns stay in the first cache
constexpr int64_t VALUES = 64;        // of a head that a thread takes at a time
constexpr int ROWS = 4;

// out[t] += Σ_i x[t][i] · w[i], in the order of i, for all columns
template <int ROWS, int TOKENS>
void add_rows(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t columns, float* out, int64_t out_stride) {
  Lanes factor[TOKENS][ROWS];
  for (int t = 0; t < TOKENS; t++)
    for (int i = 0; i < ROWS; i++) factor[t][i] = all(x[t * x_stride + i]);
  for (int64_t c = 0; c < columns; c += LANES) {
    Lanes total[TOKENS];
    for (int t = 0; t < TOKENS; t++) total[t] = load(out + t * out_stride + c);
    for (int i = 0; i < ROWS; i++) {
      const Lanes row = load(w + i * w_stride + c);
      for (int t = 0; t < TOKENS; t++) total[t] = fma(factor[t][i], row, total[t]);
    }
    for (int t = 0; t < TOKENS; t++) store(out + t * out_stride + c, total[t]);
  }
}

template <int ROWS>
void add_rows(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t tokens, int64_t columns, float* out,
              int64_t out_stride) {
  int64_t t = 0;
  for (; t + 2 <= tokens; t += 2)
    add_rows<ROWS, 2>(x + t * x_stride, x_stride, w, w_stride, columns, out + t * out_stride, out_stride);
  if (t < tokens) add_rows<ROWS, 1>(x + t * x_stride, x_stride, w, w_stride, columns, out + t * out_stride, out_stride);
}

// out[t] = x[t] · w, w: [inputs][columns]
void times(const float* x, int64_t x_stride, const float* w, int64_t w_stride, int64_t tokens, int64_t inputs, int64_t columns,
           float* out, int64_t out_stride) {
  for (int64_t first = 0; first < tokens; first += BLOCK_TOKENS, x += BLOCK_TOKENS * x_stride, out += BLOCK_TOKENS * out_stride) {
    const int64_t count = std::min(BLOCK_TOKENS, tokens - first);
    for (int64_t t = 0; t < count; t++) std::fill(out + t * out_stride, out + t * out_stride + columns, 0.0f);
    int64_t i = 0;
    for (; i + ROWS <= inputs; i += ROWS)
      add_rows<ROWS>(x + i, x_stride, w + i * w_stride, w_stride, count, columns, out, out_stride);
    for (; i < inputs; i++) add_rows<1>(x + i, x_stride, w + i * w_stride, w_stride, count, columns, out, out_stride);
  }
}

// latent_queries(Tensor q, Tensor latent, Tensor positions, Tensor kv_slots, Tensor cos_sin, Tensor latent_norm,
//                Tensor key_weight, Tensor(a!) cache, float eps) -> Tensor
void latent_queries(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Tensor q_TF = stack.strided(), latent_TL = stack.strided(), positions_T = stack.tensor(), slots_T = stack.tensor();
  const Tensor cos_sin_MP = stack.tensor(), norm_R = stack.tensor(), weight_HNR = stack.strided(), cache = stack.tensor();
  const float eps = stack.real();
  const int64_t tokens = q_TF.size(0), heads = weight_HNR.size(0), plain = weight_HNR.size(1), rank = weight_HNR.size(2);
  const int64_t dim = cache.size(2), rotated = dim - rank, head_dim = plain + rotated;
  Tensor out_THL = Tensor::empty({tokens, heads, dim});
  const float *q = q_TF.data<float>(), *latent = latent_TL.data<float>(), *cos_sin = cos_sin_MP.data<float>();
  const float *norm = norm_R.data<float>(), *weight = weight_HNR.data<float>();
  const int32_t *positions = positions_T.data<int32_t>(), *slots = slots_T.data<int32_t>();
  const int64_t q_stride = q_TF.stride(0), latent_stride = latent_TL.stride(0), head_stride = weight_HNR.stride(0);
  float *out = out_THL.data<float>(), *entries = cache.data<float>();
  parallel(tokens, SHARE_TOKENS, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const float* angles = cos_sin + positions[t] * rotated;
      for (int64_t h = 0; h < heads; h++)
        rotate(q + t * q_stride + h * head_dim + plain, angles, rotated, out + (t * heads + h) * dim + rank);
      if (slots[t] == 0) continue;  // of padding: nobody reads the null block, and threads would write it at once
      float* entry = entries + slots[t] * dim;
      rms_norm_row(latent + t * latent_stride, norm, eps, rank, entry);
      rotate(latent + t * latent_stride + rank, angles, rotated, entry + rank);
    }
  });
  const int64_t shares = (rank + COLUMNS - 1) / COLUMNS;
  parallel(heads * shares, 1, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; share++) {
      const int64_t h = share / shares, column = share % shares * COLUMNS;
      times(q + h * head_dim, q_stride, weight + h * head_stride + column, rank, tokens, plain, std::min(COLUMNS, rank - column),
            out + h * dim + column, heads * dim);
    }
  });
  stack.give(std::move(out_THL));
}

// head_linear(Tensor x, Tensor weight) -> Tensor
void head_linear(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Tensor x_THR = stack.tensor(), weight_HVR = stack.strided();
  const int64_t tokens = x_THR.size(0), heads = x_THR.size(1), rank = x_THR.size(2), count = weight_HVR.size(1);
  const int64_t head_stride = weight_HVR.stride(0), shares = (count + VALUES - 1) / VALUES;
  Tensor out_TF = Tensor::empty({tokens, heads * count});
  const float *x = x_THR.data<float>(), *weight = weight_HVR.data<float>();
  float* out = out_TF.data<float>();
  parallel(heads * shares, 1, [&](int64_t begin, int64_t end) {
    const Buffer<float> x_TR(tokens * rank);
    for (int64_t share = begin; share < end; share++) {
      const int64_t h = share / shares, first = share % shares * VALUES;
      if (share == begin || first == 0)
        for (int64_t t = 0; t < tokens; t++)
          std::memcpy(x_TR.get() + t * rank, x + (t * heads + h) * rank, rank * sizeof(float));
      const auto* codes = reinterpret_cast<const uint8_t*>(weight + h * head_stride);
      columns_of_product({x_TR.get(), codes, tokens, rank, heads * count, F32::BYTES, 0}, {out + h * count}, first,
                         std::min(first + VALUES, count));
    }
  });
  stack.give(std::move(out_TF));
}

}  // namespace

void register_heads(TorchLibraryHandle library) {
  kernel(library, "latent_queries", latent_queries);
  kernel(library, "head_linear", head_linear);
}

}  // namespace stepgraph
