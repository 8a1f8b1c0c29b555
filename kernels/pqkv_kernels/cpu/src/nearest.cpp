// The nearest centroid of every point, for points of few channels, and the nearest few for points of any. See cpu/encode.py
// for what the arguments mean.

#include <cstdint>
#include <vector>

#include "cells.h"
#include "search.h"

namespace {

// points [n, D]; codes [n] get what `search`, a function of kBlock points, finds.
template <int D, typename Search>
void one_subspace(const float* points, int64_t n, int64_t* codes, Search search) {
  for (int64_t start = 0; start < n; start += kBlock) {
    const int64_t count = n - start < kBlock ? n - start : kBlock;
    Floats x[kVectors][D], best[kVectors];
    Ints index[kVectors];
    for (int v = 0; v < kVectors; ++v) {
      for (int lane = 0; lane < kLanes; ++lane) {
        const int64_t point = v * kLanes + lane;
        for (int i = 0; i < D; ++i) x[v][i][lane] = point < count ? points[(start + point) * D + i] : 0.0f;
      }
    }
    search(x, best, index);
    for (int64_t point = 0; point < count; ++point) codes[start + point] = index[point / kLanes][point % kLanes];
  }
}

// How many centroids pass at a time by points of many channels, so that a loaded channel serves several of them.
#ifdef __AVX512F__
constexpr int kTogether = 4;
#else
constexpr int kTogether = 2;
#endif

// Keep the N largest scores and their rows, from the largest; of equal ones the smaller row, if rows come in order.
template <int N>
inline void keep(Floats score, int64_t row, Floats (&best)[N], Ints (&index)[N]) {
  if (!any(score > best[N - 1])) return;
  Ints here = Ints{} + static_cast<int32_t>(row);
  for (int j = 0; j < N; ++j) {  // what is better moves in, what it displaces moves on
    const Ints better = score > best[j];
    const Floats old = best[j];
    const Ints place = index[j];
    best[j] = better ? score : old;
    index[j] = better ? here : place;
    score = better ? old : score;
    here = better ? place : here;
  }
}

// Scores of T neighbouring rows of `lines` for kBlock points, channel by channel in `x` [d, kBlock].
template <int N, int T>
inline void pass(const float* x, const float* lines, int64_t d, int64_t row, Floats (&best)[kVectors][N],
                 Ints (&index)[kVectors][N]) {
  const float* own = lines + row * (d + 1);
  Floats score[T][kVectors];
  for (int j = 0; j < T; ++j)
    for (int v = 0; v < kVectors; ++v) score[j][v] = own[j * (d + 1) + d] - Floats{};
  for (int64_t i = 0; i < d; ++i) {
    Floats point[kVectors];
    for (int v = 0; v < kVectors; ++v) point[v] = *reinterpret_cast<const Floats*>(x + i * kBlock + v * kLanes);
#pragma GCC unroll 4
    for (int j = 0; j < T; ++j) {
      const float line = own[j * (d + 1) + i];
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) score[j][v] += point[v] * line;
    }
  }
  for (int j = 0; j < T; ++j)
    for (int v = 0; v < kVectors; ++v) keep<N>(score[j][v], row + j, best[v], index[v]);
}

// points [count, d] of one subspace, at most kBlock; codes [N, n] get the rows of the N largest scores; x is scratch space.
template <int N>
void one_block(const float* points, const float* lines, int64_t count, int64_t k, int64_t d, float* x, int64_t n, int64_t* codes) {
  for (int64_t p = 0; p < kBlock; ++p)
    for (int64_t i = 0; i < d; ++i) x[i * kBlock + p] = p < count ? points[p * d + i] : 0.0f;
  Floats best[kVectors][N];
  Ints index[kVectors][N];
  for (int v = 0; v < kVectors; ++v)
    for (int j = 0; j < N; ++j) {
      best[v][j] = Floats{} + kLowest;
      index[v][j] = Ints{};
    }
  int64_t row = 0;
  for (; row + kTogether <= k; row += kTogether) pass<N, kTogether>(x, lines, d, row, best, index);
  for (; row < k; ++row) pass<N, 1>(x, lines, d, row, best, index);
  for (int j = 0; j < N; ++j)
    for (int64_t p = 0; p < count; ++p) codes[j * n + p] = index[p / kLanes][j][p % kLanes];
}

}  // namespace

struct Job {
  const float* points;  // [S, n, d]
  const float* lines;   // [S, k, d + 1]
  int64_t* codes;       // [S, few, n]
  int64_t n, k, d, few;
};

// Subspaces begin..end-1, the nearest one of each point; returns 1 where `d` is not known here.
extern "C" int pqkv_nearest(const Job* job, int64_t begin, int64_t end) {
  const int64_t n = job->n, k = job->k, d = job->d;
  Cells cells;
  for (int64_t s = begin; s < end; ++s) {
    const float* own = job->points + s * n * d;
    const float* lines = job->lines + s * k * (d + 1);
    int64_t* found = job->codes + s * n;
    const auto all = [&](auto& x, auto& best, auto& index) { largest(x, lines, k, best, index); };
    if (d == 2 && Cells::pay(k, n)) {
      cells.build(lines, k);
      one_subspace<2>(own, n, found, [&](auto&... block) { cells.largest(block...); });
      continue;
    }
    switch (d) {
      case 1: one_subspace<1>(own, n, found, all); break;
      case 2: one_subspace<2>(own, n, found, all); break;
      case 4: one_subspace<4>(own, n, found, all); break;
      case 8: one_subspace<8>(own, n, found, all); break;
      default: return 1;
    }
  }
  return 0;
}

// Blocks begin..end-1 of kBlock points, counted over all subspaces, of any channels; returns 1 where `few` is not known here.
extern "C" int pqkv_few(const Job* job, int64_t begin, int64_t end) {
  const int64_t n = job->n, k = job->k, d = job->d, blocks = (n + kBlock - 1) / kBlock;
  std::vector<float> x(d * kBlock);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t s = unit / blocks, start = unit % blocks * kBlock, count = n - start < kBlock ? n - start : kBlock;
    const float* points = job->points + (s * n + start) * d;
    const float* lines = job->lines + s * k * (d + 1);
    int64_t* codes = job->codes + s * job->few * n + start;
    switch (job->few) {
      case 1: one_block<1>(points, lines, count, k, d, x.data(), n, codes); break;
      case 2: one_block<2>(points, lines, count, k, d, x.data(), n, codes); break;
      case 3: one_block<3>(points, lines, count, k, d, x.data(), n, codes); break;
      case 4: one_block<4>(points, lines, count, k, d, x.data(), n, codes); break;
      default: return 1;
    }
  }
  return 0;
}

extern "C" int64_t pqkv_block() { return kBlock; }
