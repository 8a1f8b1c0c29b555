// The search that nearest.cpp and parts.cpp share: all centroids pass by points that stay in vector registers.
//
// A score is a few fused multiply-adds, and the best so far and its index are kept by selection, so nothing but centroids is
// read in the inner loop.

#pragma once

#include <cstdint>
#include <limits>

#include "lanes.h"

namespace {

constexpr int kVectors = 4;
constexpr int kBlock = kLanes * kVectors;
constexpr float kLowest = std::numeric_limits<float>::lowest();

// The largest score of each of kBlock points `x` among `lines` [k, D + 1], twice a centroid and minus its square, and the first
// row that reaches it.
template <int D>
inline void largest(const Floats (&x)[kVectors][D], const float* lines, int64_t k, Floats (&best)[kVectors],
                    Ints (&index)[kVectors]) {
  for (int v = 0; v < kVectors; ++v) {
    best[v] = Floats{} + kLowest;
    index[v] = Ints{};
  }
  for (int64_t c = 0; c < k; ++c) {
    const float* line = lines + c * (D + 1);
    const Ints here = Ints{} + static_cast<int32_t>(c);
#pragma GCC unroll 4
    for (int v = 0; v < kVectors; ++v) {
      Floats score = line[D] - Floats{};  // not plus: -0 + 0 is 0, so that would be an addition
      for (int i = 0; i < D; ++i) score += x[v][i] * line[i];
      const Ints better = score > best[v];
      best[v] = better ? score : best[v];
      index[v] = better ? here : index[v];
    }
  }
}

}  // namespace
