// Vectors to code space: un-rotate, map and permute in one pass. See cpu/encode.py for what the arguments mean.

#include <cstdint>

struct Job {
  const float* x;       // a channel is one float after the other, rows lie stride_* floats apart
  const int32_t* places;  // [heads, 3, dim]: a channel, its partner, their rotary pair
  const float* factors;   // [heads, 3, dim]: sign of the partner's sine, the channel's factor, the partner's
  const float* cos;       // [batch or 1, tokens, pairs], or null: vectors that are not rotated
  const float* sin;
  float* out;  // [batch, heads, tokens, dim]
  int64_t heads, tokens, dim, pairs, angle_stride, stride_b, stride_h, stride_t;
};

// Tokens begin..end-1, counted over all rows.
extern "C" int pqkv_points(const Job* job, int64_t begin, int64_t end) {
  const int64_t dim = job->dim, pairs = job->pairs;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / job->tokens, t = unit % job->tokens, b = row / job->heads, h = row % job->heads;
    const float* x = job->x + b * job->stride_b + h * job->stride_h + t * job->stride_t;
    const int32_t *own = job->places + h * 3 * dim, *partner = own + dim, *pair = partner + dim;
    const float *sign = job->factors + h * 3 * dim, *factor = sign + dim, *other_factor = factor + dim;
    float* out = job->out + unit * dim;
    if (!job->cos) {
      for (int64_t j = 0; j < dim; ++j) out[j] = x[own[j]] * factor[j] + x[partner[j]] * other_factor[j];
      continue;
    }
    const float* cos = job->cos + b * job->angle_stride + t * pairs;
    const float* sin = job->sin + b * job->angle_stride + t * pairs;
    for (int64_t j = 0; j < dim; ++j) {
      const bool turned = pair[j] < pairs;
      const float c = turned ? cos[pair[j]] : 1.0f, s = turned ? sin[pair[j]] * sign[j] : 0.0f;
      const float a = x[own[j]], p = x[partner[j]];
      out[j] = (a * c + p * s) * factor[j] + (p * c - a * s) * other_factor[j];
    }
  }
  return 0;
}
