// Rotary position embedding of float32 rows. Source: Su et al., "RoFormer" (2021).
#pragma once

#include <cmath>
#include <cstdint>

#include "lanes.h"

namespace stepgraph {

// Turn each pair (x_i, x_{i + D/2}) by its angle.
inline void rotate(const float* x, const float* cos_sin, int64_t dim, float* out) {
  const int64_t half = dim / 2;
  int64_t i = 0;
  for (; i + LANES <= half; i += LANES) {
    const Lanes low = load(x + i), high = load(x + half + i);
    const Lanes cos = load(cos_sin + i), sin = load(cos_sin + half + i);
    store(out + i, fma(zero() - high, sin, low * cos));
    store(out + half + i, fma(low, sin, high * cos));
  }
  for (; i < half; i++) {
    const float cos = cos_sin[i], sin = cos_sin[half + i];
    out[i] = std::fma(-x[half + i], sin, x[i] * cos);
    out[half + i] = std::fma(x[i], sin, x[half + i] * cos);
  }
}

}  // namespace stepgraph
