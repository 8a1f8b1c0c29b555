// Scores of coded keys: N queries of one head, page by page. Keys coded before rotary embedding are turned where TURN.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "native_attention_job.h"
#include "native_codes.h"
#include "native_place.h"
#include "native_planes.h"

namespace {

constexpr int kRowsAhead = 6;  // rows of a wide table fetched before they are needed

template <int N, bool TURN>
class Scores {
 public:
  explicit Scores(const Job& job) : job_(job), d2_(job.planes) {}

  // Fill `scores` [N][tokens of the place] for the queries [N][D2][2]; minus infinity outside the row's span.
  void run(const Place& place, const float* query, float* scores) {
    place_ = place, query_ = query, scores_ = scores;
    std::fill(scores, scores + N * place.tokens(), 0.0f);
    for (int64_t start = 0; start < place.count; start += kBlockPages)
      score(start, std::min<int64_t>(place.count - start, kBlockPages));
  }

 private:
  void score(int64_t start, int64_t count) {
    turn_queries(start, count);
    pairs_.assign(count * N * kVectors, V{});
    for (int64_t g = 0; g < job_.keys.num_groups; g++) {
      const Group& group = job_.keys.groups[g];
      for (int64_t m = 0; m < group.num_subspaces; m += kTogether)
        for (int64_t p = 0; p < count; p++) score_subspaces(group, m, start, p);
    }
    for (int64_t p = 0; p < count; p++)
      for (int n = 0; n < N; n++) {
        const float* pair = (const float*)&pairs_[(p * N + n) * kVectors];
        float* to = scores_of(n, start + p);
        for (int t = 0; t < kTokens; t++) to[t] += pair[2 * t] + pair[2 * t + 1];
      }
    finish(start, count);
  }

  float* scores_of(int n, int64_t page) { return scores_ + n * place_.tokens() + page * kTokens; }

  // The queries turned back by the base of every page of a block: [page][N][D2][2].
  void turn_queries(int64_t start, int64_t count) {
    turned_.resize(count * N * d2_ * 2);
    for (int64_t p = 0; p < count; p++) {
      const int64_t at = (place_.row * job_.base_row + place_.first + start + p) * job_.num_pairs;
      for (int n = 0; n < N; n++)
        for (int64_t i = 0; i < d2_; i++) {
          const float x = query_[(n * d2_ + i) * 2], y = query_[(n * d2_ + i) * 2 + 1];
          float* to = &turned_[((p * N + n) * d2_ + i) * 2];
          const int64_t pair = TURN ? job_.pair[place_.head * d2_ + i] : job_.num_pairs;
          const bool turns = pair < job_.num_pairs;
          const float c = turns ? job_.base_cos[at + pair] : 1, s = turns ? job_.base_sin[at + pair] : 0;
          to[0] = x * c + y * s;
          to[1] = y * c - x * s;
        }
    }
  }

  // Subspaces m.. of page `p` of the block that begins with page `start`.
  void score_subspaces(const Group& group, int64_t m, int64_t start, int64_t p) {
    const int64_t together = std::min<int64_t>(kTogether, group.num_subspaces - m);
    for (int64_t i = 0; i < together; i++) {
      unpack(place_.codes(job_, job_.keys, group, start + p, m + i), group.nbits, index_[i]);
      if (group.wide) score_rows(group, m + i, p, start, index_[i]);
    }
    if (group.wide) return;
    if (together == kTogether) score_planes<kTogether>(group, m, p);
    else score_planes<1>(group, m, p);
  }

  template <int M>
  void score_planes(const Group& group, int64_t m, int64_t p) {
    V* to = &pairs_[p * N * kVectors];
    for (int64_t k = 0; k < group.planes; k++) {
      const float *table[M], *real[M], *imag[M];
      V q[M][N];
      for (int i = 0; i < M; i++) {
        const int64_t local = (m + i) * group.planes + k, plane = group.first_plane + local;
        const int64_t at = (place_.head * d2_ + plane) * kTokens * 2;
        const float* query = &turned_[(p * N * d2_ + plane) * 2];
        table[i] = place_.table(group, local), real[i] = job_.step_real + at, imag[i] = job_.step_imag + at;
        for (int n = 0; n < N; n++) q[i][n] = both(query[n * d2_ * 2], query[n * d2_ * 2 + 1]);
      }
      for (int j = 0; j < kVectors; j++) {
        V total[N];
        for (int n = 0; n < N; n++) total[n] = to[n * kVectors + j];
        for (int i = 0; i < M; i++) {
          V key = gather(table[i], index_[i] + 8 * j);
          if (TURN) key = key * loaded(real[i] + 16 * j) + swapped(key) * loaded(imag[i] + 16 * j);
          for (int n = 0; n < N; n++) total[n] += key * q[i][n];
        }
        for (int n = 0; n < N; n++) to[n * kVectors + j] = total[n];
      }
    }
  }

  void score_rows(const Group& group, int64_t m, int64_t p, int64_t start, const uint16_t* index) {
    const int64_t width = group.planes * 2, plane = group.first_plane + m * group.planes;
    const float* table = place_.table(group, m * group.planes);
    const float* queries = &turned_[(p * N * d2_ + plane) * 2];
    const int64_t at = (place_.head * kTokens * d2_ + plane) * 2, step = d2_ * 2;
    const float *real = job_.row_real + at, *imag = job_.row_imag + at;
    for (int t = 0; t < kTokens; t++, real += step, imag += step) {
      const float* row = table + index[t] * width;
      if (t + kRowsAhead < kTokens)
        for (int64_t i = 0; i < width; i += 16) __builtin_prefetch(table + index[t + kRowsAhead] * width + i);
      V total[N] = {};
      for (int64_t i = 0; i < width; i += 16) {
        V key = loaded(row + i);
        if (TURN) key = key * loaded(real + i) + swapped(key) * loaded(imag + i);
        for (int n = 0; n < N; n++) total[n] += key * loaded(queries + n * step + i);
      }
      for (int n = 0; n < N; n++) scores_of(n, start + p)[t] += sum(total[n]);
    }
  }

  // Cap the scores of a block, and leave out what lies outside the row's span.
  void finish(int64_t start, int64_t count) {
    const int64_t* span = job_.spans + 2 * place_.row;
    const int64_t before = (place_.first + start) * kTokens, number = count * kTokens;
    const int64_t first = std::clamp<int64_t>(span[0] - before, 0, number), stop = std::clamp<int64_t>(span[1] - before, 0, number);
    for (int n = 0; n < N; n++) {
      float* to = scores_of(n, start);
      if (job_.softcap > 0)
        for (int64_t t = 0; t < number; t++) to[t] = job_.softcap * std::tanh(to[t] / job_.softcap);
      std::fill(to, to + first, -std::numeric_limits<float>::infinity());
      std::fill(to + stop, to + number, -std::numeric_limits<float>::infinity());
    }
  }

  const Job& job_;
  const int64_t d2_;
  Place place_;
  const float* query_;
  float* scores_;
  uint16_t index_[kTogether][kTokens];
  std::vector<float> turned_;
  std::vector<V> pairs_;
};

}  // namespace
