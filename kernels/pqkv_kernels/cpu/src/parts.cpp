// The best of a few prototypes of every vector: the one whose parts' codes leave least over. See cpu/encode.py for what the
// arguments mean.
//
// Some vectors of one head at a time: what a prototype leaves over of them is laid out channel by channel, so that the points of a
// part are loaded as they lie, and enough of them pass by a part's table while it is near.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "cells.h"
#include "search.h"

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
  Cells* cells;    // [heads, num_parts], filled by pqkv_cells
  int64_t* codes;  // [rows, 1 + num_parts, tokens]: the prototype, then the parts
  int64_t rows, heads, tokens, dim, num_prototypes, tried, num_parts;
};

namespace {

constexpr int kTokens = 256;
constexpr int kStride = kTokens + kLanes;  // from channel to channel: powers of two would all meet in a few lines of the cache

// Whether the centroids of a part are searched by cells.
bool by_cells(const Job& job, const Part& part) {
  return part.dim == 2 && Cells::pay(part.centroids, job.rows / job.heads * job.tokens * job.tried);
}

// points [D, kStride], of which `count` are looked at; codes [kTokens] get what `search`, a function of kBlock points, finds,
// errors [kTokens] grow by the squared distance to it.
template <int D, typename Search>
void one_part(const float* points, int64_t count, int32_t* codes, float* errors, Search search) {
  for (int64_t start = 0; start < count; start += kBlock) {
    Floats x[kVectors][D], best[kVectors];
    Ints index[kVectors];
    for (int v = 0; v < kVectors; ++v)
      for (int i = 0; i < D; ++i) x[v][i] = loaded(points + i * kStride + start + v * kLanes);
    search(x, best, index);
    for (int v = 0; v < kVectors; ++v) {
      float* own = errors + start + v * kLanes;
      Floats error = -best[v];
      for (int i = 0; i < D; ++i) error += x[v][i] * x[v][i];
      store(own, loaded(own) + error);
      store(codes + start + v * kLanes, index[v]);
    }
  }
}

// What prototypes out of `table` leave over of `count` vectors of `dim` channels, channel by channel: residual [dim, kStride].
void lay_out(const float* vectors, const float* table, const int64_t* prototypes, int64_t dim, int64_t count, float* residual) {
  for (int64_t first = 0; first < count; first += kLanes)
    for (int64_t c = 0; c < dim; ++c)
      for (int64_t t = first; t < first + kLanes && t < count; ++t)
        residual[c * kStride + t] = vectors[t * dim + c] - table[prototypes[t] * dim + c];
}

bool search(const Job& job, int64_t head, int64_t m, const float* residual, int64_t count, int32_t* codes, float* errors) {
  const Part& part = job.parts[m];
  const float* points = residual + part.channel * kStride;
  if (by_cells(job, part)) {
    const Cells& cells = job.cells[head * job.num_parts + m];
    one_part<2>(points, count, codes, errors, [&](auto&... block) { cells.largest(block...); });
    return true;
  }
  const float* lines = part.lines + head * part.head_stride;
  const auto all = [&](auto& x, auto& best, auto& index) { largest(x, lines, part.centroids, best, index); };
  switch (part.dim) {
    case 1: one_part<1>(points, count, codes, errors, all); return true;
    case 2: one_part<2>(points, count, codes, errors, all); return true;
    case 4: one_part<4>(points, count, codes, errors, all); return true;
    case 8: one_part<8>(points, count, codes, errors, all); return true;
    case 16: one_part<16>(points, count, codes, errors, all); return true;
    default: return false;
  }
}

}  // namespace

// One for every head and part of a job.
extern "C" Cells* pqkv_new_cells(int64_t count) { return new Cells[count]; }

extern "C" void pqkv_delete_cells(Cells* cells) { delete[] cells; }

// The cells begin..end-1, for heads and parts where they pay.
extern "C" int pqkv_cells(const Job* job, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const Part& part = job->parts[unit % job->num_parts];
    if (by_cells(*job, part)) job->cells[unit].build(part.lines + unit / job->num_parts * part.head_stride, part.centroids);
  }
  return 0;
}

// Blocks begin..end-1 of kTokens tokens, counted over all rows; returns 1 where a part's channels are not known here.
extern "C" int pqkv_parts(const Job* job, int64_t begin, int64_t end) {
  const int64_t blocks = (job->tokens + kTokens - 1) / kTokens, dim = job->dim, num_parts = job->num_parts;
  std::vector<float> residual(job->tried * dim * kStride), errors(job->tried * kTokens);
  std::vector<int32_t> codes(job->tried * num_parts * kTokens);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / blocks, start = unit % blocks * kTokens, head = row % job->heads;
    const int64_t count = job->tokens - start < kTokens ? job->tokens - start : kTokens;
    const float* own = job->x + (row * job->tokens + start) * dim;
    const float* table = job->prototypes + head * job->num_prototypes * dim;
    const int64_t* few = job->few + row * job->tried * job->tokens + start;
    for (int64_t k = 0; k < job->tried; ++k)
      lay_out(own, table, few + k * job->tokens, dim, count, residual.data() + k * dim * kStride);
    std::fill(errors.begin(), errors.end(), 0.0f);
    for (int64_t m = 0; m < num_parts; ++m)
      for (int64_t k = 0; k < job->tried; ++k) {
        int32_t* found = codes.data() + (k * num_parts + m) * kTokens;
        if (!search(*job, head, m, residual.data() + k * dim * kStride, count, found, errors.data() + k * kTokens)) return 1;
      }
    int64_t* out = job->codes + row * (1 + num_parts) * job->tokens + start;
    int64_t best[kTokens] = {};
    for (int64_t k = 1; k < job->tried; ++k)
      for (int64_t t = 0; t < count; ++t)
        if (errors[k * kTokens + t] < errors[best[t] * kTokens + t]) best[t] = k;
    for (int64_t t = 0; t < count; ++t) out[t] = few[best[t] * job->tokens + t];
    for (int64_t m = 0; m < num_parts; ++m)
      for (int64_t t = 0; t < count; ++t)
        out[(1 + m) * job->tokens + t] = codes[(best[t] * num_parts + m) * kTokens + t];
  }
  return 0;
}

extern "C" int64_t pqkv_block() { return kTokens; }
