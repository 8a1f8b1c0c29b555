// What a step of k-means needs of every point and its centroid. `cpu/centroid_sums.py` lays out the arguments.

#include <cstdint>

#include "constants.h"

// S subspaces of n points and k centroids of d channels.
struct CentroidJob {
  const float* points;     // [S, n, d]
  const float* weights;    // [S, n]
  const float* centroids;  // [S, k, d]
  const int64_t* codes;    // [S, n]: every point's centroid
  double* sums;            // [S, k, d + 1]: the weighted points of a centroid, then their weights; zeros before
  float* errors;           // [S, n]: weight times squared distance
  int64_t num_points, num_centroids, dim;
};

namespace {

constexpr int kShortDims[] = {1, 2, 4, 8};

// D channels, or as many as the job says where D is 0.
template <int D>
void one_subspace(const CentroidJob& job, int64_t s) {
  const int64_t n = job.num_points, k = job.num_centroids, d = D ? D : job.dim;
  const float* points = job.points + s * n * d;
  const float* weights = job.weights + s * n;
  const float* centroids = job.centroids + s * k * d;
  const int64_t* codes = job.codes + s * n;
  double* sums = job.sums + s * k * (d + 1);
  float* errors = job.errors + s * n;
  for (int64_t p = 0; p < n; ++p) {
    const float* x = points + p * d;
    const float* centroid = centroids + codes[p] * d;
    double* sum = sums + codes[p] * (d + 1);
    const float weight = weights[p];
    float error = 0;
    for (int64_t i = 0; i < d; ++i) {
      const float apart = x[i] - centroid[i];
      error += apart * apart;
      sum[i] += double(weight) * x[i];
    }
    sum[d] += weight;
    errors[p] = weight * error;
  }
}

}  // namespace

// Subspaces begin..end-1.
extern "C" int pqkv_centroid_sums(const CentroidJob* job, int64_t begin, int64_t end) {
  for (int64_t s = begin; s < end; ++s)
    if (!with_constant<kShortDims>(job->dim, [&](auto dim) { one_subspace<dim>(*job, s); })) one_subspace<0>(*job, s);
  return 0;
}
