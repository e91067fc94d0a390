// Paged causal latent attention in float32: all heads of a token share one key, its cache entry, and one value, the entry's first
// part. (token, head) pairs of a row are in the lanes: a tile is one or two registers of them, for all of which an entry is read
// once.
//
// Entries are taken in blocks at multiples of KEYS of their position. Each block gives a part, a softmax of its own, and parts are
// joined in the order of their positions, whichever threads made them; an entry that a pair does not see adds exactly nothing to
// it. So a token's result does not depend on the others in its tile, on how its prompt was cut, or on the number of threads.
//
// Source of joining parts: Dao et al., "Flash-Decoding" (2023).
#include <algorithm>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#include "buffer.h"
#include "lanes.h"
#include "torch_abi.h"

namespace stepgraph {
namespace {

constexpr int64_t KEYS = 72;
// Sums in registers at a time, as many as there are room and loads for: of scores, entries, and of values, numbers.
template <int GROUPS>
constexpr int ENTRIES = LANES == 16 ? 12 : GROUPS == 2 ? 6 : 8;
template <int GROUPS>
constexpr int NUMBERS = (LANES == 16 ? 16 : 8) / GROUPS;
constexpr float UNSEEN = -1e30f;            // peak of no entries

struct Cache {
  const float* entries;
  int64_t block_size, dim, value_dim;
  float scale;
};

struct Tile {
  const int32_t* blocks;  // of the row
  const float* q;         // of the first pair; pairs lie one after the other
  float* out;             // likewise
  int64_t num_pairs;
  int64_t pair, heads, context_len;  // the first pair within the row, and entries before the row's first token
  int64_t first_block;               // of all tiles' blocks of entries, counted through

