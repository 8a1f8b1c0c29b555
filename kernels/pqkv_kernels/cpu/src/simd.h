// Vectors as wide as this machine's registers: what a vector is, loads, gathers, sums. codes.h has what bytes need beside it.

#pragma once

#include <cstdint>
#include <vector>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

// ---- What a vector is ----------------------------------------------------------------------------------------------------

#ifdef __AVX512F__
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// In memory a vector is aligned as one number is, so it may begin at any of them.
typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4)));

// A point of a plane in every lane: both of its coordinates.
struct Point {
  Floats x, y;
};

// One bit for each lane of a comparison; the first lane's is the lowest.
inline uint32_t mask_bits(Ints mask) {
#ifdef __AVX512F__
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask));
#else
  uint32_t all = 0;
  for (int lane = 0; lane < kLanes; ++lane) all |= (mask[lane] & 1u) << lane;
  return all;
#endif
}

inline bool any(Ints mask) { return mask_bits(mask) != 0; }

// ---- Loads and stores ----------------------------------------------------------------------------------------------------

inline Floats load(const float* from) { return *reinterpret_cast<const Floats*>(from); }
inline Ints load(const int32_t* from) { return *reinterpret_cast<const Ints*>(from); }
inline void store(float* to, Floats x) { *reinterpret_cast<Floats*>(to) = x; }
inline void store(int32_t* to, Ints x) { *reinterpret_cast<Ints*>(to) = x; }

// Write the lanes whose bit in `kept` is set, one after the other. May write kLanes numbers, whatever is kept.
template <typename Vector, typename Number>
inline void compress_store(Number* to, Vector x, uint32_t kept) {
#ifdef __AVX512F__
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(kept, reinterpret_cast<__m512i>(x)));
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    *to = x[lane];
    to += kept >> lane & 1;
  }
#endif
}

// Floats that begin at a cache line: no vector of a row of 64 floats crosses from one line into the next.
class AlignedFloats {
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

// ---- Gathers: points of a table [entries][2] by kLanes indices -------------------------------------------------------------

#ifdef __AVX2__

// Four points, each read as one double. On AMD's processors loads take less time than the one instruction that gathers: on Zen
// 5 a seventh of a whole attention.
inline __m256d load_four(const double* table, const uint16_t* a, const uint16_t* b) {
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

// Eight points, x and y in turn.
inline Floats gather_eight(const double* table, const uint16_t* index) {
  if (!kLoads) return (Floats)_mm512_i32gather_pd(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)index)), table, 8);
  const __m256d low = load_four(table, index, index + 2), high = load_four(table, index + 4, index + 6);
  return (Floats)_mm512_insertf64x4(_mm512_castpd256_pd512(low), high, 1);
}

inline Point gather(const float* table, const uint16_t* index) {
  const Floats a = gather_eight((const double*)table, index), b = gather_eight((const double*)table, index + 8);
  return {__builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30),
          __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31)};
}

#elif defined(__AVX2__)

// A shuffle works on each half of a register alone. So `a` takes points 0, 1 and 4, 5, and `b` takes 2, 3 and 6, 7: then both
// coordinates come out in the order of the tokens.
inline Point gather(const float* table, const uint16_t* index) {
  const __m256 a = _mm256_castpd_ps(load_four((const double*)table, index, index + 4));
  const __m256 b = _mm256_castpd_ps(load_four((const double*)table, index + 2, index + 6));
  return {(Floats)_mm256_shuffle_ps(a, b, 0x88), (Floats)_mm256_shuffle_ps(a, b, 0xDD)};
}

#else

inline Point gather(const float* table, const uint16_t* index) {
  Point p;
  for (int lane = 0; lane < kLanes; lane++) p.x[lane] = table[2 * index[lane]], p.y[lane] = table[2 * index[lane] + 1];
  return p;
}

#endif

// ---- Sums and maxima over lanes ------------------------------------------------------------------------------------------

// The largest lane; none may be NaN.
inline float lane_max(Floats x) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps(reinterpret_cast<__m512>(x));
#else
  float most = x[0];
  for (int lane = 1; lane < kLanes; ++lane) most = x[lane] > most ? x[lane] : most;
  return most;
#endif
}

inline float lane_sum(Floats x) {
  float part[kLanes];
  store(part, x);
  for (int half = kLanes / 2; half; half /= 2)
    for (int lane = 0; lane < half; lane++) part[lane] += part[lane + half];
  return part[0];
}

// The sums over lanes of kLanes vectors, as one vector. Where shuffles do it, all kLanes sums take as many operations as four
// sums one by one. `x` may be overwritten.
#ifdef __AVX512F__

// Every step adds two halves of a vector and packs two such sums into one vector: at last lane i holds the sum of vector i.
inline Floats lane_sums(Floats* x) {
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

inline Floats lane_sums(const Floats* x) {
  __m256 quarter[2];  // sums over each half of four vectors
  for (int i = 0; i < 2; i++) {
    const __m256 first = _mm256_hadd_ps((__m256)x[4 * i], (__m256)x[4 * i + 1]);
    quarter[i] = _mm256_hadd_ps(first, _mm256_hadd_ps((__m256)x[4 * i + 2], (__m256)x[4 * i + 3]));
  }
  const __m256 low = _mm256_permute2f128_ps(quarter[0], quarter[1], 0x20);
  return (Floats)_mm256_add_ps(low, _mm256_permute2f128_ps(quarter[0], quarter[1], 0x31));
}

#else

inline Floats lane_sums(const Floats* x) {
  Floats sums;
  for (int lane = 0; lane < kLanes; lane++) sums[lane] = lane_sum(x[lane]);
  return sums;
}

#endif

}  // namespace
