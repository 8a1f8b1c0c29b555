// Scores to weights.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

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

// Make `x` [count], a multiple of 16, the exponentials of its distances to its largest; their sum, and with it `lse`.
inline float to_weights(float* x, int64_t count, float* lse) {
  float high = -1e30f, total = 0, partial[16];
  std::fill(partial, partial + 16, high);
  for (int64_t t = 0; t < count; t += 16)
    for (int i = 0; i < 16; i++) partial[i] = x[t + i] > partial[i] ? x[t + i] : partial[i];
  for (float part : partial) high = std::max(high, part);
  std::fill(partial, partial + 16, 0.0f);
  for (int64_t t = 0; t < count; t += 16)
    for (int i = 0; i < 16; i++) {
      x[t + i] = exp_negative(x[t + i] - high);
      partial[i] += x[t + i];
    }
  for (float part : partial) total += part;
  *lse = total > 0 ? high + std::log(total) : -std::numeric_limits<float>::infinity();
  return std::max(total, 1e-30f);
}

}  // namespace