  int64_t position(int64_t lane) const { return context_len + (pair + std::min(lane, num_pairs - 1)) / heads; }
  int64_t end() const { return position(num_pairs - 1) + 1; }
  int64_t num_blocks() const { return (end() + KEYS - 1) / KEYS; }
};

// scores[k] = scale · Σ_d q[d] · entry_k[d], for some of the entries
template <int GROUPS>
void score(const float* q, const float* const* entries, int64_t dim, Lanes scale, float* scores) {
  constexpr int COUNT = ENTRIES<GROUPS>;
  Lanes total[COUNT][GROUPS];
  for (auto& groups : total)
    for (auto& lanes : groups) lanes = zero();
  for (int64_t d = 0; d < dim; d++) {
    Lanes qd[GROUPS];
    for (int g = 0; g < GROUPS; g++) qd[g] = load(q + (d * GROUPS + g) * LANES);
    for (int k = 0; k < COUNT; k++) {
      const Lanes entry = all(entries[k][d]);
      for (int g = 0; g < GROUPS; g++) total[k][g] = fma(qd[g], entry, total[k][g]);
    }
  }
  for (int k = 0; k < COUNT; k++)
    for (int g = 0; g < GROUPS; g++) store(scores + (k * GROUPS + g) * LANES, total[k][g] * scale);
}

// sums[d] = Σ_k weights[k] · entry_k[d], for some of the d
template <int GROUPS>
void accumulate(const float* weights, const float* const* entries, int64_t count, int64_t d, float* sums) {
  constexpr int COUNT = NUMBERS<GROUPS>;
  Lanes total[COUNT][GROUPS];
  for (auto& groups : total)
    for (auto& lanes : groups) lanes = zero();
  for (int64_t k = 0; k < count; k++) {
    Lanes weight[GROUPS];
    for (int g = 0; g < GROUPS; g++) weight[g] = load(weights + (k * GROUPS + g) * LANES);
    for (int i = 0; i < COUNT; i++) {
      const Lanes value = all(entries[k][d + i]);
      for (int g = 0; g < GROUPS; g++) total[i][g] = fma(weight[g], value, total[i][g]);
    }
  }
  for (int i = 0; i < COUNT; i++)
    for (int g = 0; g < GROUPS; g++) store(sums + (i * GROUPS + g) * LANES, total[i][g]);
}

// A tile's queries as [dim] lanes; those beyond the last pair repeat it.
template <int GROUPS>
void load_queries(const Tile& tile, int64_t dim, float* q) {
  constexpr int WIDTH = GROUPS * LANES;
  const float* rows[WIDTH];
  for (int lane = 0; lane < WIDTH; lane++) rows[lane] = tile.q + std::min<int64_t>(lane, tile.num_pairs - 1) * dim;
  for (int64_t d = 0; d < dim; d++)
    for (int lane = 0; lane < WIDTH; lane++) q[d * WIDTH + lane] = rows[lane][d];
}

// A part, [value_dim + 2] lanes: values weighted with e^(score - peak) and added up, then the peak and the sum of the weights.
template <int GROUPS>
void attend_block(const Tile& tile, const Cache& cache, const float* q, int64_t block, float* part) {
  constexpr int WIDTH = GROUPS * LANES;
  const int64_t first = block * KEYS, count = std::min(KEYS, tile.end() - first);
  const float* entries[KEYS];
  alignas(64) float weights[KEYS * WIDTH];
  static_assert(KEYS % ENTRIES<GROUPS> == 0);
  alignas(64) float position[WIDTH];
  for (int64_t k = 0; k < KEYS; k++) {  // those beyond the last one repeat it
    const int64_t key = first + std::min(k, count - 1);
    entries[k] = cache.entries +
                 (tile.blocks[key / cache.block_size] * cache.block_size + key % cache.block_size) * cache.dim;
  }
  for (int64_t k = 0; k < count; k += ENTRIES<GROUPS>)
    score<GROUPS>(q, entries + k, cache.dim, all(cache.scale), weights + k * WIDTH);
  const bool masked = first + count > tile.position(0) + 1;
  for (int lane = 0; lane < WIDTH; lane++) position[lane] = static_cast<float>(tile.position(lane));
  for (int g = 0; g < GROUPS; g++) {
    const Lanes positions = load(position + g * LANES), unseen = all(-std::numeric_limits<float>::infinity());
    float* column = weights + g * LANES;
    Lanes peak = all(UNSEEN), total = zero();
    for (int64_t k = 0; k < count; k++) {
      Lanes s = load(column + k * WIDTH);
      if (masked) {
        s = where_less(positions, all(static_cast<float>(first + k)), unseen, s);
        store(column + k * WIDTH, s);
      }
      peak = max(peak, s);
    }
    for (int64_t k = 0; k < count; k++) {
      const Lanes weight = exp(load(column + k * WIDTH) - peak);
      store(column + k * WIDTH, weight);
      total = total + weight;
    }
    store(part + cache.value_dim * WIDTH + g * LANES, peak);
    store(part + (cache.value_dim + 1) * WIDTH + g * LANES, total);
  }
  for (int64_t d = 0; d < cache.value_dim; d += NUMBERS<GROUPS>)
    accumulate<GROUPS>(weights, entries, count, d, part + d * WIDTH);
}

// Join the values begin … end of a part to `sums`, whose peak and sum of weights are `peaks`, [2] lanes.
template <int GROUPS>
void join(float* sums, float* peaks, const float* part, int64_t value_dim, int64_t begin, int64_t end) {
  constexpr int WIDTH = GROUPS * LANES;
  for (int g = 0; g < GROUPS; g++) {
    const float* others = part + value_dim * WIDTH + g * LANES;
    float* own = peaks + g * LANES;
    const Lanes peak = max(load(own), load(others));
    const Lanes keep = exp(load(own) - peak), gain = exp(load(others) - peak);
    store(own, peak);
    store(own + WIDTH, fma(load(own + WIDTH), keep, load(others + WIDTH) * gain));
    for (int64_t i = begin * WIDTH + g * LANES; i < end * WIDTH; i += WIDTH)
      store(sums + i, fma(load(sums + i), keep, load(part + i) * gain));
  }
}

// Write the values begin … end of a tile.
template <int GROUPS>
void finish(const Tile& tile, float* sums, const float* totals, int64_t value_dim, int64_t begin, int64_t end) {
  constexpr int WIDTH = GROUPS * LANES;
  for (int g = 0; g < GROUPS; g++) {
    const Lanes share = all(1.0f) / load(totals + g * LANES);
    for (int64_t i = begin * WIDTH + g * LANES; i < end * WIDTH; i += WIDTH) store(sums + i, load(sums + i) * share);
  }
  for (int64_t lane = 0; lane < tile.num_pairs; lane++)
    for (int64_t d = begin; d < end; d++) tile.out[lane * value_dim + d] = sums[d * WIDTH + lane];
}

// Call `with` with the number of registers that a tile's pairs fill.
template <typename With>
void with_groups(const Tile& tile, const With& with) {
  if (tile.num_pairs > LANES) return with(std::integral_constant<int, 2>{});
  with(std::integral_constant<int, 1>{});
}

using Part = std::unique_ptr<Buffer<float>>;

class Step {
 public:
  Step(const Cache& cache, std::vector<Tile> tiles)
      : cache_(cache), tiles_(std::move(tiles)), num_blocks_(tiles_.empty() ? 0 : tiles_.back().first_block + tiles_.back().num_blocks()),
        parts_(num_blocks_) {}

  void run() {
    // Threads take equal numbers of blocks, one after the other: few tiles are cut by threads.
    parallel(num_blocks_, 1, [&](int64_t begin, int64_t end) {
      const Buffer<float> q(cache_.dim * 2 * LANES), part(part_size());
      const auto after = [](int64_t block, const Tile& tile) { return block < tile.first_block; };
      auto tile = std::upper_bound(tiles_.begin(), tiles_.end(), begin, after) - 1;
      for (int64_t block = begin; block < end; block = (++tile)->first_block) {
        const int64_t last = std::min(end - tile->first_block, tile->num_blocks());
        with_groups(*tile, [&](auto groups) {
          attend<groups()>(*tile, block - tile->first_block, last, q.get(), part.get());
        });
        if (tile + 1 == tiles_.end()) break;
      }
    });
    for (const Tile& tile : tiles_)
      if (parts_[tile.first_block] != nullptr) with_groups(tile, [&](auto groups) { join_all<groups()>(tile); });
  }

