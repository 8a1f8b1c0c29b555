// Attention over codes on a CPU, for up to four queries at a time: the meaning of pqkv_kernels.attention.code_attention.
// A vector holds one plane (`native_planes.h`) per token where codes of few planes are looked up, one per plane where one code
// stands for eight planes or more. Knows addresses and numbers only; `native_attention.py` lays out the arguments.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "native_attention_job.h"
#include "native_codes.h"
#include "native_merge.h"
#include "native_planes.h"
#include "native_softmax.h"

namespace {

constexpr int kVectors = 8;      // vectors of eight planes or tokens per page
constexpr int kBlockPages = 8;   // pages that meet one table at a time: the table stays in the first-level cache
constexpr int kAhead = 256;      // bytes of codes fetched before they are needed
constexpr int kRowsAhead = 6;    // rows of a wide table, too

template <int N, bool TURN>
class Unit {
 public:
  explicit Unit(const Job& job) : job_(job), d2_(job.planes) {}

  void run(int64_t unit) {
    chunk_ = unit % job_.chunks;
    const int64_t rest = unit / job_.chunks;
    head_ = rest / job_.query_blocks % job_.heads;
    row_ = rest / job_.query_blocks / job_.heads;
    first_ = chunk_ * job_.chunk_pages;
    count_ = std::min(job_.chunk_pages, job_.num_pages - first_);
    query_ = job_.query + rest * N * d2_ * 2;
    out_ = job_.out + unit * N * d2_ * 2;
    lse_ = job_.lse + unit * N;
    attend();
  }

 private:
  void attend() {
    const int64_t tokens = count_ * kTokens;
    scores_.assign(N * tokens, 0.0f);
    for (int64_t start = 0; start < count_; start += kBlockPages) score(start, std::min<int64_t>(count_ - start, kBlockPages));
    float total[N];
    for (int n = 0; n < N; n++) total[n] = to_weights(scores_.data() + n * tokens, tokens, lse_ + n);
    sums_.assign(N * d2_, V{});
    out_sums_.assign(N * d2_ * 2, 0.0f);
    size_t bins = 0;
    for (int64_t g = 0; g < job_.values.num_groups; g++)
      if (job_.values.groups[g].wide) bins += job_.values.groups[g].num_subspaces << job_.values.groups[g].nbits;
    bins_.assign(N * bins, 0.0f);
    for (int64_t start = 0; start < count_; start += kBlockPages) collect(start, std::min<int64_t>(count_ - start, kBlockPages));
    add_bins();
    for (int n = 0; n < N; n++)
      for (int64_t i = 0; i < d2_; i++) {
        const float* lanes = (const float*)&sums_[i * N + n];
        float x = out_sums_[(n * d2_ + i) * 2], y = out_sums_[(n * d2_ + i) * 2 + 1];
        for (int k = 0; k < 16; k += 2) x += lanes[k], y += lanes[k + 1];
        out_[(n * d2_ + i) * 2] = x / total[n];
        out_[(n * d2_ + i) * 2 + 1] = y / total[n];
      }
  }

  const uint8_t* codes(const Side& side, const Group& group, int64_t page, int64_t subspace) const {
    const auto* bytes = (const uint8_t*)side.pages[row_ * job_.num_pages + first_ + page];
    bytes += head_ * side.page_bytes + group.byte_offset + subspace * 8 * group.nbits;
    __builtin_prefetch(bytes + kAhead);
    return bytes;
  }

  // The queries turned back by the base of every page of a block: [page][N][D2][2].
  void turn_queries(int64_t start, int64_t count) {
    turned_.resize(count * N * d2_ * 2);
    for (int64_t p = 0; p < count; p++) {
      const int64_t at = (row_ * job_.base_row + first_ + start + p) * job_.num_pairs;
      for (int n = 0; n < N; n++)
        for (int64_t i = 0; i < d2_; i++) {
          const float x = query_[(n * d2_ + i) * 2], y = query_[(n * d2_ + i) * 2 + 1];
          float* to = &turned_[((p * N + n) * d2_ + i) * 2];
          const int64_t pair = TURN ? job_.pair[head_ * d2_ + i] : job_.num_pairs;
          const bool turns = pair < job_.num_pairs;
          const float c = turns ? job_.base_cos[at + pair] : 1, s = turns ? job_.base_sin[at + pair] : 0;
          to[0] = x * c + y * s;
          to[1] = y * c - x * s;
        }
    }
  }

