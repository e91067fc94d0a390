// The products of linear.cpp, for kernels that are made of them.
//
// Shapes: T tokens, I inputs, O outputs.
#pragma once

#include <cstdint>

#include "blocks.h"
#include "torch_abi.h"

namespace stepgraph {

constexpr int64_t SHARE_TOKENS = 16;  // that are worth waking a thread for, if each is a few thousand operations

// What is done with the columns begin … end of a product as soon as a thread has them.
struct Ends {
  float* out;                // the product, [T, O]
  float* residual = nullptr;  // [T, O]: the product times `multiplier` is added
  float multiplier = 1.0f;
  float* gated = nullptr;  // [T, O / 2]: silu of the product's first half, times its second

  void finish(int64_t tokens, int64_t outputs, int64_t begin, int64_t end) const {
    for (int64_t t = 0; t < tokens; t++) {
      const float* row = out + t * outputs;
      if (residual != nullptr)
        for (int64_t o = begin; o < end; o++) residual[t * outputs + o] += multiplier * row[o];
      if (gated != nullptr) {
        const int64_t half = outputs / 2;
        for (int64_t o = begin; o < end; o += LANES) store(gated + t * half + o, silu(load(row + o)) * load(row + half + o));
      }
    }
  }
};

struct Operands {
  const float* x;
  const uint8_t* codes;
  int64_t tokens, inputs, outputs, block_bytes, bfloat16_from;

  static Operands of(const Tensor& x_TI, const Tensor& codes_OB, int64_t bfloat16_from) {
    const int64_t inputs = x_TI.size(1), row_bytes = codes_OB.size(1);
    return {x_TI.data<float>(), codes_OB.data<uint8_t>(), x_TI.size(0), inputs, codes_OB.size(0), row_bytes * BLOCK / inputs,
            bfloat16_from};
  }
};

// Whether operands are rounded to bfloat16.
bool is_rounded(const Operands& p);

// The columns begin … end of a product whose operands are not rounded, in this thread; of a gated one, those columns of both
// halves.
void columns_of_product(const Operands& p, const Ends& ends, int64_t begin, int64_t end);

// A product, on all threads.
void product(const Operands& p, const Ends& ends);

}  // namespace stepgraph
