// Scores of coded keys: N queries of one head, page by page. With ROTATE keys were coded before rotary embedding, and their
// scores are those of the rotated keys: the queries are rotated back by the angles of a page's first token, and keys are
// rotated by the angles from there on, which are the same for all pages.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "attention_job.h"
#include "simd.h"

namespace {

// The table of a subspace of many planes, [entries][2][planes]: a row has the first coordinates of all planes, then the second
// ones. `planes` are filled up with zeros to a multiple of kRowMultiple.
struct Rows {
  const float* table;
  int64_t first_plane, planes;
};

template <int N, bool ROTATE>
class Scores {
 public:
  explicit Scores(const AttentionJob& job) : job_(job), d2_(job.planes) {}

  // Fill `scores` [pages][N][64] for the queries [N][D2][2]; minus infinity outside the row's span.
  void run(const PageRange& pages, const float* query, float* scores) {
    pages_ = pages, query_ = query, scores_ = scores;
    std::fill(scores, scores + N * pages.tokens(), 0.0f);
    for (int64_t start = 0; start < pages.count; start += kBlockPages)
      score(start, std::min<int64_t>(pages.count - start, kBlockPages));
  }

 private:
  static constexpr int kRowsTogether = 2;  // that share what is loaded of the queries

  void score(int64_t start, int64_t count) {
    unrotate_queries(start, count);
    for (int64_t g = 0; g < job_.keys.num_groups; g++) {
      const Group& group = job_.keys.groups[g];
      for (int64_t m = 0; m < group.num_subspaces; m++)
        group.wide ? score_rows(group, m, start, count) : score_planes(group, m, start, count);
    }
    finish(start, count);
  }

  float* scores_of(int64_t page) { return scores_ + page * N * kTokens; }

  // The queries rotated back by the base of every page of a block: [page][N][2][D2]. Rows of a wide table are filled up, so
  // that up to kRowMultiple - 1 numbers behind the last query are read, and multiplied by zeros.
  void unrotate_queries(int64_t start, int64_t count) {
    page_queries_.resize(count * N * 2 * d2_ + kRowMultiple);
    for (int64_t p = 0; p < count; p++) {
      const float* base = base_of(pages_.first + start + p);
      for (int n = 0; n < N; n++) {
        const float* query = query_ + n * d2_ * 2;
        float* to = page_queries_.data() + (p * N + n) * 2 * d2_;
        for (int64_t i = 0; i < d2_; i++) {  // the product with the conjugate of cos + i sin
          to[i] = query[2 * i] * base[i] + query[2 * i + 1] * base[d2_ + i];
          to[d2_ + i] = query[2 * i + 1] * base[i] - query[2 * i] * base[d2_ + i];
        }
      }
    }
  }

  // Cosines and sines of a page's first token, [2][D2]; those of no rotation for planes that are not rotated.
  const float* base_of(int64_t page) {
    base_.assign(2 * d2_, 0.0f);
    const int64_t at = (pages_.row * job_.base_row + page) * job_.num_pairs;
    for (int64_t i = 0; i < d2_; i++) {
      const int64_t pair = ROTATE ? job_.pair[pages_.head * d2_ + i] : job_.num_pairs;
      const bool is_rotated = pair < job_.num_pairs;
      base_[i] = is_rotated ? job_.base_cos[at + pair] : 1;
      base_[d2_ + i] = is_rotated ? job_.base_sin[at + pair] : 0;
    }
    return base_.data();
  }

  // Subspace m of a block of pages, plane by plane.
  void score_planes(const Group& group, int64_t m, int64_t start, int64_t count) {
    PageCodes codes[kBlockPages];
    pages_.read_codes(job_, job_.keys, group, start, count, m, codes);
    with_width(group.nbits, [&](auto width) {
      for (int64_t k = 0; k < group.planes; k++)
        score_plane<width>(pages_.table(group, m, k), codes, group.first_plane + m * group.planes + k, start, count);
    });
  }

  // A function of its own, so that its loop has all registers.
  template <int BITS>
  __attribute__((noinline)) void score_plane(const void* table, const PageCodes* codes, int64_t plane, int64_t start,
                                             int64_t count) {
    for (int64_t p = 0; p < count; p += kPagesTogether) {
      Points keys[kPagesTogether];
      look_up<BITS>(table, codes + p, keys);
      for (int i = 0; i < kPagesTogether && p + i < count; i++) add_scores(keys[i], plane, start, p + i);
    }
  }

