// Tables of pairs of channels, read by codes into vectors of floats; sums of such vectors.

#pragma once

#include <cstdint>
#include <vector>

#include "lanes.h"

namespace {

// Both coordinates of kLanes tokens.
struct Point {
  Floats x, y;
};

#ifdef __AVX2__

// Loads take less time than one instruction that gathers on AMD's processors: on Zen 5 a seventh of a whole attention.
inline __m256d four(const double* table, const uint16_t* a, const uint16_t* b) {
  const __m128d low = _mm_loadh_pd(_mm_load_sd(table + a[0]), table + a[1]);
  const __m128d high = _mm_loadh_pd(_mm_load_sd(table + b[0]), table + b[1]);
  return _mm256_set_m128d(high, low);
}

#endif

#ifdef __AVX512F__

#ifndef PQKV_LOADS
#define PQKV_LOADS __builtin_cpu_is("amd")
#endif
const bool kLoads = PQKV_LOADS;

inline Floats gather(const double* table, const uint16_t* index) {
  if (!kLoads) return (Floats)_mm512_i32gather_pd(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)index)), table, 8);
  const __m256d low = four(table, index, index + 2), high = four(table, index + 4, index + 6);
  return (Floats)_mm512_insertf64x4(_mm512_castpd256_pd512(low), high, 1);
}

inline Point gathered(const float* table, const uint16_t* index) {
  const Floats a = gather((const double*)table, index), b = gather((const double*)table, index + 8);
  return {__builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
          __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
}

#elif defined(__AVX2__)

// Pairs lie so that both coordinates come out in order without crossing the halves of a register.
inline Point gathered(const float* table, const uint16_t* index) {
  const __m256 a = _mm256_castpd_ps(four((const double*)table, index, index + 4));
  const __m256 b = _mm256_castpd_ps(four((const double*)table, index + 2, index + 6));
  return {(Floats)_mm256_shuffle_ps(a, b, 0x88), (Floats)_mm256_shuffle_ps(a, b, 0xDD)};
}

#else

inline Point gathered(const float* table, const uint16_t* index) {
  Point found;
  for (int lane = 0; lane < kLanes; lane++) found.x[lane] = table[2 * index[lane]], found.y[lane] = table[2 * index[lane] + 1];
  return found;
}

#endif

// Numbers that begin where a line of the cache does: no vector of a row of 64 lies in two.
class Aligned {
 public:
  void resize(int64_t count) { lines_.resize((count + kLine - 1) / kLine); }
  float* data() { return lines_.data()->number; }

 private:
  static constexpr int64_t kLine = 16;

  struct alignas(4 * kLine) Line {
    float number[kLine];
  };

  std::vector<Line> lines_;
};

inline float sum(Floats x) {
  float found[kLanes];
  store(found, x);
  for (int half = kLanes / 2; half; half /= 2)
    for (int lane = 0; lane < half; lane++) found[lane] += found[lane + half];
  return found[0];
}

#ifdef __AVX512F__

// The sums of sixteen vectors as one vector, in as many operations as it takes to add up four one by one.
inline Floats sums_of(Floats* x) {
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

#elif defined(__AVX2__)

// The sums of eight vectors as one vector.
inline Floats sums_of(const Floats* x) {
  __m256 quarter[2];
  for (int i = 0; i < 2; i++) {
    const __m256 first = _mm256_hadd_ps((__m256)x[4 * i], (__m256)x[4 * i + 1]);
    quarter[i] = _mm256_hadd_ps(first, _mm256_hadd_ps((__m256)x[4 * i + 2], (__m256)x[4 * i + 3]));
  }
  const __m256 low = _mm256_permute2f128_ps(quarter[0], quarter[1], 0x20);
  return (Floats)_mm256_add_ps(low, _mm256_permute2f128_ps(quarter[0], quarter[1], 0x31));
}

#else

inline Floats sums_of(const Floats* x) {
  Floats found;
  for (int lane = 0; lane < kLanes; lane++) found[lane] = sum(x[lane]);
  return found;
}

#endif

}  // namespace
