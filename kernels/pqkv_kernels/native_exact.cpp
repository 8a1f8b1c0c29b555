// Adds exact tokens to attention over codes, for a few queries on a CPU: the meaning of pqkv_kernels.exact_tokens.add_exact.
// Knows addresses and numbers only; `native_exact.py` lays out the arguments.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

// Vectors of `dim` floats, which lie so many floats apart from row to row, head to head and token to token.
struct Tokens {
  const float* data;
  int64_t row, head, token;
};

struct Job {
  Tokens sink_keys, sink_values, keys, values;
  const float* query;              // [B, H, N, D]
  const int64_t *starts, *stops;   // [B]
  float *out, *lse;                // [B, H, N, D], [B, H, N]: those of the codes; become those of all tokens
  int64_t kv_heads, group, num_queries, dim, num_sinks, num_exact, first_slot;
  float scaling, softcap;          // softcap 0: none
};

namespace {

constexpr int kLanes = 16;
typedef float Floats __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));

inline float dot(const float* a, const float* b, int64_t dim) {
  Floats total = {};
  int64_t i = 0;
  for (; i + kLanes <= dim; i += kLanes) total += *(const Floats*)(a + i) * *(const Floats*)(b + i);
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += total[lane];
  for (; i < dim; ++i) sum += a[i] * b[i];
  return sum;
}

inline void add(float* to, const float* x, float weight, int64_t dim) {
  for (int64_t i = 0; i < dim; ++i) to[i] += weight * x[i];
}

struct Span {
  const float *keys, *values;
  int64_t key_step, value_step, count;
};

Span span_of(const Tokens& keys, const Tokens& values, int64_t row, int64_t head, int64_t begin, int64_t end) {
  const float* first_key = keys.data + row * keys.row + head * keys.head + begin * keys.token;
  const float* first_value = values.data + row * values.row + head * values.head + begin * values.token;
  return {first_key, first_value, keys.token, values.token, std::max<int64_t>(end - begin, 0)};
}

// One query: what the codes gave it, `out` and `lse`, and the tokens of `spans`, which it may see all.
void one_query(const Job& job, const float* query, const Span (&spans)[2], float* scores, float* out, float* lse) {
  float high = *lse;
  float* score = scores;
  for (const Span& span : spans)
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
  for (const Span& span : spans)
    for (int64_t t = 0; t < span.count; ++t) {
      const float weight = std::exp(*score++ - high);
      total += weight;
      add(out, span.values + t * span.value_step, weight, job.dim);
    }
  for (int64_t i = 0; i < job.dim; ++i) out[i] /= total;
  *lse = high + std::log(total);
}

}  // namespace

// Key/value heads begin..end-1, counted over all rows, with all their queries.
extern "C" int pqkv_exact(const Job* job, int64_t begin, int64_t end) {
  std::vector<float> scores(job->num_sinks + job->num_exact);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / job->kv_heads, head = unit % job->kv_heads;
    const int64_t start = job->starts[row], stop = job->stops[row];
    const int64_t sinks = std::clamp<int64_t>(stop - start, 0, job->num_sinks);
    const int64_t from = std::clamp<int64_t>(stop - job->first_slot, 0, job->num_exact);
    for (int64_t q = 0; q < job->group * job->num_queries; ++q) {
      const int64_t place = unit * job->group * job->num_queries + q;
      const int64_t seen = job->num_exact - job->num_queries + 1 + q % job->num_queries;
      const Span spans[2] = {span_of(job->sink_keys, job->sink_values, row, head, 0, sinks),
                             span_of(job->keys, job->values, row, head, from, seen)};
      one_query(*job, job->query + place * job->dim, spans, scores.data(), job->out + place * job->dim, job->lse + place);
    }
  }
  return 0;
}