  // Add to the scores of page `start + p` what one plane gives: the product of keys and queries, as points of the plane.
  void add_scores(const Points& keys, int64_t plane, int64_t start, int64_t p) {
    const int64_t at = (pages_.head * d2_ + plane) * kTokens;
    const float *cos = job_.step_cos + at, *sin = job_.step_sin + at;
    const float* query = page_queries_.data() + p * N * 2 * d2_ + plane;
    float *to = scores_of(start + p), x[N], y[N];
    for (int n = 0; n < N; n++) x[n] = query[n * 2 * d2_], y[n] = query[(n * 2 + 1) * d2_];
    for (int j = 0; j < kTokens; j += kLanes) {
      const Point key = ROTATE ? rotated(keys.at(j), cos + j, sin + j) : keys.at(j);
      for (int n = 0; n < N; n++) {
        float* score = to + n * kTokens + j;
        store(score, load(score) + key.x * x[n] + key.y * y[n]);
      }
    }
  }

  // `key` rotated by the angles of these cosines and sines.
  static Point rotated(Point key, const float* cos, const float* sin) {
    const Floats c = load(cos), s = load(sin);
    return {key.x * c - key.y * s, key.y * c + key.x * s};
  }

  // Subspace m of a block of pages where a code stands for many planes, row by row.
  void score_rows(const Group& group, int64_t m, int64_t start, int64_t count) {
    const Rows rows = {(const float*)pages_.table(group, m), group.first_plane + m * group.planes, padded(group.planes)};
    uint16_t index[kTokens];
    for (int64_t p = 0; p < count; p++) {
      unpack(pages_.code_bytes(job_, job_.keys, group, start + p, m), group.nbits, index);
      for (int t = 0; t < kTokens; t += kLanes) score_rows(rows, index, start, p, t);
    }
  }

  // The scores of kLanes tokens from `first` on: each is a sum over lanes, and these are taken together at the end.
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
      store(to, load(to) + lane_sums(total[n]));
    }
  }

  // For kRowsTogether keys from token `t` of a page on: vectors whose sums over lanes are their scores.
  void add_rows(const Rows& rows, const uint16_t* index, int t, int64_t p, Floats (&sums)[N][kRowsTogether]) {
    const float* row[kRowsTogether];
    for (int i = 0; i < kRowsTogether; i++) row[i] = rows.table + index[i] * rows.planes * 2;
    const int64_t at = (pages_.head * kTokens + t) * d2_ + rows.first_plane;
    const float *cos = job_.row_cos + at, *sin = job_.row_sin + at;
    const float* query = page_queries_.data() + p * N * 2 * d2_ + rows.first_plane;
    for (int64_t j = 0; j < rows.planes; j += kLanes) {
      Point key[kRowsTogether];
      for (int i = 0; i < kRowsTogether; i++) {
        key[i] = {load(row[i] + j), load(row[i] + rows.planes + j)};
        if (ROTATE) key[i] = rotated(key[i], cos + i * d2_ + j, sin + i * d2_ + j);
      }
      for (int n = 0; n < N; n++) {
        const Floats x = load(query + n * 2 * d2_ + j), y = load(query + (n * 2 + 1) * d2_ + j);
        for (int i = 0; i < kRowsTogether; i++) sums[n][i] = sums[n][i] + key[i].x * x + key[i].y * y;
      }
    }
  }

  // Cap the scores of a block, and leave out what lies outside the row's span.
  void finish(int64_t start, int64_t count) {
    const int64_t* span = job_.spans + 2 * pages_.row;
    for (int64_t page = start; page < start + count; page++) {
      const int64_t before = (pages_.first + page) * kTokens;
      const int64_t first = std::clamp<int64_t>(span[0] - before, 0, kTokens);
      const int64_t stop = std::clamp<int64_t>(span[1] - before, 0, kTokens);
      for (float* to = scores_of(page); to < scores_of(page + 1); to += kTokens) {
        if (job_.softcap > 0)
          for (int t = 0; t < kTokens; t++) to[t] = job_.softcap * std::tanh(to[t] / job_.softcap);
        std::fill(to, to + first, -std::numeric_limits<float>::infinity());
        std::fill(to + stop, to + kTokens, -std::numeric_limits<float>::infinity());
      }
    }
  }

  const AttentionJob& job_;
  const int64_t d2_;
  PageRange pages_;
  const float* query_;  // of the range's head: [N][D2][2]
  float* scores_;
  AlignedFloats page_queries_;
  std::vector<float> base_;
};

}  // namespace
