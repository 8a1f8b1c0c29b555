// Vectors of floats as wide as this machine's, and the few things that can be asked of them only in its own words.

#pragma once

#include <cstdint>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes), aligned(4)));

inline Floats loaded(const float* from) { return *reinterpret_cast<const Floats*>(from); }
inline Ints loaded(const int32_t* from) { return *reinterpret_cast<const Ints*>(from); }
inline void store(float* to, Floats x) { *reinterpret_cast<Floats*>(to) = x; }
inline void store(int32_t* to, Ints x) { *reinterpret_cast<Ints*>(to) = x; }

// One bit for each lane of a comparison, the first lane's lowest.
inline uint32_t bits(Ints mask) {
#ifdef __AVX512F__
  return _mm512_movepi32_mask(reinterpret_cast<__m512i>(mask));
#elif defined(__AVX2__)
  return _mm256_movemask_ps(reinterpret_cast<__m256>(mask));
#else
  uint32_t found = 0;
  for (int lane = 0; lane < kLanes; ++lane) found |= (mask[lane] & 1u) << lane;
  return found;
#endif
}

inline bool any(Ints mask) { return bits(mask) != 0; }

// The largest lane; none may be NaN.
inline float largest_lane(Floats x) {
#ifdef __AVX512F__
  return _mm512_reduce_max_ps(reinterpret_cast<__m512>(x));
#else
  float found = x[0];
  for (int lane = 1; lane < kLanes; ++lane) found = x[lane] > found ? x[lane] : found;
  return found;
#endif
}

// Write the lanes that `kept` has bits for, one after the other; up to kLanes numbers are written.
template <typename Vector, typename Number>
inline void write_kept(Number* to, Vector x, uint32_t kept) {
#ifdef __AVX512F__
  _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(kept, reinterpret_cast<__m512i>(x)));
#else
  for (int lane = 0; lane < kLanes; ++lane) {
    *to = x[lane];
    to += kept >> lane & 1;
  }
#endif
}

}  // namespace
