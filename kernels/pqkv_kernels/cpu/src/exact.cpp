// Adds exact tokens to attention over codes, for a few queries on a CPU: the meaning of
// pqkv_kernels.reference.attention.add_exact. Knows addresses and numbers only; `cpu/attention.py` lays out the arguments.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>

#include "simd.h"

// Vectors [B, kv_heads, tokens, D]: channels lie one after the other; rows, heads and tokens so many numbers apart.
struct Tokens {
  const void* data;
  int64_t row, head, token;
};

struct ExactJob {
  Tokens sink_keys, sink_values, keys, values;
  const float* query;             // [B, H, N, D]
  const int64_t *starts, *stops;  // [B]: a row's first slot, and the one from which on it reads exact tokens
  float *out, *lse;               // [B, H, N, D], [B, H, N]: those of the codes; become those of all tokens
  int64_t kv_heads, group, num_queries, dim, num_sinks;  // H = kv_heads * group, N, D
  int64_t num_exact, first_slot;                         // of the window: its tokens, and the slot of the first
  int64_t is_bfloat16;                                   // of all tokens; 0: they are float
  float scaling, softcap;                                // softcap 0: none
};

namespace {

// The upper half of a float.
struct BFloat16 {
  uint16_t bits;
};

inline Floats load(const BFloat16* from) {
  typedef uint16_t Halves __attribute__((vector_size(2 * kLanes), aligned(2), may_alias));
  typedef uint32_t Words __attribute__((vector_size(4 * kLanes)));
  return (Floats)(__builtin_convertvector(*(const Halves*)from, Words) << 16);
}

inline float number(float x) { return x; }

inline float number(BFloat16 x) {
  const uint32_t bits = (uint32_t)x.bits << 16;
  float number;
  std::memcpy(&number, &bits, 4);
  return number;
}

template <typename T>
inline float dot(const float* a, const T* b, int64_t dim) {
  Floats total = {};
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) total += load(a + i) * load(b + i);
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += total[lane];
  for (; i < dim; ++i) sum += a[i] * number(b[i]);
  return sum;
}

template <typename T>
inline void add(float* to, const T* x, float weight, int64_t dim) {
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) store(to + i, load(to + i) + weight * load(x + i));
  for (; i < dim; ++i) to[i] += weight * number(x[i]);
}

// Tokens of one key/value head, which lie so many numbers apart.
template <typename T>
struct Span {
  const T *keys, *values;
  int64_t key_step, value_step, count;
};

// Tokens begin..end-1 of one head; none where `end` is smaller.
template <typename T>
Span<T> span_of(const Tokens& keys, const Tokens& values, int64_t row, int64_t head, int64_t begin, int64_t end) {
  const T* first_key = (const T*)keys.data + row * keys.row + head * keys.head + begin * keys.token;
  const T* first_value = (const T*)values.data + row * values.row + head * values.head + begin * values.token;
  return {first_key, first_value, keys.token, values.token, std::max<int64_t>(end - begin, 0)};
}

// Add the tokens of `spans`, all of which the query may see, to what the codes gave it, `out` and `lse`. The codes count as one
// token whose score is their log-sum-exp and whose value is their output.
template <typename T>
void one_query(const ExactJob& job, const float* query, const Span<T> (&spans)[2], float* scores, float* out, float* lse) {
  float high = *lse;
  float* score = scores;
  for (const Span<T>& span : spans)
    for (int64_t t = 0; t < span.count; ++t) {
      float logit = dot(query, span.keys + t * span.key_step, job.dim) * job.scaling;
      if (job.softcap > 0) logit = job.softcap * std::tanh(logit / job.softcap);
      high = std::max(high, logit);
      *score++ = logit;
    }
  if (high == -std::numeric_limits<float>::infinity()) return;  // there is no token at all
  const float coded_weight = std::exp(*lse - high);
  float total = coded_weight;
  for (int64_t i = 0; i < job.dim; ++i) out[i] *= coded_weight;
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
int run(const ExactJob* job, int64_t begin, int64_t end) {
  std::vector<float> scores(job->num_sinks + job->num_exact);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / job->kv_heads, head = unit % job->kv_heads;
    const int64_t start = job->starts[row], stop = job->stops[row];
    const int64_t sinks = std::clamp<int64_t>(stop - start, 0, job->num_sinks);  // a short row reads some of them in the window
    const int64_t from = std::clamp<int64_t>(stop - job->first_slot, 0, job->num_exact);
    for (int64_t q = 0; q < job->group * job->num_queries; ++q) {
      const int64_t index = unit * job->group * job->num_queries + q;  // of the query, counted [B, H, N]
      // Queries are those of the window's last tokens: each sees the window up to its own token.
      const int64_t seen = job->num_exact - job->num_queries + 1 + q % job->num_queries;
      const Span<T> spans[2] = {span_of<T>(job->sink_keys, job->sink_values, row, head, 0, sinks),
                                span_of<T>(job->keys, job->values, row, head, from, seen)};
      one_query(*job, job->query + index * job->dim, spans, scores.data(), job->out + index * job->dim, job->lse + index);
    }
  }
  return 0;
}

}  // namespace

// Key/value heads begin..end-1, counted over all rows, with all their queries.
extern "C" int pqkv_exact(const ExactJob* job, int64_t begin, int64_t end) {
  return job->is_bfloat16 ? run<BFloat16>(job, begin, end) : run<float>(job, begin, end);
}
