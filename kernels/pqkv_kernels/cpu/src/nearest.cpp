// The nearest centroid of every point, for points of few channels, and the nearest few for points of any. `cpu/encode.py` lays
// out the arguments.

#include <cstdint>
#include <vector>

#include "constants.h"
#include "search.h"

// S subspaces of n points and k centroids of d channels.
struct NearestJob {
  const float* points;     // [S, n, d]
  const float* augmented;  // [S, k, d + 1]: centroids, see search.h
  int64_t* codes;          // [S, top_k, n]: numbers of the nearest centroids, the nearest first
  int64_t num_points, num_centroids, dim, top_k;
};

namespace {

constexpr int kShortDims[] = {1, 2, 4, 8};  // so many channels of a block of points stay in registers
constexpr int kTopK[] = {1, 2, 3, 4};       // so many of the nearest centroids of a block of points stay in registers

// points [n, D]; codes [n] get what `search`, a function of kBlockPoints points, chooses. A function of its own, so that its
// loop has all registers.
template <int D, typename Search>
__attribute__((noinline)) void one_subspace(const float* points, int64_t n, int64_t* codes, Search search) {
  for (int64_t start = 0; start < n; start += kBlockPoints) {
    const int64_t count = n - start < kBlockPoints ? n - start : kBlockPoints;
    Floats x[kBlockVectors][D], best[kBlockVectors];
    Ints index[kBlockVectors];
    for (int v = 0; v < kBlockVectors; ++v) {
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

// Keep the K largest scores and their rows, from the largest; of equal ones the smaller row, if rows come in order.
template <int K>
inline void keep(Floats score, int64_t row, Floats (&best)[K], Ints (&index)[K]) {
  if (!any(score > best[K - 1])) return;
  Ints here = Ints{} + static_cast<int32_t>(row);
  for (int j = 0; j < K; ++j) {  // what is better moves in, what it displaces moves on
    const Ints better = score > best[j];
    const Floats old_score = best[j];
    const Ints old_row = index[j];
    best[j] = better ? score : old_score;
    index[j] = better ? here : old_row;
    score = better ? old_score : score;
    here = better ? old_row : here;
  }
}

// Scores of T neighbouring rows of `augmented` for kBlockPoints points, channel by channel in `x` [d, kBlockPoints].
template <int K, int T>
inline void pass(const float* x, const float* augmented, int64_t d, int64_t row, Floats (&best)[kBlockVectors][K],
                 Ints (&index)[kBlockVectors][K]) {
  const float* centroids = augmented + row * (d + 1);
  Floats score[T][kBlockVectors];
  for (int j = 0; j < T; ++j)
    for (int v = 0; v < kBlockVectors; ++v) score[j][v] = centroids[j * (d + 1) + d] - Floats{};  // as in search.h
  for (int64_t i = 0; i < d; ++i) {
    Floats point[kBlockVectors];
    for (int v = 0; v < kBlockVectors; ++v) point[v] = load(x + i * kBlockPoints + v * kLanes);
#pragma GCC unroll 4
    for (int j = 0; j < T; ++j) {
      const float channel = centroids[j * (d + 1) + i];
#pragma GCC unroll 4
      for (int v = 0; v < kBlockVectors; ++v) score[j][v] += point[v] * channel;
    }
  }
  for (int j = 0; j < T; ++j)
    for (int v = 0; v < kBlockVectors; ++v) keep<K>(score[j][v], row + j, best[v], index[v]);
}

// points [count, d] of one subspace, at most kBlockPoints; codes [K, n] get the rows of the K largest scores; `x` is scratch
// space.
template <int K>
__attribute__((noinline)) void one_block(const float* points, const float* augmented, int64_t count, int64_t k, int64_t d,
                                         float* x, int64_t n, int64_t* codes) {
  for (int64_t p = 0; p < kBlockPoints; ++p)
    for (int64_t i = 0; i < d; ++i) x[i * kBlockPoints + p] = p < count ? points[p * d + i] : 0.0f;
  Floats best[kBlockVectors][K];
  Ints index[kBlockVectors][K];
  for (int v = 0; v < kBlockVectors; ++v)
    for (int j = 0; j < K; ++j) {
      best[v][j] = Floats{} + kLowest;
      index[v][j] = Ints{};
    }
  int64_t row = 0;
  for (; row + kTogether <= k; row += kTogether) pass<K, kTogether>(x, augmented, d, row, best, index);
  for (; row < k; ++row) pass<K, 1>(x, augmented, d, row, best, index);
  for (int j = 0; j < K; ++j)
    for (int64_t p = 0; p < count; ++p) codes[j * n + p] = index[p / kLanes][j][p % kLanes];
}

}  // namespace

// Subspaces begin..end-1, the nearest one of each point; returns 1 where the channels are none of kShortDims.
extern "C" int pqkv_nearest(const NearestJob* job, int64_t begin, int64_t end) {
  const int64_t n = job->num_points, k = job->num_centroids, d = job->dim;
  Cells cells;
  for (int64_t s = begin; s < end; ++s) {
    const float* points = job->points + s * n * d;
    const float* augmented = job->augmented + s * k * (d + 1);
    int64_t* codes = job->codes + s * n;
    if (d == 2 && Cells::pay(k, n)) {
      cells.build(augmented, k);
      one_subspace<2>(points, n, codes, [&](auto&... block) { cells.largest(block...); });
      continue;
    }
    const auto all = [&](auto& x, auto& best, auto& index) { largest(x, augmented, k, best, index); };
    if (!with_constant<kShortDims>(d, [&](auto dim) { one_subspace<dim>(points, n, codes, all); })) return 1;
  }
  return 0;
}

// Blocks begin..end-1 of kBlockPoints points, counted over all subspaces, the nearest `top_k` of each, for any number of
// channels; returns 1 where `top_k` is none of kTopK.
extern "C" int pqkv_top_k(const NearestJob* job, int64_t begin, int64_t end) {
  const int64_t n = job->num_points, k = job->num_centroids, d = job->dim, blocks = (n + kBlockPoints - 1) / kBlockPoints;
  std::vector<float> x(d * kBlockPoints);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t s = unit / blocks, start = unit % blocks * kBlockPoints;
    const int64_t count = n - start < kBlockPoints ? n - start : kBlockPoints;
    const float* points = job->points + (s * n + start) * d;
    const float* augmented = job->augmented + s * k * (d + 1);
    int64_t* codes = job->codes + s * job->top_k * n + start;
    const auto block = [&](auto top_k) { one_block<top_k>(points, augmented, count, k, d, x.data(), n, codes); };
    if (!with_constant<kTopK>(job->top_k, block)) return 1;
  }
  return 0;
}

// Points of one block, which depend on the machine.
extern "C" int64_t pqkv_block() { return kBlockPoints; }
