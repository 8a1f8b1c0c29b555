// Softmax in parts: the scores of some pages become weights, and the parts of an attention, each over some pages, become one.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "attention_job.h"

namespace {

// exp(x) of x <= 0 to 2e-7; minus infinity gives zero. exp(x) = 2^n exp(r), with n = x / ln 2 rounded and r = x - n ln 2.
inline float exp_negative(float x) {
  x = std::max(x, -87.0f);
  // 12582912 is 1.5 * 2^23: numbers of this size have no bits behind the point, so adding it rounds, and the sum's bits are n
  // plus 0x4B400000, the bits of 12582912.
  const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  // ln 2 in two pieces, the first of which n multiplies without rounding.
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const float p = 1 + r * (1 + r * (0.5f + r * (0.166666667f + r * (0.0416666667f + r * (8.3333333e-3f + r * 1.3888889e-3f)))));
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits - 0x4B400000 + 127) << 23;  // a float's exponent, 127 for 2^0, stands above its 23 bits of mantissa
  float power;
  std::memcpy(&power, &bits, 4);
  return x <= -87.0f ? 0.0f : p * power;
}

// Turn scores `x` of `pages` pages of 64, which lie `step` floats apart, into exponentials of their distances to the largest.
// Returns their sum and writes the log-sum-exp of the scores. Maxima and sums are kept for each of the 64 places of a page, so
// that loops over them fill vectors.
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
  return std::max(total, 1e-30f);  // never zero: sums of values are divided by it
}

// Merge the parts of query block `unit`, counted over all heads, into the first of them by their log-sum-exp.
void merge(const AttentionJob& job, int64_t unit) {
  const int64_t chunks = job.chunks, block = job.block, dim = job.width;
  for (int64_t n = 0; n < block; n++) {
    float *out = job.out + (unit * chunks * block + n) * dim, *lse = job.lse + unit * chunks * block + n;
    float high = *lse, total = 0;
    for (int64_t c = 1; c < chunks; c++) high = std::max(high, lse[c * block]);
    if (high == -std::numeric_limits<float>::infinity()) continue;  // no part has a token
    for (int64_t c = 0; c < chunks; c++) {
      const float share = std::exp(lse[c * block] - high), *part = out + c * block * dim;
      total += share;
      for (int64_t i = 0; i < dim; i++) out[i] = share * part[i] + (c ? out[i] : 0.0f);
    }
    for (int64_t i = 0; i < dim; i++) out[i] /= total;
    *lse = high + std::log(total);
  }
}

}  // namespace
