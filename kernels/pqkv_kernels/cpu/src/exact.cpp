// Adds exact tokens to attention over codes, for a few queries on a CPU: the meaning of pqkv_kernels.exact_tokens.add_exact.
// Knows addresses and numbers only; `cpu/attention.py` lays out the arguments.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "lanes.h"

// Vectors of `dim` numbers, which lie so many numbers apart from row to row, head to head and token to token.
struct Tokens {
  const void* data;
  int64_t row, head, token;
};

struct Job {
  Tokens sink_keys, sink_values, keys, values;
  const float* query;              // [B, H, N, D]
  const int64_t *starts, *stops;   // [B]
  float *out, *lse;                // [B, H, N, D], [B, H, N]: those of the codes; become those of all tokens
  int64_t kv_heads, group, num_queries, dim, num_sinks, num_exact, first_slot;
  int64_t halved;                  // tokens are bfloat16, or else float
  float scaling, softcap;          // softcap 0: none
};

namespace {

// The upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

inline Floats loaded(const BFloat16* from) {
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
  typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
  return (Floats)(__builtin_convertvector(*(const Halves*)from, Words) << 16);
}

inline float number(float x) { return x; }

inline float number(BFloat16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float found;
  std::memcpy(&found, &bits, 4);
  return found;
}

template <typename T>
inline float dot(const float* a, const T* b, int64_t dim) {
  Floats total = {};
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) total += loaded(a + i) * loaded(b + i);
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += total[lane];
  for (; i < dim; ++i) sum += a[i] * number(b[i]);
  return sum;
}

template <typename T>
inline void add(float* to, const T* x, float weight, int64_t dim) {
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) store(to + i, loaded(to + i) + weight * loaded(x + i));
  for (; i < dim; ++i) to[i] += weight * number(x[i]);
}

template <typename T>
struct Span {
  const T *keys, *values;
  int64_t key_step, value_step, count;
};

template <typename T>
Span<T> span_of(const Tokens& keys, const Tokens& values, int64_t row, int64_t head, int64_t begin, int64_t end) {
  const T* first_key = (const T*)keys.data + row * keys.row + head * keys.head + begin * keys.token;
  const T* first_value = (const T*)values.data + row * values.row + head * values.head + begin * values.token;
  return {first_key, first_value, keys.token, values.token, std::max<int64_t>(end - begin, 0)};
}

// One query: what the codes gave it, `out` and `lse`, and the tokens of `spans`, which it may see all.
template <typename T>
void one_query(const Job& job, const float* query, const Span<T> (&spans)[2], float* scores, float* out, float* lse) {
  float high = *lse;
  float* score = scores;
  for (const Span<T>& span : spans)
    for (int64_t t = 0; t < span.count; ++t) {
      float found = dot(query, span.keys + t * span.key_step, job.dim) * job.scaling;
      if (job.softcap > 0) found = job.softcap * std::tanh(found / job.softcap);
      high = std::max(high, found);
      *score++ = found;
    }
  if (high == -std::numeric_limits<float>::infinity()) return;
  const float own = std::exp(*lse - high);
  float total = own;
  for (int64_t i = 0; i < job.dim; ++i) out[i] *= own;
  score = scores;
  for (const Span<T>& span : spans)
    for (int64_t t = 0; t < span.count; ++t) {
      const float weight = std::exp(*score++ - high);
      total += weight;
      add(out, span.values + t * span.value_step, weight, job.dim);
    }
  for (int64_t i = 0; i < job.dim; ++i) out[i] /= total;
  *lse = high + std::log(total);
}

template <typename T>
int run(const Job* job, int64_t begin, int64_t end) {
  std::vector<float> scores(job->num_sinks + job->num_exact);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / job->kv_heads, head = unit % job->kv_heads;
    const int64_t start = job->starts[row], stop = job->stops[row];
    const int64_t sinks = std::clamp<int64_t>(stop - start, 0, job->num_sinks);
    const int64_t from = std::clamp<int64_t>(stop - job->first_slot, 0, job->num_exact);
    for (int64_t q = 0; q < job->group * job->num_queries; ++q) {
      const int64_t place = unit * job->group * job->num_queries + q;
      const int64_t seen = job->num_exact - job->num_queries + 1 + q % job->num_queries;
      const Span<T> spans[2] = {span_of<T>(job->sink_keys, job->sink_values, row, head, 0, sinks),
                                span_of<T>(job->keys, job->values, row, head, from, seen)};
      one_query(*job, job->query + place * job->dim, spans, scores.data(), job->out + place * job->dim, job->lse + place);
    }
  }
  return 0;
}

}  // namespace

// Key/value heads begin..end-1, counted over all rows, with all their queries.
extern "C" int pqkv_exact(const Job* job, int64_t begin, int64_t end) {
  return job->halved ? run<BFloat16>(job, begin, end) : run<float>(job, begin, end);
}
