// Scores of coded keys: N queries of one head, page by page. Keys coded before rotary embedding are turned where TURN.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "attention_job.h"
#include "codes.h"
#include "lookup.h"
#include "place.h"
#include "vectors.h"

namespace {

// The rows of a subspace of many planes: first coordinates, then second ones, filled up with zeros to a multiple of sixteen.
struct Rows {
  const float* table;
  int64_t first_plane, planes;
};

template <int N, bool TURN>
class Scores {
 public:
  explicit Scores(const Job& job) : job_(job), d2_(job.planes) {}

  // Fill `scores` [pages of the place][N][64] for the queries [N][D2][2]; minus infinity outside the row's span.
  void run(const Place& place, const float* query, float* scores) {
    place_ = place, query_ = query, scores_ = scores;
    std::fill(scores, scores + N * place.tokens(), 0.0f);
    for (int64_t start = 0; start < place.count; start += kBlockPages)
      score(start, std::min<int64_t>(place.count - start, kBlockPages));
  }

 private:
  static constexpr int kRowsTogether = 2;  // that share what is loaded of the queries

  void score(int64_t start, int64_t count) {
    turn_queries(start, count);
    for (int64_t g = 0; g < job_.keys.num_groups; g++) {
      const Group& group = job_.keys.groups[g];
      for (int64_t m = 0; m < group.num_subspaces; m++)
        group.wide ? score_rows(group, m, start, count) : score_planes(group, m, start, count);
    }
    finish(start, count);
  }

  float* scores_of(int64_t page) { return scores_ + page * N * kTokens; }

  // The queries turned back by the base of every page of a block: [page][N][2][D2], and some more to be read and not used.
  void turn_queries(int64_t start, int64_t count) {
    turned_.resize(count * N * 2 * d2_ + 16);
    for (int64_t p = 0; p < count; p++) {
      const float* base = base_of(place_.first + start + p);
      for (int n = 0; n < N; n++) {
        const float* query = query_ + n * d2_ * 2;
        float* to = turned_.data() + (p * N + n) * 2 * d2_;
        for (int64_t i = 0; i < d2_; i++) {
          to[i] = query[2 * i] * base[i] + query[2 * i + 1] * base[d2_ + i];
          to[d2_ + i] = query[2 * i + 1] * base[i] - query[2 * i] * base[d2_ + i];
        }
      }
    }
  }

  // Cosines and sines of a page's first token, [2][D2].
  const float* base_of(int64_t page) {
    base_.assign(2 * d2_, 0.0f);
    const int64_t at = (place_.row * job_.base_row + page) * job_.num_pairs;
    for (int64_t i = 0; i < d2_; i++) {
      const int64_t pair = TURN ? job_.pair[place_.head * d2_ + i] : job_.num_pairs;
      const bool turns = pair < job_.num_pairs;
      base_[i] = turns ? job_.base_cos[at + pair] : 1;
      base_[d2_ + i] = turns ? job_.base_sin[at + pair] : 0;
    }
    return base_.data();
  }

  // Subspace m of a block of pages, plane by plane.
  void score_planes(const Group& group, int64_t m, int64_t start, int64_t count) {
    PageCodes codes[kBlockPages];
    place_.read(job_, job_.keys, group, start, count, m, codes);
    with_width(group.nbits, [&](auto width) {
      for (int64_t k = 0; k < group.planes; k++)
        score_plane<width>(place_.table(group, m, k), codes, group.first_plane + m * group.planes + k, start, count);
    });
  }

  // A function of its own, so that its loop has all registers.
  template <int BITS>
  __attribute__((noinline)) void score_plane(const void* table, const PageCodes* codes, int64_t plane, int64_t start, int64_t count) {
    for (int64_t p = 0; p < count; p += kPagesTogether) {
      Points keys[kPagesTogether];
      look_up<BITS>(table, codes + p, keys);
      for (int i = 0; i < kPagesTogether && p + i < count; i++) add_scores(keys[i], plane, start, p + i);
    }
  }

