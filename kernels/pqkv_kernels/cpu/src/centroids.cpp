// What a step of k-means needs of every point and its centroid. See centroid_sums.py for what the arguments mean.

#include <cstdint>

struct Job {
  const float* points;     // [S, n, d]
  const float* weights;    // [S, n]
  const float* centroids;  // [S, k, d]
  const int64_t* codes;    // [S, n]
  double* sums;            // [S, k, d + 1], zeros
  float* errors;           // [S, n]
  int64_t n, k, d;
};

namespace {

// D channels where that is known when this is compiled, else `d` of them.
template <int D>
void one_subspace(const Job& job, int64_t s) {
  const int64_t n = job.n, d = D ? D : job.d;
  const float* points = job.points + s * n * d;
  const float* weights = job.weights + s * n;
  const float* centroids = job.centroids + s * job.k * d;
  const int64_t* codes = job.codes + s * n;
  double* sums = job.sums + s * job.k * (d + 1);
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
extern "C" int pqkv_centroid_sums(const Job* job, int64_t begin, int64_t end) {
  for (int64_t s = begin; s < end; ++s) {
    switch (job->d) {
      case 1: one_subspace<1>(*job, s); break;
      case 2: one_subspace<2>(*job, s); break;
      case 4: one_subspace<4>(*job, s); break;
      case 8: one_subspace<8>(*job, s); break;
      default: one_subspace<0>(*job, s);
    }
  }
  return 0;
}