 private:
  int64_t part_size() const { return (cache_.value_dim + 2) * 2 * LANES; }

  // The blocks begin … end of a tile. If these are all, the tile is done; else a thread that starts with the first joins its own,
  // and parts of others are kept as they are.
  template <int GROUPS>
  void attend(const Tile& tile, int64_t begin, int64_t end, float* q, float* part) {
    Part* parts = &parts_[tile.first_block];
    load_queries<GROUPS>(tile, cache_.dim, q);
    if (begin > 0) {
      for (int64_t block = begin; block < end; block++) {
        parts[block] = std::make_unique<Buffer<float>>(part_size());
        attend_block<GROUPS>(tile, cache_, q, block, parts[block]->get());
      }
      return;
    }
    Part own = std::make_unique<Buffer<float>>(part_size());
    float *sums = own->get(), *peaks = sums + cache_.value_dim * GROUPS * LANES;
    attend_block<GROUPS>(tile, cache_, q, 0, sums);
    for (int64_t block = 1; block < end; block++) {
      attend_block<GROUPS>(tile, cache_, q, block, part);
      join<GROUPS>(sums, peaks, part, cache_.value_dim, 0, cache_.value_dim);
    }
    if (end == tile.num_blocks())
      finish<GROUPS>(tile, sums, peaks + GROUPS * LANES, cache_.value_dim, 0, cache_.value_dim);
    else
      parts[0] = std::move(own);
  }

  template <int GROUPS>
  void join_all(const Tile& tile) {
    constexpr int WIDTH = GROUPS * LANES;
    const Part* parts = &parts_[tile.first_block];
    float* sums = parts[0]->get();
    parallel(cache_.value_dim, 64, [&](int64_t begin, int64_t end) {
      alignas(64) float peaks[2 * WIDTH];
      std::memcpy(peaks, sums + cache_.value_dim * WIDTH, sizeof peaks);
      for (int64_t block = 1; block < tile.num_blocks(); block++)
        if (parts[block] != nullptr)
          join<GROUPS>(sums, peaks, parts[block]->get(), cache_.value_dim, begin, end);
      finish<GROUPS>(tile, sums, peaks + WIDTH, cache_.value_dim, begin, end);
    });
  }

  Cache cache_;
  std::vector<Tile> tiles_;
  int64_t num_blocks_;
  std::vector<Part> parts_;  // by block, of tiles that threads share
};

// mla_attention(Tensor q, Tensor cache, Tensor block_table, Tensor row_slot, Tensor query_start, Tensor kv_len, int value_dim,
//               float scale) -> Tensor
void mla_attention(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const Tensor q_THL = stack.tensor(), entries = stack.tensor(), block_table = stack.strided(), row_slot = stack.tensor();
  const Tensor query_start = stack.tensor(), kv_len = stack.tensor();
  const int64_t value_dim = stack.integer();
  const int64_t tokens = q_THL.size(0), heads = q_THL.size(1), dim = q_THL.size(2);
  const Cache cache{entries.data<float>(), entries.size(1), dim, value_dim, stack.real()};
  Tensor out_THR = Tensor::empty({tokens, heads, value_dim});
  const float* q = q_THL.data<float>();
  float* out = out_THR.data<float>();
  std::vector<Tile> tiles;
  const int32_t *starts = query_start.data<int32_t>(), *lens = kv_len.data<int32_t>();
  int64_t block = 0;
  for (int64_t row = 0; row < row_slot.size(0); row++) {
    const int64_t first = starts[row] * heads, query_len = starts[row + 1] - starts[row];
    const int32_t* blocks = block_table.data<int32_t>() + row_slot.data<int32_t>()[row] * block_table.stride(0);
    for (int64_t pair = 0; pair < query_len * heads; pair += 2 * LANES) {
      tiles.push_back({blocks, q + (first + pair) * dim, out + (first + pair) * value_dim,
                       std::min<int64_t>(2 * LANES, query_len * heads - pair), pair, heads, lens[row] - query_len, block});
      block += tiles.back().num_blocks();
    }
  }
  Step(cache, std::move(tiles)).run();
  // A trial of a graph on nothing may have rows of less than nothing.
  const int64_t real = std::clamp<int64_t>(starts[row_slot.size(0)], 0, tokens);
  std::fill(out + real * heads * value_dim, out + tokens * heads * value_dim, 0.0f);
  stack.give(std::move(out_THR));
}

}  // namespace

void register_mla_attention(TorchLibraryHandle library) { kernel(library, "mla_attention", mla_attention); }

}  // namespace stepgraph
