// Planes: a pair of channels is a complex number, eight of them fill one vector of sixteen floats.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

typedef float V __attribute__((vector_size(64), aligned(4), may_alias));
typedef float Half __attribute__((vector_size(32), aligned(4), may_alias));

#ifdef __AVX512F__

// Eight loads take less time than one instruction that gathers eight on AMD's processors: on Zen 5 a seventh of a whole attention.
#ifndef PQKV_LOADS
#define PQKV_LOADS __builtin_cpu_is("amd")
#endif
const bool kLoads = PQKV_LOADS;

inline __m256d four(const double* table, const uint16_t* index) {
  const __m128d low = _mm_loadh_pd(_mm_load_sd(table + index[0]), table + index[1]);
  const __m128d high = _mm_loadh_pd(_mm_load_sd(table + index[2]), table + index[3]);
  return _mm256_set_m128d(high, low);
}

inline V gather(const float* table, const uint16_t* index) {
  const double* planes = (const double*)table;
  if (kLoads) return (V)_mm512_insertf64x4(_mm512_castpd256_pd512(four(planes, index)), four(planes, index + 4), 1);
  return (V)_mm512_i32gather_pd(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)index)), planes, 8);
}

#else

inline V gather(const float* table, const uint16_t* index) {
  V found;
  for (int i = 0; i < 8; i++) std::memcpy((char*)&found + 8 * i, table + 2 * index[i], 8);
  return found;
}

#endif

inline V swapped(V x) { return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14); }
inline V doubled(Half x) { return __builtin_shufflevector(x, x, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7); }
inline V loaded(const float* p) { return *(const V*)p; }
inline V both(float x, float y) { return V{x, y, x, y, x, y, x, y, x, y, x, y, x, y, x, y}; }

inline float sum(V x) {
  const Half h = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  typedef float Quarter __attribute__((vector_size(16)));
  const Quarter q = __builtin_shufflevector(h, h, 0, 1, 2, 3) + __builtin_shufflevector(h, h, 4, 5, 6, 7);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

}  // namespace
