// Feed-forward layers of a mixture's experts: the rows of each expert that has any, times its weight.
//
// A token and one of its experts are a pair, numbered t·K + k. What a token's result is does not depend on its neighbours, as
// that of a product does not, see linear.cpp: sums over a token's experts run in the order in which they were chosen.
//
// Shapes: T tokens, K experts of a token, P = T·K pairs, of which J have their experts here, N experts, I inputs, O outputs.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "buffer.h"
#include "products.h"
#include "torch_abi.h"

namespace stepgraph {
namespace {

constexpr int64_t COLUMNS = 64;  // of one expert's product, for a thread at a time

struct Group {  // rows of one expert
  int64_t expert, begin, rows;
};

std::vector<Group> groups_of(const Tensor& ends_N) {
  std::vector<Group> groups;
  const int32_t* ends = ends_N.data<int32_t>();
  for (int64_t expert = 0, begin = 0; expert < ends_N.size(0); begin = ends[expert++])
    if (ends[expert] > begin) groups.push_back({expert, begin, ends[expert] - begin});
  return groups;
}

// Where `rows[j]` says which row of x is row j, those rows after each other; x itself where it says nothing.
class Rows {
 public:
  template <typename Row>
  Rows(const float* x, int64_t count, int64_t inputs, bool gathered, const Row& row)
      : copy_(gathered ? count * inputs : 0), x_(gathered ? copy_.get() : x) {
    if (!gathered) return;
    parallel(count, SHARE_TOKENS, [&](int64_t begin, int64_t end) {
      for (int64_t j = begin; j < end; j++)
        std::memcpy(copy_.get() + j * inputs, x + row(j) * inputs, inputs * sizeof(float));
    });
  }
  const float* get() const { return x_; }

