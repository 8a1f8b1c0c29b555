// The best of a few prototypes of every vector: the one whose parts' codes leave least over. See native_parts.py for what the
// arguments mean.
//
// 64 vectors of one head at a time: what a prototype leaves over of them is laid out channel by channel, so that the points of a
// part are loaded as they lie.

#include <cstdint>
#include <vector>

#include "native_search.h"

struct Part {
  int64_t dim, centroids, channel;  // channels of a point, entries, and the first of its channels
  const float* lines;               // of head 0: [entries, dim + 1], twice a centroid and minus its square
  int64_t head_stride;              // floats from one head's lines to the next one's
};

struct Job {
  const float* x;           // [rows, tokens, dim]
  const float* prototypes;  // [heads, num_prototypes, dim]
  const int64_t* few;       // [rows, tried, tokens]
  const Part* parts;
  int64_t* codes;  // [rows, 1 + num_parts, tokens]: the prototype, then the parts
  int64_t heads, tokens, dim, num_prototypes, tried, num_parts;
};

namespace {

constexpr int kTokens = 64;

// points [D, 64], lines [k, D + 1]; codes [64] get the first largest score, errors [64] grow by the squared distance to it.
template <int D>
void one_part(const float* points, const float* lines, int64_t k, int32_t* codes, float* errors) {
  for (int start = 0; start < kTokens; start += kBlock) {
    Floats x[kVectors][D], best[kVectors];
    Ints index[kVectors];
    for (int v = 0; v < kVectors; ++v)
      for (int i = 0; i < D; ++i) x[v][i] = *reinterpret_cast<const Floats*>(points + i * kTokens + start + v * kLanes);
    largest<D>(x, lines, k, best, index);
    for (int v = 0; v < kVectors; ++v) {
      Floats error = -best[v];
      for (int i = 0; i < D; ++i) error += x[v][i] * x[v][i];
      *reinterpret_cast<Floats*>(errors + start + v * kLanes) += error;
      *reinterpret_cast<Ints*>(codes + start + v * kLanes) = index[v];
    }
  }
}

bool search(const Part& part, int64_t head, const float* residual, int32_t* codes, float* errors) {
  const float* lines = part.lines + head * part.head_stride;
  const float* points = residual + part.channel * kTokens;
  switch (part.dim) {
    case 1: one_part<1>(points, lines, part.centroids, codes, errors); return true;
    case 2: one_part<2>(points, lines, part.centroids, codes, errors); return true;
    case 4: one_part<4>(points, lines, part.centroids, codes, errors); return true;
    case 8: one_part<8>(points, lines, part.centroids, codes, errors); return true;
    case 16: one_part<16>(points, lines, part.centroids, codes, errors); return true;
    default: return false;
  }
}

}  // namespace

// Blocks begin..end-1 of 64 tokens, counted over all rows; returns 1 where a part's channels are not known here.
extern "C" int pqkv_parts(const Job* job, int64_t begin, int64_t end) {
  const int64_t blocks = (job->tokens + kTokens - 1) / kTokens, dim = job->dim, num_parts = job->num_parts;
  std::vector<float> residual(dim * kTokens);
  std::vector<int32_t> codes(job->tried * num_parts * kTokens);
  std::vector<float> errors(job->tried * kTokens);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / blocks, start = unit % blocks * kTokens, head = row % job->heads;
    const int64_t count = job->tokens - start < kTokens ? job->tokens - start : kTokens;
    const float* own = job->x + (row * job->tokens + start) * dim;
    const float* table = job->prototypes + head * job->num_prototypes * dim;
    const int64_t* few = job->few + row * job->tried * job->tokens + start;
    for (int64_t k = 0; k < job->tried; ++k) {
      float* left = errors.data() + k * kTokens;
      for (int64_t t = 0; t < kTokens; ++t) {
        const float* prototype = t < count ? table + few[k * job->tokens + t] * dim : table;
        for (int64_t c = 0; c < dim; ++c) residual[c * kTokens + t] = t < count ? own[t * dim + c] - prototype[c] : 0.0f;
        left[t] = 0.0f;
      }
      for (int64_t m = 0; m < num_parts; ++m)
        if (!search(job->parts[m], head, residual.data(), codes.data() + (k * num_parts + m) * kTokens, left)) return 1;
    }
    int64_t* out = job->codes + row * (1 + num_parts) * job->tokens + start;
    for (int64_t t = 0; t < count; ++t) {
      int64_t best = 0;
      for (int64_t k = 1; k < job->tried; ++k)
        if (errors[k * kTokens + t] < errors[best * kTokens + t]) best = k;
      out[t] = few[best * job->tokens + t];
      for (int64_t m = 0; m < num_parts; ++m)
        out[(1 + m) * job->tokens + t] = codes[(best * num_parts + m) * kTokens + t];
    }
  }
  return 0;
}
