// Scores to weights.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "codes.h"

namespace {

// exp(x) of x <= 0 to 2e-7; minus infinity gives zero.
inline float exp_negative(float x) {
  x = std::max(x, -87.0f);
  const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const float p = 1 + r * (1 + r * (0.5f + r * (0.166666667f + r * (0.0416666667f + r * (8.3333333e-3f + r * 1.3888889e-3f)))));
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits - 0x4B400000 + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return x <= -87.0f ? 0.0f : p * power;
}

// Make `x` [pages] of 64 each, which lie `step` apart, the exponentials of their distances to the largest; their sum, and with it
// `lse`.
inline float to_weights(float* x, int64_t pages, int64_t step, float* lse) {
  float high = -1e30f, total = 0, partial[kTokens];
  std::fill(partial, partial + kTokens, high);
  for (int64_t p = 0; p < pages; p++)
    for (int t = 0; t < kTokens; t++) partial[t] = x[p * step + t] > partial[t] ? x[p * step + t] : partial[t];
  for (float part : partial) high = std::max(high, part);
  std::fill(partial, partial + kTokens, 0.0f);
  for (int64_t p = 0; p < pages; p++)
    for (int t = 0; t < kTokens; t++) {
      x[p * step + t] = exp_negative(x[p * step + t] - high);
      partial[t] += x[p * step + t];
    }
  for (float part : partial) total += part;
  *lse = total > 0 ? high + std::log(total) : -std::numeric_limits<float>::infinity();
  return std::max(total, 1e-30f);
}

}  // namespace