 private:
  Buffer<float> copy_;
  const float* x_;
};

// Of each group, its rows of x times its expert's weight, [O, I] of codes [N, O, bytes].
void products(const std::vector<Group>& groups, const float* x_JI, int64_t inputs, const Tensor& codes,
              int64_t bfloat16_from, const Ends& ends) {
  const int64_t outputs = codes.size(1), row_bytes = codes.size(2);
  const auto of = [&](const Group& group) {
    return Operands{x_JI + group.begin * inputs,       codes.data<uint8_t>() + group.expert * outputs * row_bytes,
                    group.rows, inputs, outputs, row_bytes * BLOCK / inputs, bfloat16_from};
  };
  const auto ends_of = [&](const Group& group) {
    return Ends{ends.out + group.begin * outputs, nullptr, 1.0f,
                ends.gated ? ends.gated + group.begin * outputs / 2 : nullptr};
  };
  std::vector<Group> exact;
  for (const Group& group : groups) {
    if (is_rounded(of(group)))
      product(of(group), ends_of(group));
    else
      exact.push_back(group);
  }
  const int64_t columns = outputs / (ends.gated ? 2 : 1), shares = (columns + COLUMNS - 1) / COLUMNS;
  const int64_t count = static_cast<int64_t>(exact.size()) * shares;
  uint32_t threads;
  check(torch_get_num_threads(&threads));
  // Each thread takes every n-th share: experts differ in their number of rows.
  parallel(std::min<int64_t>(threads, count), 1, [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; thread++)
      for (int64_t share = thread; share < count; share += threads) {
        const Group& group = exact[share / shares];
        const int64_t first = share % shares * COLUMNS;
        columns_of_product(of(group), ends_of(group), first, std::min(first + COLUMNS, columns));
      }
  });
}

// sort_pairs(Tensor expert, int first, Tensor(a!) order, Tensor(b!) ends) -> ()
void sort_pairs(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Tensor expert_TK = stack.tensor();
  const int64_t first = stack.integer();
  const Tensor order_P = stack.tensor(), ends_N = stack.tensor();
  const int64_t pairs = order_P.size(0), count = ends_N.size(0);
  const int32_t* expert = expert_TK.data<int32_t>();
  int32_t *order = order_P.data<int32_t>(), *ends = ends_N.data<int32_t>();
  const auto place = [&](int64_t pair) {
    const int64_t number = expert[pair] - first;
    return number >= 0 && number < count ? number : count;
  };
  std::vector<int32_t> next(count + 2);  // of each expert, and of none, where its next pair goes
  for (int64_t pair = 0; pair < pairs; pair++) next[place(pair) + 1]++;
  for (int64_t number = 0; number < count; number++) ends[number] = next[number + 1] += next[number];
  for (int64_t pair = 0; pair < pairs; pair++) order[next[place(pair)]++] = static_cast<int32_t>(pair);
}

// gated_experts(Tensor x, Tensor codes, Tensor order, Tensor ends, int top, int sorted, int gate, int bfloat16_from) -> Tensor
void gated_experts(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Tensor x_TI = stack.tensor(), codes_NOB = stack.tensor(), order_P = stack.tensor(), ends_N = stack.tensor();
  const int64_t top = stack.integer();
  const bool sorted = stack.integer(), gate = stack.integer();
  const int64_t bfloat16_from = stack.integer(), inputs = x_TI.size(1), outputs = codes_NOB.size(1);
  const int64_t width = gate ? outputs / 2 : outputs;
  Tensor hidden_PM = Tensor::empty({order_P.size(0), width});
  const std::vector<Group> groups = groups_of(ends_N);
  const int64_t here = groups.empty() ? 0 : groups.back().begin + groups.back().rows;
  const int32_t* order = order_P.data<int32_t>();
  const Rows x(x_TI.data<float>(), here, inputs, true, [&](int64_t j) { return order[j] / top; });
  const Buffer<float> product(gate ? here * outputs : 0), apart(sorted ? 0 : here * width);
  float* hidden = sorted ? hidden_PM.data<float>() : apart.get();
  products(groups, x.get(), inputs, codes_NOB, bfloat16_from, gate ? Ends{product.get(), nullptr, 1.0f, hidden} : Ends{hidden});
  for (int64_t j = 0; !sorted && j < here; j++)
    std::memcpy(hidden_PM.data<float>() + order[j] * width, hidden + j * width, width * sizeof(float));
  stack.give(std::move(hidden_PM));
}

// sum_experts(Tensor hidden, Tensor codes, Tensor order, Tensor ends, Tensor pair_weight, int sorted, Tensor(a!) out, int add,
//             float multiplier, int bfloat16_from) -> ()
void sum_experts(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Tensor hidden_PI = stack.tensor(), codes_NOB = stack.tensor(), order_P = stack.tensor(), ends_N = stack.tensor();
  const Tensor weight_TK = stack.tensor();
  const bool sorted = stack.integer();
  const Tensor out_TO = stack.tensor();
  const bool add = stack.integer();
  const float multiplier = stack.real();
  const int64_t bfloat16_from = stack.integer(), inputs = hidden_PI.size(1), outputs = codes_NOB.size(1);
  const int64_t tokens = weight_TK.size(0), top = weight_TK.size(1);
  const std::vector<Group> groups = groups_of(ends_N);
  const int64_t here = groups.empty() ? 0 : groups.back().begin + groups.back().rows;
  const int32_t* order = order_P.data<int32_t>();
  const Rows hidden(hidden_PI.data<float>(), here, inputs, !sorted, [&](int64_t j) { return order[j]; });
  const Buffer<float> down(here * outputs);
  products(groups, hidden.get(), inputs, codes_NOB, bfloat16_from, {down.get()});
  std::vector<int64_t> row(tokens * top, -1);  // of each pair in `down`
  for (int64_t j = 0; j < here; j++) row[order[j]] = j;
  const float* weight = weight_TK.data<float>();
  float* out = out_TO.data<float>();
  parallel(tokens, SHARE_TOKENS, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; t++) {
      float* to = out + t * outputs;
      int64_t o = 0;
      for (; o + LANES <= outputs; o += LANES) {
        Lanes total = zero();
        for (int64_t pair = t * top; pair < (t + 1) * top; pair++)
          if (row[pair] >= 0) total = fma(all(weight[pair]), load(down.get() + row[pair] * outputs + o), total);
        store(to + o, add ? fma(all(multiplier), total, load(to + o)) : all(multiplier) * total);
      }
      for (; o < outputs; o++) {
        float total = 0;
        for (int64_t pair = t * top; pair < (t + 1) * top; pair++)
          if (row[pair] >= 0) total = std::fma(weight[pair], down.get()[row[pair] * outputs + o], total);
        to[o] = add ? std::fma(multiplier, total, to[o]) : multiplier * total;
      }
    }
  });
}

}  // namespace

void register_experts(TorchLibraryHandle library) {
  kernel(library, "sort_pairs", sort_pairs);
  kernel(library, "gated_experts", gated_experts);
  kernel(library, "sum_experts", sum_experts);
}

}  // namespace stepgraph
