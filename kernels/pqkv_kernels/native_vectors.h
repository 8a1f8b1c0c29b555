// Vectors of sixteen floats: loaded, gathered as eight pairs of channels, added up.

#pragma once

#include <cstdint>

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

#endif

inline V loaded(const float* p) { return *(const V*)p; }

inline float sum(V x) {
  const Half h = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  typedef float Quarter __attribute__((vector_size(16)));
  const Quarter q = __builtin_shufflevector(h, h, 0, 1, 2, 3) + __builtin_shufflevector(h, h, 4, 5, 6, 7);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

// The sums of sixteen vectors as one vector, in as many operations as it takes to add up four one by one.
inline V sums_of(V* x) {
  for (int i = 0; i < 16; i += 2)
    x[i / 2] = __builtin_shufflevector(x[i], x[i + 1], 0, 17, 2, 19, 4, 21, 6, 23, 8, 25, 10, 27, 12, 29, 14, 31) +
               __builtin_shufflevector(x[i], x[i + 1], 1, 16, 3, 18, 5, 20, 7, 22, 9, 24, 11, 26, 13, 28, 15, 30);
  for (int i = 0; i < 8; i += 2)
    x[i / 2] = __builtin_shufflevector(x[i], x[i + 1], 0, 1, 18, 19, 4, 5, 22, 23, 8, 9, 26, 27, 12, 13, 30, 31) +
               __builtin_shufflevector(x[i], x[i + 1], 2, 3, 16, 17, 6, 7, 20, 21, 10, 11, 24, 25, 14, 15, 28, 29);
  for (int i = 0; i < 4; i += 2)
    x[i / 2] = __builtin_shufflevector(x[i], x[i + 1], 0, 1, 2, 3, 20, 21, 22, 23, 8, 9, 10, 11, 28, 29, 30, 31) +
               __builtin_shufflevector(x[i], x[i + 1], 4, 5, 6, 7, 16, 17, 18, 19, 12, 13, 14, 15, 24, 25, 26, 27);
  return __builtin_shufflevector(x[0], x[1], 0, 1, 2, 3, 4, 5, 6, 7, 24, 25, 26, 27, 28, 29, 30, 31) +
         __builtin_shufflevector(x[0], x[1], 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23);
}

}  // namespace
