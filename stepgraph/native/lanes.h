// A register of floats: 16 with AVX-512, 8 with AVX2.
#pragma once

#include <immintrin.h>

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
inline float largest(Lanes a) { return _mm512_reduce_max_ps(a); }
inline Lanes from_bytes(const void* signed_bytes) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(signed_bytes))));
}
inline Lanes round(Lanes a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT); }
inline Lanes power_of_two(Lanes whole) { return _mm512_scalef_ps(all(1.0f), whole); }

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
inline float largest(Lanes a) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
inline Lanes from_bytes(const void* signed_bytes) {
  return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(signed_bytes))));
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

}  // namespace stepgraph
