// Attention over codes on a CPU, for up to four queries at a time: the meaning of pqkv_kernels.attention.code_attention.
// A vector, as wide as the machine's, holds one coordinate of so many tokens where codes of few planes are looked up
// (`lookup.h`), one coordinate of so many planes of a token where one code stands for many. Knows addresses and numbers only;
// `cpu/attention.py` lays out the arguments.
#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention_job.h"
#include "merge.h"
#include "place.h"
#include "scores.h"
#include "softmax.h"
#include "sums.h"

namespace {

// Units begin..end-1: N queries of one head meet one run of pages, counted [B, Hkv, Q, C].
template <int N, bool TURN>
int run(const Job& job, int64_t begin, int64_t end) {
  const int64_t dim = job.planes * 2;
  Scores<N, TURN> scores(job);
  Sums<N> sums(job);
  Aligned weights;
  for (int64_t unit = begin; unit < end; unit++) {
    const int64_t block = unit / job.chunks, head = block / job.query_blocks % job.heads;
    const int64_t first = unit % job.chunks * job.chunk_pages, count = std::min(job.chunk_pages, job.num_pages - first);
    const Place place = {block / job.query_blocks / job.heads, head, first, count};
    weights.resize(N * place.tokens());
    scores.run(place, job.query + block * N * dim, weights.data());
    float total[N];
    for (int n = 0; n < N; n++) total[n] = to_weights(weights.data() + n * kTokens, count, N * kTokens, job.lse + unit * N + n);
    sums.run(place, weights.data(), total, job.out + unit * N * dim);
  }
  return 0;
}

template <int N>
int run(const Job& job, int64_t begin, int64_t end) {
  return job.pair ? run<N, true>(job, begin, end) : run<N, false>(job, begin, end);
}

}  // namespace

// Which form of tables this was built to read.
extern "C" const int pqkv_byte_tables = kByteTables;

extern "C" int pqkv_attend(const Job* job, int64_t begin, int64_t end) {
  if (job->block == 1) return run<1>(*job, begin, end);
  if (job->block == 2) return run<2>(*job, begin, end);
  if (job->block == 3) return run<3>(*job, begin, end);
  if (job->block == 4) return run<4>(*job, begin, end);
  return 1;
}

// Query blocks begin..end-1, counted over all heads.
extern "C" int pqkv_merge(const Job* job, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; unit++) merge(*job, unit);
  return 0;
}
