// What a step does to each token by itself: normalise, rotate, cache.
#include <cstring>

#include "norm.h"
#include "rotate.h"
#include "torch_abi.h"

namespace stepgraph {
namespace {

constexpr int64_t SHARE = 16;  // tokens that are worth waking a thread for

// rms_norm(Tensor x, Tensor weight, float eps) -> Tensor
void rms_norm(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Tensor x_TE = stack.tensor(), weight_E = stack.tensor();
  const float eps = stack.real();
  const int64_t tokens = x_TE.size(0), width = x_TE.size(1);
  Tensor out_TE = Tensor::empty({tokens, width});
  const float *x = x_TE.data<float>(), *weight = weight_E.data<float>();
  float* out = out_TE.data<float>();
  parallel(tokens, SHARE, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) rms_norm_row(x + t * width, weight, eps, width, out + t * width);
  });
  stack.give(std::move(out_TE));
}

// rope_cache(Tensor qkv, Tensor positions, Tensor kv_slots, Tensor cos_sin, Tensor(a!) k_cache, Tensor(b!) v_cache,
//            int num_heads) -> Tensor
void rope_cache(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Tensor qkv_TND = stack.tensor(), positions_T = stack.tensor(), slots_T = stack.tensor();
  const Tensor cos_sin_PD = stack.tensor(), k_cache = stack.tensor(), v_cache = stack.tensor();
  const int64_t heads = stack.integer(), tokens = qkv_TND.size(0), kv_heads = k_cache.size(2), dim = k_cache.size(3);
  Tensor q_THD = Tensor::empty({tokens, heads, dim});
  const float *qkv = qkv_TND.data<float>(), *cos_sin = cos_sin_PD.data<float>();
  const int32_t *positions = positions_T.data<int32_t>(), *slots = slots_T.data<int32_t>();
  float *q = q_THD.data<float>(), *keys = k_cache.data<float>(), *vals = v_cache.data<float>();
  parallel(tokens, SHARE, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      const float *x = qkv + t * (heads + 2 * kv_heads) * dim, *angles = cos_sin + positions[t] * dim;
      const int64_t entry = slots[t] * kv_heads * dim;
      for (int64_t h = 0; h < heads; h++) rotate(x + h * dim, angles, dim, q + (t * heads + h) * dim);
      if (slots[t] == 0) continue;  // of padding: nobody reads the null block, and threads would write it at once
      for (int64_t g = 0; g < kv_heads; g++) rotate(x + (heads + g) * dim, angles, dim, keys + entry + g * dim);
      std::memcpy(vals + entry, x + (heads + kv_heads) * dim, kv_heads * dim * sizeof(float));
    }
  });
  stack.give(std::move(q_THD));
}

}  // namespace

void register_rows(TorchLibraryHandle library) {
  kernel(library, "rms_norm", rms_norm);
  kernel(library, "rope_cache", rope_cache);
}

}  // namespace stepgraph
