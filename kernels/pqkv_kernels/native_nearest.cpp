// The nearest centroid of every point, for short points. See native_nearest.py for what the arguments mean.
//
// 64 points of one subspace stay in vector registers while all centroids pass by: a score is a few fused multiply-adds, and
// the best so far and its index are kept by selection, so nothing but centroids is read in the inner loop.

#include <cstdint>
#include <limits>

namespace {

#ifdef __AVX512F__
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
constexpr int kVectors = 4;
constexpr int64_t kBlock = kLanes * kVectors;

typedef float Floats __attribute__((vector_size(4 * kLanes)));
typedef int32_t Ints __attribute__((vector_size(4 * kLanes)));

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
      best[v] = Floats{} + std::numeric_limits<float>::lowest();
      index[v] = Ints{};
    }
    for (int64_t c = 0; c < k; ++c) {
      const float* line = lines + c * (D + 1);
      const Ints here = Ints{} + static_cast<int32_t>(c);
#pragma GCC unroll 4
      for (int v = 0; v < kVectors; ++v) {
        Floats score = Floats{} + line[D];
        for (int i = 0; i < D; ++i) score += x[v][i] * line[i];
        const Ints better = score > best[v];
        best[v] = better ? score : best[v];
        index[v] = better ? here : index[v];
      }
    }
    for (int64_t point = 0; point < count; ++point) codes[start + point] = index[point / kLanes][point % kLanes];
  }
}

}  // namespace

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
