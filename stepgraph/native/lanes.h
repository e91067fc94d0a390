// A register of floats: 16 with AVX-512, 8 with AVX2.
#pragma once

#include <immintrin.h>

#include <initializer_list>

namespace stepgraph {

#if defined(__AVX512F__)

constexpr int LANES = 16;
using Lanes = __m512;

inline Lanes zero() { return _mm512_setzero_ps(); }
inline Lanes all(float x) { return _mm512_set1_ps(x); }
inline Lanes load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Lanes a) { _mm512_storeu_ps(p, a); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes max(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
inline Lanes min(Lanes a, Lanes b) { return _mm512_min_ps(a, b); }
inline Lanes where_less(Lanes a, Lanes b, Lanes x, Lanes otherwise) {
  return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), otherwise, x);
}
inline Lanes from_bytes(const void* signed_bytes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(signed_bytes))));
}
inline Lanes from_bfloat16(const void* p) {  // the upper halves of floats
  const __m256i halves = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}
inline Lanes round(Lanes a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
inline Lanes power_of_two(Lanes whole) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(whole), _mm512_set1_epi32(127)), 23));
}

// The sum of the lanes: i and i + 8, then those 4, 2 and 1 apart.
inline float sum(Lanes a) { return _mm512_reduce_add_ps(a); }

// The sums of 16 registers, each added up as `sum` does, by transposing them as they shrink.
inline Lanes sums(const Lanes* a) {
  // Where the shuffles below carry register i.
  constexpr int place[16] = {0, 2, 1, 3, 8, 10, 9, 11, 4, 6, 5, 7, 12, 14, 13, 15};
  Lanes b[8], c[4], d[2];
  for (int i = 0; i < 8; i++) {
    const Lanes x = a[place[i]], y = a[place[8 + i]];
    b[i] = _mm512_shuffle_f32x4(x, y, 0x44) + _mm512_shuffle_f32x4(x, y, 0xee);
  }
  for (int i = 0; i < 4; i++)
    c[i] = _mm512_shuffle_f32x4(b[i], b[4 + i], 0x88) + _mm512_shuffle_f32x4(b[i], b[4 + i], 0xdd);
  for (int i = 0; i < 2; i++) {
    const __m512d x = _mm512_castps_pd(c[i]), y = _mm512_castps_pd(c[2 + i]);
    d[i] = _mm512_castpd_ps(_mm512_unpacklo_pd(x, y)) + _mm512_castpd_ps(_mm512_unpackhi_pd(x, y));
  }
  return _mm512_shuffle_ps(d[0], d[1], 0x88) + _mm512_shuffle_ps(d[0], d[1], 0xdd);
}

#else

constexpr int LANES = 8;
using Lanes = __m256;

inline Lanes zero() { return _mm256_setzero_ps(); }
inline Lanes all(float x) { return _mm256_set1_ps(x); }
inline Lanes load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Lanes a) { _mm256_storeu_ps(p, a); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
inline Lanes max(Lanes a, Lanes b) { return _mm256_max_ps(a, b); }
inline Lanes min(Lanes a, Lanes b) { return _mm256_min_ps(a, b); }
inline Lanes where_less(Lanes a, Lanes b, Lanes x, Lanes otherwise) {
  return _mm256_blendv_ps(otherwise, x, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
}
inline Lanes from_bytes(const void* signed_bytes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(signed_bytes))));
}
inline Lanes from_bfloat16(const void* p) {  // the upper halves of floats
  const __m128i halves = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}
inline Lanes round(Lanes a) { return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline Lanes power_of_two(Lanes whole) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(whole), _mm256_set1_epi32(127)), 23));
}

// The sum of the lanes: i and i + 4, then those 2 and 1 apart.
inline float sum(Lanes a) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}

#endif

// e^x: 2^n · e^r with |r| ≤ ln 2 / 2, e^r as its Taylor series to r^7, whose rest is below half a unit in the last place. 0 below
// -88, and for -inf; e^88 above 88. NaN is not kept.
inline Lanes exp(Lanes x) {
  x = min(max(x, all(-88.02969f)), all(88.0f));  // 2^-127 is written as 0
  const Lanes n = round(x * all(1.44269504f));
  Lanes r = fma(n, all(-0.693145752f), x);  // ln 2 in two parts, the first short enough for n to multiply exactly
  r = fma(n, all(-1.42860677e-6f), r);
  Lanes series = all(1.0f / 5040);
  for (const float factor : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    series = fma(series, r, all(factor));
  return series * power_of_two(n);
}

// 1 - 2 / (1 + e^2x)
inline Lanes tanh(Lanes x) { return all(1.0f) - all(2.0f) / (all(1.0f) + exp(x + x)); }

// x / (1 + e^-x)
inline Lanes silu(Lanes x) { return x / (all(1.0f) + exp(zero() - x)); }

}  // namespace stepgraph
