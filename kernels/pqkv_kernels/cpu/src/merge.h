// The parts of an attention, each over some pages, become one.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

#include "attention_job.h"

namespace {

// Merge the parts of query block `unit`, counted over all heads, into the first of them by their log-sum-exp.
void merge(const Job& job, int64_t unit) {
  const int64_t chunks = job.chunks, block = job.block, dim = 2 * job.planes;
  for (int64_t n = 0; n < block; n++) {
    float *out = job.out + (unit * chunks * block + n) * dim, *lse = job.lse + unit * chunks * block + n;
    float high = *lse, total = 0;
    for (int64_t c = 1; c < chunks; c++) high = std::max(high, lse[c * block]);
    if (high == -std::numeric_limits<float>::infinity()) continue;
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
