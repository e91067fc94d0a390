// RMS normalisation of float32 rows. Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
#pragma once

#include <cmath>
#include <cstdint>

#include "lanes.h"

namespace stepgraph {

// One row; the width is a multiple of LANES.
inline void rms_norm_row(const float* x, const float* weight, float eps, int64_t width, float* out) {
  Lanes squares = zero();
  for (int64_t i = 0; i < width; i += LANES) squares = fma(load(x + i), load(x + i), squares);
  const Lanes scale = all(1.0f / std::sqrt(sum(squares) / static_cast<float>(width) + eps));
  for (int64_t i = 0; i < width; i += LANES) store(out + i, load(x + i) * scale * load(weight + i));
}

}  // namespace stepgraph
