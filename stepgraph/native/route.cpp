// Which experts of a mixture each token goes to; see stepgraph.ops.route. A token's result depends on the token alone.
//
// Shapes: T tokens in B blocks, E hidden size, N experts, K chosen of a token, G groups of experts.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>
#include <stdexcept>
#include <vector>

#include "buffer.h"
#include "products.h"
#include "torch_abi.h"

namespace stepgraph {
namespace {

struct Routing {
  int64_t top, sigmoid, normalise;
  float least_sum, scale;
  int64_t groups, kept_groups, group_top;
};

constexpr float NEVER = -std::numeric_limits<float>::infinity();

// The indices of the `count` highest of some values, by descending value; of equal values, the first one first.
void highest(const float* values, int64_t size, int64_t count, std::vector<int32_t>& index) {
  index.resize(size);
  std::iota(index.begin(), index.end(), 0);
  const auto before = [&](int32_t a, int32_t b) { return values[a] > values[b] || (values[a] == values[b] && a < b); };
  std::partial_sort(index.begin(), index.begin() + count, index.end(), before);
}

void to_scores(float* logits, int64_t count, bool sigmoid) {
  if (sigmoid) {
    for (int64_t n = 0; n < count; n++) logits[n] = 1 / (1 + std::exp(-logits[n]));
    return;
  }
  const float peak = *std::max_element(logits, logits + count);
  float total = 0;
  for (int64_t n = 0; n < count; n++) total += logits[n] = std::exp(logits[n] - peak);
  for (int64_t n = 0; n < count; n++) logits[n] /= total;
}

// Experts outside the groups with the highest scores are left no chance.
void keep_groups(float* ranked, int64_t count, const Routing& r, std::vector<int32_t>& index) {
  const int64_t size = count / r.groups;
  std::vector<float> score(r.groups);
  for (int64_t g = 0; g < r.groups; g++) {
    highest(ranked + g * size, size, r.group_top, index);
    for (int64_t k = 0; k < r.group_top; k++) score[g] += ranked[g * size + index[k]];
  }
  highest(score.data(), r.groups, r.groups, index);
  for (int64_t g = r.kept_groups; g < r.groups; g++)
    std::fill(ranked + index[g] * size, ranked + (index[g] + 1) * size, NEVER);
}

// route(Tensor x, Tensor weight, Tensor bias, Tensor counts, int top, int sigmoid, int normalise, float least_sum, float scale,
//       int groups, int kept_groups, int group_top, Tensor(a!) totals, Tensor(b!) expert, Tensor(c!) pair_weight,
//       Tensor? logit_bias) -> ()
void route(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Tensor x_TE = stack.tensor(), weight_NE = stack.tensor(), bias_N = stack.tensor(), counts_B = stack.tensor();
  Routing r;
  r.top = stack.integer(), r.sigmoid = stack.integer(), r.normalise = stack.integer();
  r.least_sum = stack.real(), r.scale = stack.real();
  r.groups = stack.integer(), r.kept_groups = stack.integer(), r.group_top = stack.integer();
  const Tensor totals_N = stack.tensor(), expert_TK = stack.tensor(), weight_TK = stack.tensor();
  const std::optional<Tensor> logit_bias_N = stack.optional();
  const int64_t tokens = x_TE.size(0), inputs = x_TE.size(1), experts = weight_NE.size(0);
  const int64_t length = tokens / counts_B.size(0);
  if (r.top > experts || r.kept_groups > r.groups || (r.groups > 1 && r.group_top > experts / r.groups))
    throw std::runtime_error("stepgraph's CPU kernels: more experts are to be chosen than there are");
  const Buffer<float> scores(tokens * experts);
  const auto* codes = reinterpret_cast<const uint8_t*>(weight_NE.data<float>());
  // Of padding too, whose logits nobody reads.
  product({x_TE.data<float>(), codes, tokens, inputs, experts, F32::BYTES, std::numeric_limits<int64_t>::max()}, {scores.get()});
  const float* bias = bias_N.size(0) ? bias_N.data<float>() : nullptr;
  const float* logit_bias = logit_bias_N ? logit_bias_N->data<float>() : nullptr;
  const int32_t* counts = counts_B.data<int32_t>();
  int32_t* expert = expert_TK.data<int32_t>();
  float* pair_weight = weight_TK.data<float>();
  parallel(tokens, SHARE_TOKENS, [&](int64_t begin, int64_t end) {
    std::vector<float> ranked(experts);
    std::vector<int32_t> index;
    for (int64_t t = begin; t < end; t++) {
      int32_t* chosen = expert + t * r.top;
      float* weights = pair_weight + t * r.top;
      if (t % length >= counts[t / length]) {
        std::fill(chosen, chosen + r.top, static_cast<int32_t>(experts));
        std::fill(weights, weights + r.top, 0.0f);
        continue;
      }
      float* score = scores.get() + t * experts;
      if (logit_bias)
        for (int64_t n = 0; n < experts; n++) score[n] += logit_bias[n];
      to_scores(score, experts, r.sigmoid);
      for (int64_t n = 0; n < experts; n++) {
        const float value = bias ? score[n] + bias[n] : score[n];
        ranked[n] = std::isnan(value) ? NEVER : value;  // an order needs numbers
      }
      if (r.groups > 1) keep_groups(ranked.data(), experts, r, index);
      highest(ranked.data(), experts, r.top, index);
      float total = 0;
      for (int64_t k = 0; k < r.top; k++) total += weights[k] = score[chosen[k] = index[k]];
      const float factor = r.normalise ? std::max(total, r.least_sum) : 1.0f;
      for (int64_t k = 0; k < r.top; k++) weights[k] = weights[k] / factor * r.scale;
    }
  });
  int64_t* totals = totals_N.data<int64_t>();
  for (int64_t pair = 0; pair < tokens * r.top; pair++)
    if (expert[pair] < experts) totals[expert[pair]]++;
}

}  // namespace

void register_route(TorchLibraryHandle library) { kernel(library, "route", route); }

}  // namespace stepgraph
