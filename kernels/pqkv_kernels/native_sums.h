// Sums of coded values with the weights of N queries of one head.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "native_attention_job.h"
#include "native_codes.h"
#include "native_place.h"
#include "native_planes.h"

namespace {

template <int N>
class Sums {
 public:
  explicit Sums(const Job& job) : job_(job), d2_(job.planes) {}

  // Fill `out` [N][D2][2] with the sums of the place's values with `weights` [N][tokens], divided by `total` [N].
  void run(const Place& place, const float* weights, const float* total, float* out) {
    place_ = place, weights_ = weights;
    sums_.assign(N * d2_, V{});
    rows_.assign(N * d2_ * 2, 0.0f);
    clear_bins();
    for (int64_t start = 0; start < place.count; start += kBlockPages)
      collect(start, std::min<int64_t>(place.count - start, kBlockPages));
    add_bins();
    for (int n = 0; n < N; n++)
      for (int64_t i = 0; i < d2_; i++) {
        const float* lanes = (const float*)&sums_[i * N + n];
        float x = rows_[(n * d2_ + i) * 2], y = rows_[(n * d2_ + i) * 2 + 1];
        for (int k = 0; k < 16; k += 2) x += lanes[k], y += lanes[k + 1];
        out[(n * d2_ + i) * 2] = x / total[n];
        out[(n * d2_ + i) * 2 + 1] = y / total[n];
      }
  }

 private:
  void clear_bins() {
    int64_t bins = 0;
    for (int64_t g = 0; g < job_.values.num_groups; g++)
      if (const Group& group = job_.values.groups[g]; group.wide) bins += group.num_subspaces << group.nbits;
    bins_.assign(N * bins, 0.0f);
  }

  void collect(int64_t start, int64_t count) {
    doubled_.resize(count * N * kVectors);
    for (int64_t p = 0; p < count; p++)
      for (int n = 0; n < N; n++)
        for (int j = 0; j < kVectors; j++)
          doubled_[(p * N + n) * kVectors + j] = doubled(*(const Half*)(weights_of(n, start + p) + 8 * j));
    float* bins = bins_.data();
    for (int64_t g = 0; g < job_.values.num_groups; g++) {
      const Group& group = job_.values.groups[g];
      for (int64_t m = 0; m < group.num_subspaces; m += kTogether) {
        const int64_t together = std::min<int64_t>(kTogether, group.num_subspaces - m);
        for (int64_t p = 0; p < count; p++) collect_subspaces(group, m, together, start, p, bins);
        if (group.wide) bins += together * N << group.nbits;
      }
    }
  }

  const float* weights_of(int n, int64_t page) const { return weights_ + n * place_.tokens() + page * kTokens; }

  // Subspaces m.. of page `p` of the block that begins with page `start`; `bins` are those of subspace m, if it has any.
  void collect_subspaces(const Group& group, int64_t m, int64_t together, int64_t start, int64_t p, float* bins) {
    for (int64_t i = 0; i < together; i++) {
      unpack(place_.codes(job_, job_.values, group, start + p, m + i), group.nbits, index_[i]);
      if (group.wide) collect_rows(start + p, index_[i], bins + (i * N << group.nbits));
    }
    if (group.wide) return;
    if (together == kTogether) collect_planes<kTogether>(group, m, p);
    else collect_planes<1>(group, m, p);
  }

  template <int M>
  void collect_planes(const Group& group, int64_t m, int64_t p) {
    const V* weights = &doubled_[p * N * kVectors];
    for (int64_t k = 0; k < group.planes; k++) {
      const float* table[M];
      V *to[M], total[M][N];
      for (int i = 0; i < M; i++) {
        const int64_t local = (m + i) * group.planes + k;
        table[i] = place_.table(group, local), to[i] = &sums_[(group.first_plane + local) * N];
        for (int n = 0; n < N; n++) total[i][n] = to[i][n];
      }
      for (int j = 0; j < kVectors; j++)
        for (int i = 0; i < M; i++) {
          const V value = gather(table[i], index_[i] + 8 * j);
          for (int n = 0; n < N; n++) total[i][n] += value * weights[n * kVectors + j];
        }
      for (int i = 0; i < M; i++)
        for (int n = 0; n < N; n++) to[i][n] = total[i][n];
    }
  }

  // A code of many planes: weights are added up per entry, [entry][N].
  void collect_rows(int64_t page, const uint16_t* index, float* bins) {
    for (int t = 0; t < kTokens; t++)
      for (int n = 0; n < N; n++) bins[index[t] * N + n] += weights_of(n, page)[t];
  }

  // And every entry is read once.
  void add_bins() {
    const float* bins = bins_.data();
    for (int64_t g = 0; g < job_.values.num_groups; g++) {
      const Group& group = job_.values.groups[g];
      if (!group.wide) continue;
      const int64_t width = group.planes * 2, entries = (int64_t)1 << group.nbits;
      for (int64_t m = 0; m < group.num_subspaces; m++, bins += N * entries) {
        const float* table = place_.table(group, m * group.planes);
        for (int64_t i = 0; i < width; i += 16) {
          V total[N] = {};
          for (int64_t k = 0; k < entries; k++)
            for (int n = 0; n < N; n++) total[n] += loaded(table + k * width + i) * bins[k * N + n];
          for (int n = 0; n < N; n++) *(V*)&rows_[(n * d2_ + group.first_plane + m * group.planes) * 2 + i] += total[n];
        }
      }
    }
  }

  const Job& job_;
  const int64_t d2_;
  Place place_;
  const float* weights_;
  uint16_t index_[kTogether][kTokens];
  std::vector<float> bins_, rows_;
  std::vector<V> sums_, doubled_;
};

}  // namespace