  void score(int64_t start, int64_t count) {
    turn_queries(start, count);
    const int64_t tokens = count_ * kTokens;
    pairs_.assign(count * N * kVectors, V{});
    for (int64_t g = 0; g < job_.keys.num_groups; g++) {
      const Group& group = job_.keys.groups[g];
      for (int64_t m = 0; m < group.num_subspaces; m++)
        for (int64_t p = 0; p < count; p++) {
          unpack(codes(job_.keys, group, start + p, m), group.nbits, index_);
          group.wide ? score_rows(group, m, p, start) : score_planes(group, m, p);
        }
    }
    for (int64_t p = 0; p < count; p++)
      for (int n = 0; n < N; n++) {
        const float* pair = (const float*)&pairs_[(p * N + n) * kVectors];
        float* to = &scores_[n * tokens + (start + p) * kTokens];
        for (int t = 0; t < kTokens; t++) to[t] += pair[2 * t] + pair[2 * t + 1];
      }
    const int64_t* span = job_.spans + 2 * row_;
    const int64_t before = (first_ + start) * kTokens, number = count * kTokens;
    const int64_t first = std::clamp<int64_t>(span[0] - before, 0, number), stop = std::clamp<int64_t>(span[1] - before, 0, number);
    for (int n = 0; n < N; n++) {
      float* to = &scores_[n * tokens + start * kTokens];
      if (job_.softcap > 0)
        for (int64_t t = 0; t < number; t++) to[t] = job_.softcap * std::tanh(to[t] / job_.softcap);
      std::fill(to, to + first, -std::numeric_limits<float>::infinity());
      std::fill(to + stop, to + number, -std::numeric_limits<float>::infinity());
    }
  }

  void score_planes(const Group& group, int64_t m, int64_t p) {
    V* to = &pairs_[p * N * kVectors];
    for (int64_t k = 0; k < group.planes; k++) {
      const int64_t local = m * group.planes + k, plane = group.first_plane + local;
      const float* table = (const float*)group.table + head_ * group.head_stride + (local << group.nbits) * 2;
      const float* query = &turned_[(p * N * d2_ + plane) * 2];
      V q[N];
      for (int n = 0; n < N; n++) q[n] = both(query[n * d2_ * 2], query[n * d2_ * 2 + 1]);
      const int64_t at = (head_ * d2_ + plane) * kTokens * 2;
      const float *real = job_.step_real + at, *imag = job_.step_imag + at;
      for (int j = 0; j < kVectors; j++) {
        V key = gather(table, index_ + 8 * j);
        if (TURN) key = key * loaded(real + 16 * j) + swapped(key) * loaded(imag + 16 * j);
        for (int n = 0; n < N; n++) to[n * kVectors + j] += key * q[n];
      }
    }
  }

  void score_rows(const Group& group, int64_t m, int64_t p, int64_t start) {
    const int64_t width = group.planes * 2, plane = group.first_plane + m * group.planes, tokens = count_ * kTokens;
    const float* table = (const float*)group.table + head_ * group.head_stride + (m << group.nbits) * width;
    const float* queries = &turned_[(p * N * d2_ + plane) * 2];
    const int64_t at = (head_ * kTokens * d2_ + plane) * 2, step = d2_ * 2;
    const float *real = job_.row_real + at, *imag = job_.row_imag + at;
    float* to = &scores_[(start + p) * kTokens];
    for (int t = 0; t < kTokens; t++, real += step, imag += step) {
      const float* row = table + index_[t] * width;
      if (t + kRowsAhead < kTokens)
        for (int64_t i = 0; i < width; i += 16) __builtin_prefetch(table + index_[t + kRowsAhead] * width + i);
      V total[N] = {};
      for (int64_t i = 0; i < width; i += 16) {
        V key = loaded(row + i);
        if (TURN) key = key * loaded(real + i) + swapped(key) * loaded(imag + i);
        for (int n = 0; n < N; n++) total[n] += key * loaded(queries + n * step + i);
      }
      for (int n = 0; n < N; n++) to[n * tokens + t] += sum(total[n]);
    }
  }