  void add_scores(const Points& keys, int64_t plane, int64_t start, int64_t p) {
    const int64_t at = (place_.head * d2_ + plane) * kTokens;
    const float *cos = job_.step_cos + at, *sin = job_.step_sin + at, *query = turned_.data() + p * N * 2 * d2_ + plane;
    float *to = scores_of(start + p), x[N], y[N];
    for (int n = 0; n < N; n++) x[n] = query[n * 2 * d2_], y[n] = query[(n * 2 + 1) * d2_];
    for (int j = 0; j < kTokens; j += kLanes) {
      const Point key = TURN ? turned(keys.at(j), cos + j, sin + j) : keys.at(j);
      for (int n = 0; n < N; n++) {
        float* score = to + n * kTokens + j;
        store(score, loaded(score) + key.x * x[n] + key.y * y[n]);
      }
    }
  }

  // `key` turned by the angles of these cosines and sines.
  static Point turned(Point key, const float* cos, const float* sin) {
    const Floats c = loaded(cos), s = loaded(sin);
    return {key.x * c - key.y * s, key.y * c + key.x * s};
  }

  // Subspace m of a block of pages where a code stands for many planes, row by row.
  void score_rows(const Group& group, int64_t m, int64_t start, int64_t count) {
    const Rows rows = {(const float*)place_.table(group, m), group.first_plane + m * group.planes, padded(group.planes)};
    uint16_t index[kTokens];
    for (int64_t p = 0; p < count; p++) {
      unpack(place_.codes(job_, job_.keys, group, start + p, m), group.nbits, index);
      for (int t = 0; t < kTokens; t += kLanes) score_rows(rows, index, start, p, t);
    }
  }

  void score_rows(const Rows& rows, const uint16_t* index, int64_t start, int64_t p, int first) {
    Floats total[N][kLanes];
    for (int t = 0; t < kLanes; t += kRowsTogether) {
      Floats sums[N][kRowsTogether] = {};
      add_rows(rows, index + first + t, first + t, p, sums);
      for (int n = 0; n < N; n++)
        for (int i = 0; i < kRowsTogether; i++) total[n][t + i] = sums[n][i];
    }
    for (int n = 0; n < N; n++) {
      float* to = scores_of(start + p) + n * kTokens + first;
      store(to, loaded(to) + sums_of(total[n]));
    }
  }

  // What sums up to the scores of a few keys, from token t of a page on.
  void add_rows(const Rows& rows, const uint16_t* index, int t, int64_t p, Floats (&sums)[N][kRowsTogether]) {
    const float* row[kRowsTogether];
    for (int i = 0; i < kRowsTogether; i++) row[i] = rows.table + index[i] * rows.planes * 2;
    const int64_t at = (place_.head * kTokens + t) * d2_ + rows.first_plane;
    const float *cos = job_.row_cos + at, *sin = job_.row_sin + at, *query = turned_.data() + p * N * 2 * d2_ + rows.first_plane;
    for (int64_t j = 0; j < rows.planes; j += kLanes) {
      Point key[kRowsTogether];
      for (int i = 0; i < kRowsTogether; i++) {
        key[i] = {loaded(row[i] + j), loaded(row[i] + rows.planes + j)};
        if (TURN) key[i] = turned(key[i], cos + i * d2_ + j, sin + i * d2_ + j);
      }
      for (int n = 0; n < N; n++) {
        const Floats x = loaded(query + n * 2 * d2_ + j), y = loaded(query + (n * 2 + 1) * d2_ + j);
        for (int i = 0; i < kRowsTogether; i++) sums[n][i] = sums[n][i] + key[i].x * x + key[i].y * y;
      }
    }
  }

  // Cap the scores of a block, and leave out what lies outside the row's span.
  void finish(int64_t start, int64_t count) {
    const int64_t* span = job_.spans + 2 * place_.row;
    for (int64_t page = start; page < start + count; page++) {
      const int64_t before = (place_.first + page) * kTokens;
      const int64_t first = std::clamp<int64_t>(span[0] - before, 0, kTokens), stop = std::clamp<int64_t>(span[1] - before, 0, kTokens);
      for (float* to = scores_of(page); to < scores_of(page + 1); to += kTokens) {
        if (job_.softcap > 0)
          for (int t = 0; t < kTokens; t++) to[t] = job_.softcap * std::tanh(to[t] / job_.softcap);
        std::fill(to, to + first, -std::numeric_limits<float>::infinity());
        std::fill(to + stop, to + kTokens, -std::numeric_limits<float>::infinity());
      }
    }
  }

  const Job& job_;
  const int64_t d2_;
  Place place_;
  const float* query_;
  float* scores_;
  Aligned turned_;
  std::vector<float> base_;
};

}  // namespace
