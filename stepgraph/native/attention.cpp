// Paged causal attention in float32. Queries are in the lanes: a tile is LANES queries of one row that share a key/value head,
// so that each key is read once for all of them and no lane has to be added to another.
//
// Keys are taken in blocks at multiples of KEYS of their position, and a key that a query does not see adds exactly nothing to
// it: a query's result does not depend on the others in its tile, nor on how its prompt was cut.
//
// Source of the online softmax: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018).
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "buffer.h"
#include "lanes.h"
#include "torch_abi.h"

namespace stepgraph {
namespace {

constexpr int64_t KEYS = 64;
constexpr int SIDE_BY_SIDE = LANES == 16 ? 16 : 8;  // sums in registers

struct Cache {
  const float *keys, *values;
  int64_t block_size, kv_heads, dim;
};

// What becomes of products of queries and keys.
struct Scoring {
  float scale, softcap;  // 0: scores stay as they are
  const float* sinks;    // of each query head; null: there are none
};

struct Tile {
  const int32_t* blocks;  // of the row
  int64_t first_query;    // of query tokens · group, within the row
  int64_t num_queries;    // in the tile, at most LANES
  int64_t head;           // key/value head
  const float* q;         // of the row's first token
  float* out;
  int64_t context_len;  // keys before the row's first token
};

// scores[k] = scale · Σ_d q[d] · key_k[d]
template <int COUNT>
void score(const float* q, const float* const* keys, int64_t dim, Lanes scale, float* scores) {
  Lanes total[COUNT];
  for (auto& lanes : total) lanes = zero();
  for (int64_t d = 0; d < dim; d++) {
    const Lanes qd = load(q + d * LANES);
    for (int k = 0; k < COUNT; k++) total[k] = fma(qd, all(keys[k][d]), total[k]);
  }
  for (int k = 0; k < COUNT; k++) store(scores + k * LANES, total[k] * scale);
}

// out[d] = out[d] · keep + Σ_k weights[k] · value_k[d], for SIDE_BY_SIDE of the d
void accumulate(const float* weights, const float* const* values, int64_t count, int64_t d, Lanes keep, float* out) {
  Lanes total[SIDE_BY_SIDE];
  for (int i = 0; i < SIDE_BY_SIDE; i++) total[i] = load(out + i * LANES) * keep;
  for (int64_t k = 0; k < count; k++) {
    const Lanes weight = load(weights + k * LANES);
    for (int i = 0; i < SIDE_BY_SIDE; i++) total[i] = fma(weight, all(values[k][d + i]), total[i]);
  }
  for (int i = 0; i < SIDE_BY_SIDE; i++) store(out + i * LANES, total[i]);
}

// scratch: [2 · dim][LANES]
void attend(const Tile& tile, const Cache& cache, int64_t group, const Scoring& scoring, int64_t window, float* scratch) {
  const int64_t dim = cache.dim, heads = group * cache.kv_heads;
  float *q = scratch, *sums = scratch + dim * LANES;
  alignas(64) float position[LANES], sink[LANES];
  std::fill(q, q + 2 * dim * LANES, 0.0f);
  const auto place = [&](int64_t lane) {  // of a query in [T, H, D]
    const int64_t query = tile.first_query + lane;
    return (query / group * heads + tile.head * group + query % group) * dim;
  };
  for (int64_t lane = 0; lane < LANES; lane++) {
    const int64_t query = tile.first_query + std::min(lane, tile.num_queries - 1);
    position[lane] = static_cast<float>(tile.context_len + query / group);
    sink[lane] = scoring.sinks ? scoring.sinks[tile.head * group + query % group] : -1e30f;
    if (lane < tile.num_queries)
      for (int64_t d = 0; d < dim; d++) q[d * LANES + lane] = tile.q[place(lane) + d];
  }
  const Lanes positions = load(position), unseen = all(-std::numeric_limits<float>::infinity());
  const int64_t first_position = static_cast<int64_t>(position[0]);
  const int64_t end = static_cast<int64_t>(position[LANES - 1]) + 1;
  const int64_t start = window ? std::max<int64_t>(0, first_position - window + 1) : 0;
  Lanes highest = load(sink), total = scoring.sinks ? all(1.0f) : zero();  // a sink is a key without a value
  for (int64_t base = start / KEYS * KEYS; base < end; base += KEYS) {
    const int64_t from = std::max(base, start), count = std::min(base + KEYS, end) - from;
    const float *keys[KEYS], *values[KEYS];
    alignas(64) float weights[KEYS * LANES];
    for (int64_t k = 0; k < count; k++) {
      const int64_t key = from + k, block = tile.blocks[key / cache.block_size];
      const int64_t entry = (block * cache.block_size + key % cache.block_size) * cache.kv_heads + tile.head;
      keys[k] = cache.keys + entry * dim;
      values[k] = cache.values + entry * dim;
    }
    int64_t k = 0;
    for (; k + 8 <= count; k += 8) score<8>(q, keys + k, dim, all(scoring.scale), weights + k * LANES);
    for (; k < count; k++) score<1>(q, keys + k, dim, all(scoring.scale), weights + k * LANES);
    const bool masked = from + count > first_position + 1 || window;
    Lanes peak = highest;
    for (k = 0; k < count; k++) {
      Lanes s = load(weights + k * LANES);
      if (scoring.softcap != 0) {
        s = tanh(s / all(scoring.softcap)) * all(scoring.softcap);
        store(weights + k * LANES, s);
      }
      if (masked) {
        const Lanes key = all(static_cast<float>(from + k));
        s = where_less(positions, key, unseen, s);
        if (window) s = where_less(key, positions - all(static_cast<float>(window - 1)), unseen, s);
        store(weights + k * LANES, s);
      }
      peak = max(peak, s);
    }
    const Lanes keep = exp(highest - peak);
    highest = peak;
    total = total * keep;
    for (k = 0; k < count; k++) {
      const Lanes weight = exp(load(weights + k * LANES) - peak);
      store(weights + k * LANES, weight);
      total = total + weight;
    }
    for (int64_t d = 0; d < dim; d += SIDE_BY_SIDE) accumulate(weights, values, count, d, keep, sums + d * LANES);
  }
  for (int64_t d = 0; d < dim; d++) store(sums + d * LANES, load(sums + d * LANES) / total);
  for (int64_t lane = 0; lane < tile.num_queries; lane++)
    for (int64_t d = 0; d < dim; d++) tile.out[place(lane) + d] = sums[d * LANES + lane];
}

// paged_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor block_table, Tensor row_slot, Tensor query_start,
//                 Tensor kv_len, float scale, int window, Tensor? sinks, float softcap) -> Tensor
void paged_attention(StableIValue* stack_values, uint64_t, uint64_t) {
  Stack stack(stack_values);
  const Tensor q_THD = stack.tensor(), k_cache = stack.tensor(), v_cache = stack.tensor();
  const Tensor block_table = stack.strided(), row_slot = stack.tensor(), query_start = stack.tensor();
  const Tensor kv_len = stack.tensor();
  const float scale = stack.real();
  const int64_t window = stack.integer();
  const std::optional<Tensor> sinks = stack.optional();
  const Scoring scoring{scale, stack.real(), sinks ? sinks->data<float>() : nullptr};
  const int64_t tokens = q_THD.size(0), heads = q_THD.size(1), dim = q_THD.size(2);
  const Cache cache{k_cache.data<float>(), v_cache.data<float>(), k_cache.size(1), k_cache.size(2), dim};
  const int64_t group = heads / cache.kv_heads;
  Tensor out_TF = Tensor::empty({tokens, heads * dim});
  std::vector<Tile> tiles;
  const int32_t *starts = query_start.data<int32_t>(), *lens = kv_len.data<int32_t>();
  for (int64_t row = 0; row < row_slot.size(0); row++) {
    const int64_t start = starts[row], query_len = starts[row + 1] - start;
    const int32_t* blocks = block_table.data<int32_t>() + row_slot.data<int32_t>()[row] * block_table.stride(0);
    for (int64_t query = 0; query < query_len * group; query += LANES)
      for (int64_t head = 0; head < cache.kv_heads; head++)
        tiles.push_back({blocks, query, std::min<int64_t>(LANES, query_len * group - query), head,
                         q_THD.data<float>() + start * heads * dim, out_TF.data<float>() + start * heads * dim,
                         lens[row] - query_len});
  }
  uint32_t threads;
  check(torch_get_num_threads(&threads));
  // Each thread takes every n-th tile: later tiles of a prompt see more keys.
  parallel(threads, 1, [&](int64_t begin, int64_t end) {
    const Buffer<float> scratch(2 * dim * LANES);
    for (int64_t thread = begin; thread < end; thread++)
      for (size_t i = thread; i < tiles.size(); i += threads) attend(tiles[i], cache, group, scoring, window, scratch.get());
  });
  // A trial of a graph on nothing may have rows of less than nothing.
  const int64_t real = std::clamp<int64_t>(starts[row_slot.size(0)], 0, tokens);
  std::fill(out_TF.data<float>() + real * heads * dim, out_TF.data<float>() + tokens * heads * dim, 0.0f);
  stack.give(std::move(out_TF));
}

}  // namespace

void register_attention(TorchLibraryHandle library) { kernel(library, "paged_attention", paged_attention); }

}  // namespace stepgraph
