// Sums of coded values, or of keys as they were before rotation, with the weights of N queries of one head. Where codes are of
// few planes, vectors are looked up and added token by token. Where a code is of many, tokens of the same code have the same
// vector: their weights are added up first.

#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "attention_job.h"
#include "simd.h"

namespace {

template <int N>
class Sums {
 public:
  Sums(const AttentionJob& job, const Side& side) : job_(job), side_(side), d2_(job.planes) {}

  // Fill `out` [N][D2][2], whose rows lie job.width apart, with the sums of what the pages hold with `weights` [pages][N][64],
  // divided by `total` [N].
  void run(const PageRange& pages, const float* weights, const float* total, float* out) {
    pages_ = pages, weights_ = weights;
    sums_.assign(d2_ * N * 2, Floats{});
    rows_.assign(N * d2_ * 2, 0.0f);
    clear_bins();
    for (int64_t start = 0; start < pages.count; start += kBlockPages)
      collect(start, std::min<int64_t>(pages.count - start, kBlockPages));
    add_bins();
    for (int n = 0; n < N; n++)
      for (int64_t i = 0; i < d2_; i++)
        for (int c = 0; c < 2; c++) {
          out[n * job_.width + 2 * i + c] =
              (rows_[(n * d2_ + i) * 2 + c] + lane_sum(sums_[(i * N + n) * 2 + c])) / total[n];
        }
  }

 private:
  void clear_bins() {
    int64_t bins = 0;  // one for every code of every wide subspace
    for (int64_t g = 0; g < side_.num_groups; g++)
      if (const Group& group = side_.groups[g]; group.wide) bins += group.num_subspaces << group.nbits;
    bins_.assign(N * bins, 0.0f);
  }

  void collect(int64_t start, int64_t count) {
    float* bins = bins_.data();
    for (int64_t g = 0; g < side_.num_groups; g++) {
      const Group& group = side_.groups[g];
      for (int64_t m = 0; m < group.num_subspaces; m++) {
        if (!group.wide) {
          collect_planes(group, m, start, count);
          continue;
        }
        collect_rows(group, m, start, count, bins);
        bins += N << group.nbits;
      }
    }
  }

  const float* weights_of(int64_t page) const { return weights_ + page * N * kTokens; }

  // Subspace m of a block of pages, plane by plane.
  void collect_planes(const Group& group, int64_t m, int64_t start, int64_t count) {
    PageCodes codes[kBlockPages];
    pages_.read_codes(job_, side_, group, start, count, m, codes);
    with_width(group.nbits, [&](auto width) {
      for (int64_t k = 0; k < group.planes; k++)
        collect_plane<width>(pages_.table(group, m, k), codes, group.first_plane + m * group.planes + k, start, count);
    });
  }

  // A function of its own, so that its loop has all registers.
  template <int BITS>
  __attribute__((noinline)) void collect_plane(const void* table, const PageCodes* codes, int64_t plane, int64_t start,
                                               int64_t count) {
    Floats *to = &sums_[plane * N * 2], total[2 * N];
    for (int i = 0; i < 2 * N; i++) total[i] = to[i];
    for (int64_t p = 0; p < count; p += kPagesTogether) {
      Points values[kPagesTogether];
      look_up<BITS>(table, codes + p, values);
      for (int i = 0; i < kPagesTogether && p + i < count; i++) add(values[i], start + p + i, total);
    }
    for (int i = 0; i < 2 * N; i++) to[i] = total[i];
  }

  void add(const Points& values, int64_t page, Floats* total) {
    const float* weights = weights_of(page);
    for (int t = 0; t < kTokens; t += kLanes) {
      const Point value = values.at(t);
      for (int n = 0; n < N; n++) {
        const Floats weight = load(weights + n * kTokens + t);
        total[2 * n] += value.x * weight;
        total[2 * n + 1] += value.y * weight;
      }
    }
  }

  // Codes of many planes: add up the weights of every entry, `bins` [entries][N].
  void collect_rows(const Group& group, int64_t m, int64_t start, int64_t count, float* bins) {
    uint16_t index[kTokens];
    for (int64_t p = 0; p < count; p++) {
      unpack(pages_.code_bytes(job_, side_, group, start + p, m), group.nbits, index);
      const float* weights = weights_of(start + p);
      for (int t = 0; t < kTokens; t++)
        for (int n = 0; n < N; n++) bins[index[t] * N + n] += weights[n * kTokens + t];
    }
  }

  // And read every entry once.
  void add_bins() {
    const float* bins = bins_.data();
    for (int64_t g = 0; g < side_.num_groups; g++) {
      const Group& group = side_.groups[g];
      if (!group.wide) continue;
      for (int64_t m = 0; m < group.num_subspaces; m++, bins += N << group.nbits) add_bins(group, m, bins);
    }
  }

  // The sums of one wide subspace: first a whole row [2][planes] for every query, in vectors; then each number of it goes to
  // its plane's sum [D2][2]. Zeros that fill up rows are left behind.
  void add_bins(const Group& group, int64_t m, const float* bins) {
    const int64_t planes = padded(group.planes), entries = (int64_t)1 << group.nbits;
    const auto* table = (const float*)pages_.table(group, m);
    row_.assign(N * 2 * planes / kLanes, Floats{});
    for (int64_t k = 0; k < entries; k++)
      for (int64_t i = 0; i < 2 * planes / kLanes; i++) {
        const Floats entry = load(table + k * 2 * planes + kLanes * i);
        for (int n = 0; n < N; n++) row_[i * N + n] += entry * bins[k * N + n];
      }
    for (int n = 0; n < N; n++)
      for (int c = 0; c < 2; c++)
        for (int64_t j = 0; j < group.planes; j++) {
          const int64_t at = c * planes + j, plane = group.first_plane + m * group.planes + j;
          rows_[(n * d2_ + plane) * 2 + c] += row_[at / kLanes * N + n][at % kLanes];
        }
  }

  const AttentionJob& job_;
  const Side& side_;
  const int64_t d2_;
  PageRange pages_;
  const float* weights_;
  std::vector<float> bins_;   // weights of entries of wide subspaces, one subspace after the other
  std::vector<float> rows_;   // [N][D2][2]: the sums of wide groups
  std::vector<Floats> sums_;  // [D2][N][2]: the sums of the other groups, still spread over lanes
  std::vector<Floats> row_;   // a row of add_bins, [2 * planes / kLanes][N]
};

}  // namespace
