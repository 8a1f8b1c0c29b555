// The nearest centroid of every point, for short points, and the few largest of scores made elsewhere. See native_nearest.py
// for what the arguments mean.

#include <cstdint>
#include <cstring>
#include <limits>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "native_search.h"

namespace {

// points [n, D], lines [k, D + 1]: twice a centroid and minus its square; codes [n] get the first largest score.
template <int D>
void one_subspace(const float* points, const float* lines, int64_t n, int64_t k, int64_t* codes) {
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
    largest<D>(x, lines, k, best, index);
    for (int64_t point = 0; point < count; ++point) codes[start + point] = index[point / kLanes][point % kLanes];
  }
}

// Whether any lane is set.
inline bool any(Ints mask) {
#ifdef __AVX512F__
  return _mm512_test_epi32_mask(reinterpret_cast<__m512i>(mask), reinterpret_cast<__m512i>(mask)) != 0;
#elif defined(__AVX2__)
  return _mm256_movemask_epi8(reinterpret_cast<__m256i>(mask)) != 0;
#else
  int32_t found = 0;
  for (int lane = 0; lane < kLanes; ++lane) found |= mask[lane];
  return found != 0;
#endif
}

// scores [k, n]: codes [N, n] get the rows of the N largest scores of each column, from the largest; ties to the smaller row.
// Two vectors of columns at a time: rows lie far apart, so more of each line that a cache fetches is used.
template <int N>
void one_row(const float* scores, int64_t* codes, int64_t k, int64_t n) {
  constexpr int kWide = 2;
  for (int64_t start = 0; start < n; start += kWide * kLanes) {
    const int64_t count = n - start < kWide * kLanes ? n - start : kWide * kLanes;
    Floats best[kWide][N];
    Ints index[kWide][N];
    for (int v = 0; v < kWide; ++v)
      for (int j = 0; j < N; ++j) {
        best[v][j] = Floats{} + std::numeric_limits<float>::lowest();
        index[v][j] = Ints{};
      }
    for (int64_t c = 0; c < k; ++c) {
      Floats row[kWide];
      if (count == kWide * kLanes) {
        std::memcpy(row, scores + c * n + start, sizeof(row));
      } else {
        for (int v = 0; v < kWide; ++v) row[v] = Floats{} + std::numeric_limits<float>::lowest();
        std::memcpy(row, scores + c * n + start, count * sizeof(float));
      }
      for (int v = 0; v < kWide; ++v) {
        if (!any(row[v] > best[v][N - 1])) continue;
        Floats score = row[v];
        Ints here = Ints{} + static_cast<int32_t>(c);
        for (int j = 0; j < N; ++j) {  // what is better moves in, what it displaces moves on
          const Ints better = score > best[v][j];
          const Floats old = best[v][j];
          const Ints place = index[v][j];
          best[v][j] = better ? score : old;
          index[v][j] = better ? here : place;
          score = better ? old : score;
          here = better ? place : here;
        }
      }
    }
    for (int j = 0; j < N; ++j)
      for (int64_t point = 0; point < count; ++point)
        codes[j * n + start + point] = index[point / kLanes][j][point % kLanes];
  }
}

}  // namespace

// scores [rows, k, n], codes [rows, count, n]; returns 1 where `count` is not known here.
extern "C" int pqkv_few(const float* scores, int64_t* codes, int64_t rows, int64_t k, int64_t n, int64_t count) {
  for (int64_t row = 0; row < rows; ++row) {
    const float* own = scores + row * k * n;
    int64_t* found = codes + row * count * n;
    switch (count) {
      case 1: one_row<1>(own, found, k, n); break;
      case 2: one_row<2>(own, found, k, n); break;
      case 3: one_row<3>(own, found, k, n); break;
      case 4: one_row<4>(own, found, k, n); break;
      default: return 1;
    }
  }
  return 0;
}

// Subspaces begin..end-1 of points [S, n, d], lines [S, k, d + 1] and codes [S, n]; returns 1 where `d` is not known here.
extern "C" int pqkv_nearest(const float* points, const float* lines, int64_t* codes, int64_t n, int64_t k, int64_t d,
                            int64_t begin, int64_t end) {
  for (int64_t s = begin; s < end; ++s) {
    const float* own = points + s * n * d;
    const float* scored = lines + s * k * (d + 1);
    int64_t* found = codes + s * n;
    switch (d) {
      case 1: one_subspace<1>(own, scored, n, k, found); break;
      case 2: one_subspace<2>(own, scored, n, k, found); break;
      case 4: one_subspace<4>(own, scored, n, k, found); break;
      case 8: one_subspace<8>(own, scored, n, k, found); break;
      default: return 1;
    }
  }
  return 0;
}
