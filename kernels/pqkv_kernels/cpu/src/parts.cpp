// The best of some candidate prototypes of every vector: the one whose parts' codes leave the least error. `cpu/encode.py` lays
// out the arguments.
//
// Some vectors of one head are taken at a time. Their residuals, which is what a prototype leaves over of them, are laid out
// channel by channel, so that the points of a part are loaded as they lie, and enough of them pass by a part's table while it
// is in a near cache.

#include <algorithm>
#include <cstdint>
#include <vector>

#include "constants.h"
#include "search.h"

// A subspace of the stage behind the prototypes.
struct Part {
  int64_t dim, num_centroids, channel;  // channel: the first of `dim`
  const float* augmented;               // of head 0: [num_centroids, dim + 1], see search.h
  int64_t head_stride;                  // floats from one head's centroids to the next one's
};

struct PartsJob {
  const float* x;             // [rows, tokens, dim]
  const float* prototypes;    // [heads, num_prototypes, dim]
  const int64_t* candidates;  // [rows, num_candidates, tokens]: numbers of prototypes
  const Part* parts;          // [num_parts]
  Cells* cells;               // [heads, num_parts], filled by pqkv_cells
  int64_t* codes;             // [rows, 1 + num_parts, tokens]: the prototype, then the parts
  int64_t rows, heads, tokens, dim, num_prototypes, num_candidates, num_parts;
};

namespace {

constexpr int kPartDims[] = {1, 2, 4, 8, 16};  // channels of a part

constexpr int kBlockTokens = 256;
constexpr int kStride = kBlockTokens + kLanes;  // from channel to channel: a power of two would meet in few lines of the cache

// Whether the centroids of a part are searched by cells.
bool by_cells(const PartsJob& job, const Part& part) {
  return part.dim == 2 && Cells::pay(part.num_centroids, job.rows / job.heads * job.tokens * job.num_candidates);
}

// points [D, kStride], of which `count` are looked at; codes [kBlockTokens] get what `search`, a function of kBlockPoints
// points, chooses; errors [kBlockTokens] grow by the squared distance to it, which is the point's square minus the score.
template <int D, typename Search>
void one_part(const float* points, int64_t count, int32_t* codes, float* errors, Search search) {
  for (int64_t start = 0; start < count; start += kBlockPoints) {
    Floats x[kBlockVectors][D], best[kBlockVectors];
    Ints index[kBlockVectors];
    for (int v = 0; v < kBlockVectors; ++v)
      for (int i = 0; i < D; ++i) x[v][i] = load(points + i * kStride + start + v * kLanes);
    search(x, best, index);
    for (int v = 0; v < kBlockVectors; ++v) {
      float* own = errors + start + v * kLanes;
      Floats error = -best[v];
      for (int i = 0; i < D; ++i) error += x[v][i] * x[v][i];
      store(own, load(own) + error);
      store(codes + start + v * kLanes, index[v]);
    }
  }
}

// What prototypes out of `table` leave over of `count` vectors of `dim` channels, channel by channel: residual [dim, kStride].
// kLanes vectors at a time, so that what is read of them and of their prototypes stays in the cache from channel to channel.
void lay_out(const float* vectors, const float* table, const int64_t* prototypes, int64_t dim, int64_t count, float* residual) {
  for (int64_t first = 0; first < count; first += kLanes)
    for (int64_t c = 0; c < dim; ++c)
      for (int64_t t = first; t < first + kLanes && t < count; ++t)
        residual[c * kStride + t] = vectors[t * dim + c] - table[prototypes[t] * dim + c];
}

// Find the codes of part `m` for residuals [dim, kStride]; returns whether its channels are among kPartDims.
bool search(const PartsJob& job, int64_t head, int64_t m, const float* residual, int64_t count, int32_t* codes, float* errors) {
  const Part& part = job.parts[m];
  const float* points = residual + part.channel * kStride;
  if (by_cells(job, part)) {
    const Cells& cells = job.cells[head * job.num_parts + m];
    one_part<2>(points, count, codes, errors, [&](auto&... block) { cells.largest(block...); });
    return true;
  }
  const float* augmented = part.augmented + head * part.head_stride;
  const auto all = [&](auto& x, auto& best, auto& index) { largest(x, augmented, part.num_centroids, best, index); };
  return with_constant<kPartDims>(part.dim, [&](auto dim) { one_part<dim>(points, count, codes, errors, all); });
}

}  // namespace

// One for every head and part of a job.
extern "C" Cells* pqkv_new_cells(int64_t count) { return new Cells[count]; }

extern "C" void pqkv_delete_cells(Cells* cells) { delete[] cells; }

// The cells begin..end-1, for heads and parts where they pay.
extern "C" int pqkv_cells(const PartsJob* job, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; ++unit) {
    const Part& part = job->parts[unit % job->num_parts];
    const float* augmented = part.augmented + unit / job->num_parts * part.head_stride;
    if (by_cells(*job, part)) job->cells[unit].build(augmented, part.num_centroids);
  }
  return 0;
}

// Blocks begin..end-1 of kBlockTokens tokens, counted over all rows; returns 1 where a part's channels are none of kPartDims.
extern "C" int pqkv_parts(const PartsJob* job, int64_t begin, int64_t end) {
  const int64_t blocks = (job->tokens + kBlockTokens - 1) / kBlockTokens, dim = job->dim, num_parts = job->num_parts;
  std::vector<float> residual(job->num_candidates * dim * kStride), errors(job->num_candidates * kBlockTokens);
  std::vector<int32_t> codes(job->num_candidates * num_parts * kBlockTokens);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / blocks, start = unit % blocks * kBlockTokens, head = row % job->heads;
    const int64_t count = job->tokens - start < kBlockTokens ? job->tokens - start : kBlockTokens;
    const float* vectors = job->x + (row * job->tokens + start) * dim;
    const float* table = job->prototypes + head * job->num_prototypes * dim;
    const int64_t* candidates = job->candidates + row * job->num_candidates * job->tokens + start;
    for (int64_t k = 0; k < job->num_candidates; ++k)
      lay_out(vectors, table, candidates + k * job->tokens, dim, count, residual.data() + k * dim * kStride);
    std::fill(errors.begin(), errors.end(), 0.0f);
    for (int64_t m = 0; m < num_parts; ++m)  // all candidates meet a part's table while it is near
      for (int64_t k = 0; k < job->num_candidates; ++k) {
        int32_t* own = codes.data() + (k * num_parts + m) * kBlockTokens;
        if (!search(*job, head, m, residual.data() + k * dim * kStride, count, own, errors.data() + k * kBlockTokens)) return 1;
      }
    int64_t* out = job->codes + row * (1 + num_parts) * job->tokens + start;
    int64_t best[kBlockTokens] = {};  // of equally good candidates the first
    for (int64_t k = 1; k < job->num_candidates; ++k)
      for (int64_t t = 0; t < count; ++t)
        if (errors[k * kBlockTokens + t] < errors[best[t] * kBlockTokens + t]) best[t] = k;
    for (int64_t t = 0; t < count; ++t) out[t] = candidates[best[t] * job->tokens + t];
    for (int64_t m = 0; m < num_parts; ++m)
      for (int64_t t = 0; t < count; ++t)
        out[(1 + m) * job->tokens + t] = codes[(best[t] * num_parts + m) * kBlockTokens + t];
  }
  return 0;
}

extern "C" int64_t pqkv_block() { return kBlockTokens; }
