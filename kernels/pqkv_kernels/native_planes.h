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

inline V gather(const float* table, const int32_t* index) {
#ifdef __AVX512F__
  return (V)_mm512_i32gather_pd(_mm256_loadu_si256((const __m256i*)index), table, 8);
#else
  V found;
  for (int i = 0; i < 8; i++) std::memcpy((char*)&found + 8 * i, table + 2 * (int64_t)index[i], 8);
  return found;
#endif
}

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
