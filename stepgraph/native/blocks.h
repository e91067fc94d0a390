// The block formats of GGUF files that are multiplied as they are: 32 weights of one row in a block, scaled by a half. And plain
// numbers.
//
// Layout: ggml-common.h of the ggml project. A decoded weight has the bits that gguf's own dequantisation gives it: d·q is
// exact in float32, so rounding d·q + m once, in a fused multiply-add, and rounding it in a sum are the same.
#pragma once

#include <cstdint>
#include <cstring>
#include <stdexcept>

#include "lanes.h"

namespace stepgraph {

constexpr int BLOCK = 32;

inline float half_at(const uint8_t* p) { return _cvtsh_ss(static_cast<uint16_t>(p[0] | p[1] << 8)); }

constexpr int PARTS = BLOCK / LANES;  // registers of a block's weights

// 4-bit codes: byte i holds weight i below and weight 16 + i above.
inline void nibbles(const uint8_t* p, int8_t offset, int8_t* out) {
  const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  const __m128i mask = _mm_set1_epi8(15), minus = _mm_set1_epi8(offset);
  const __m128i low = _mm_and_si128(codes, mask), high = _mm_and_si128(_mm_srli_epi16(codes, 4), mask);
  _mm_store_si128(reinterpret_cast<__m128i*>(out), _mm_sub_epi8(low, minus));
  _mm_store_si128(reinterpret_cast<__m128i*>(out + 16), _mm_sub_epi8(high, minus));
}

struct Q4_0 {  // w = d · (q - 8)
  static constexpr int BYTES = 18;
  static void decode(const uint8_t* block, Lanes* w) {
    alignas(16) int8_t codes[BLOCK];
    nibbles(block + 2, 8, codes);
    const Lanes d = all(half_at(block));
    for (int i = 0; i < PARTS; i++) w[i] = d * from_bytes(codes + i * LANES);
  }
};

struct Q4_1 {  // w = d · q + m
  static constexpr int BYTES = 20;
  static void decode(const uint8_t* block, Lanes* w) {
#if defined(__AVX512F__)
    // The sixteen weights that a code can mean make a table, looked up by the low four bits of each lane.
    int both;
    std::memcpy(&both, block, sizeof both);
    const __m512 scales = _mm512_cvtph_ps(_mm256_set1_epi32(both));
    const __m512 table = _mm512_fmadd_ps(_mm512_moveldup_ps(scales),
                                         _mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                         _mm512_movehdup_ps(scales));
    const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(block + 4)));
    w[0] = _mm512_permutexvar_ps(codes, table);
    w[1] = _mm512_permutexvar_ps(_mm512_srli_epi32(codes, 4), table);
#else
    alignas(16) int8_t codes[BLOCK];
    nibbles(block + 4, 0, codes);
    const Lanes d = all(half_at(block)), m = all(half_at(block + 2));
    for (int i = 0; i < PARTS; i++) w[i] = fma(d, from_bytes(codes + i * LANES), m);
#endif
  }
};

struct Q8_0 {  // w = d · q
  static constexpr int BYTES = 34;
  static void decode(const uint8_t* block, Lanes* w) {
    const Lanes d = all(half_at(block));
    for (int i = 0; i < PARTS; i++) w[i] = d * from_bytes(block + 2 + i * LANES);
  }
};

// Weights that are no codes, in pieces of as many: products take them like blocks.
struct F32 {
  static constexpr int BYTES = 128;
  static void decode(const uint8_t* block, Lanes* w) {
    for (int i = 0; i < PARTS; i++) w[i] = load(reinterpret_cast<const float*>(block) + i * LANES);
  }
};

struct BF16 {
  static constexpr int BYTES = 64;
  static void decode(const uint8_t* block, Lanes* w) {
    for (int i = 0; i < PARTS; i++) w[i] = from_bfloat16(block + i * LANES * 2);
  }
};

// Call `with(format)`, an instance of the format whose blocks have so many bytes.
template <typename With>
void with_format(int64_t block_bytes, const With& with) {
  switch (block_bytes) {
    case Q4_0::BYTES: return with(Q4_0{});
    case Q4_1::BYTES: return with(Q4_1{});
    case Q8_0::BYTES: return with(Q8_0{});
    case BF16::BYTES: return with(BF16{});
    case F32::BYTES: return with(F32{});
    default: throw std::runtime_error("stepgraph's CPU kernels: unknown block format");
  }
}

}  // namespace stepgraph
