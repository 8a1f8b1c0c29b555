// Attention over codes on a CPU, for a few queries at a time: the meaning of pqkv_kernels.reference.attention.code_attention.
// Where codes are of few planes, a vector holds one coordinate of kLanes tokens, looked up as codes.h says. Where a code is of
// many planes, a vector holds one coordinate of kLanes planes of one token. Knows addresses and numbers only;
// `cpu/attention.py` lays out the arguments.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention_job.h"
#include "constants.h"
#include "scores.h"
#include "softmax.h"
#include "sums.h"

namespace {

// Units begin..end-1, counted [B, Hkv, Q, C]: the N queries of a block meet one chunk of pages.
template <int N, bool ROTATE>
void run(const AttentionJob& job, int64_t begin, int64_t end) {
  const int64_t dim = job.planes * 2;
  Scores<N, ROTATE> scores(job);
  Sums<N> values(job, job.values), keys(job, job.keys);
  AlignedFloats weights;
  for (int64_t unit = begin; unit < end; unit++) {
    const int64_t block = unit / job.chunks, head = block / job.query_blocks % job.heads;
    const int64_t first = unit % job.chunks * job.chunk_pages, count = std::min(job.chunk_pages, job.num_pages - first);
    const PageRange pages = {block / job.query_blocks / job.heads, head, first, count};
    weights.resize(N * pages.tokens());
    scores.run(pages, job.query + block * N * dim, weights.data());
    float total[N];
    for (int n = 0; n < N; n++) total[n] = to_weights(weights.data() + n * kTokens, count, N * kTokens, job.lse + unit * N + n);
    float* out = job.out + unit * N * job.width;
    values.run(pages, weights.data(), total, out);
    if (job.width > dim) keys.run(pages, weights.data(), total, out + dim);
  }
}

}  // namespace

// Which form of tables this was built to read: bytes, or 0 for floats.
extern "C" const int pqkv_byte_tables = kByteTables;

// Returns 1 where blocks are of other sizes than kBlocks.
extern "C" int pqkv_attend(const AttentionJob* job, int64_t begin, int64_t end) {
  const auto attend = [&](auto block) {
    job->pair ? run<block, true>(*job, begin, end) : run<block, false>(*job, begin, end);
  };
  return with_constant<kBlocks>(job->block, attend) ? 0 : 1;
}

// Query blocks begin..end-1, counted over all heads.
extern "C" int pqkv_merge(const AttentionJob* job, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; unit++) merge(*job, unit);
  return 0;
}