  void collect(int64_t start, int64_t count) {
    const int64_t tokens = count_ * kTokens;
    pairs_.resize(count * N * kVectors);
    for (int64_t p = 0; p < count; p++)
      for (int n = 0; n < N; n++)
        for (int j = 0; j < kVectors; j++)
          pairs_[(p * N + n) * kVectors + j] = doubled(*(const Half*)&scores_[n * tokens + (start + p) * kTokens + 8 * j]);
    float* bins = bins_.data();
    for (int64_t g = 0; g < job_.values.num_groups; g++) {
      const Group& group = job_.values.groups[g];
      for (int64_t m = 0; m < group.num_subspaces; m++) {
        for (int64_t p = 0; p < count; p++) {
          unpack(codes(job_.values, group, start + p, m), group.nbits, index_);
          if (!group.wide) collect_planes(group, m, p);
          for (int n = 0; n < (group.wide ? N : 0); n++)
            for (int t = 0; t < kTokens; t++)
              bins[(n << group.nbits) + index_[t]] += scores_[n * tokens + (start + p) * kTokens + t];
        }
        if (group.wide) bins += (int64_t)N << group.nbits;
      }
    }
  }

  void collect_planes(const Group& group, int64_t m, int64_t p) {
    for (int64_t k = 0; k < group.planes; k++) {
      const int64_t local = m * group.planes + k;
      const float* table = (const float*)group.table + head_ * group.head_stride + (local << group.nbits) * 2;
      V *to = &sums_[(group.first_plane + local) * N], total[N];
      for (int n = 0; n < N; n++) total[n] = to[n];
      for (int j = 0; j < kVectors; j++) {
        const V value = gather(table, index_ + 8 * j);
        for (int n = 0; n < N; n++) total[n] += value * pairs_[(p * N + n) * kVectors + j];
      }
      for (int n = 0; n < N; n++) to[n] = total[n];
    }
  }

  // A code of many planes: its weights were added up per entry, and every entry is read once.
  void add_bins() {
    const float* bins = bins_.data();
    for (int64_t g = 0; g < job_.values.num_groups; g++) {
      const Group& group = job_.values.groups[g];
      if (!group.wide) continue;
      const int64_t width = group.planes * 2;
      for (int64_t m = 0; m < group.num_subspaces; m++, bins += (int64_t)N << group.nbits) {
        const float* table = (const float*)group.table + head_ * group.head_stride + (m << group.nbits) * width;
        for (int n = 0; n < N; n++) {
          float* to = &out_sums_[(n * d2_ + group.first_plane + m * group.planes) * 2];
          for (int64_t k = 0; k < (int64_t)1 << group.nbits; k++)
            for (int64_t i = 0; i < width; i++) to[i] += bins[(n << group.nbits) + k] * table[k * width + i];
        }
      }
    }
  }

  const Job& job_;
  const int64_t d2_;
  int64_t chunk_, head_, row_, first_, count_;
  const float* query_;
  float *out_, *lse_;
  int32_t index_[kTokens];
  std::vector<float> scores_, turned_, bins_, out_sums_;
  std::vector<V> pairs_, sums_;
};

template <typename OfUnits>
int run(const Job& job, int64_t begin, int64_t end) {
  OfUnits unit(job);
  for (int64_t i = begin; i < end; i++) unit.run(i);
  return 0;
}

template <int N>
int run(const Job& job, int64_t begin, int64_t end) {
  return job.pair ? run<Unit<N, true>>(job, begin, end) : run<Unit<N, false>>(job, begin, end);
}

}  // namespace

extern "C" int pqkv_attend(const Job* job, int64_t begin, int64_t end) {
  if (job->block == 1) return run<1>(*job, begin, end);
  if (job->block == 2) return run<2>(*job, begin, end);
  if (job->block == 4) return run<4>(*job, begin, end);
  return 1;
}

// Query blocks begin..end-1, counted over all heads.
extern "C" int pqkv_merge(const Job* job, int64_t begin, int64_t end) {
  for (int64_t unit = begin; unit < end; unit++) merge(*job, unit);
  return 0;
}
