// Vectors to code space: un-rotate, map and permute in one pass. `cpu/encode.py` lays out the arguments.

#include <cstdint>

struct PointsJob {
  const float* x;           // [batch, heads, tokens, dim]: channels lie one after the other, tokens stride_t floats apart
  const int32_t* channels;  // [heads, 3, dim]: a channel, its partner, their rotary pair (or `pairs`: none)
  const float* factors;     // [heads, 3, dim]: sign of the partner's sine, the channel's factor, the partner's
  const float* cos;         // [batch or 1, tokens, pairs]; null: vectors are not rotated
  const float* sin;
  float* out;  // [batch, heads, tokens, dim]
  int64_t heads, tokens, dim, pairs;
  int64_t angle_stride;                  // floats of `cos` from one row of the batch to the next; 0: all have the same angles
  int64_t stride_b, stride_h, stride_t;  // floats of `x` from row to row, head to head, token to token
};

// Tokens begin..end-1, counted over all heads of all rows.
extern "C" int pqkv_points(const PointsJob* job, int64_t begin, int64_t end) {
  const int64_t dim = job->dim, pairs = job->pairs;
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t row = unit / job->tokens, t = unit % job->tokens, b = row / job->heads, h = row % job->heads;
    const float* x = job->x + b * job->stride_b + h * job->stride_h + t * job->stride_t;
    const int32_t *own = job->channels + h * 3 * dim, *partner = own + dim, *pair = partner + dim;
    const float *sign = job->factors + h * 3 * dim, *factor = sign + dim, *other_factor = factor + dim;
    float* out = job->out + unit * dim;
    if (!job->cos) {
      for (int64_t j = 0; j < dim; ++j) out[j] = x[own[j]] * factor[j] + x[partner[j]] * other_factor[j];
      continue;
    }
    const float* cos = job->cos + b * job->angle_stride + t * pairs;
    const float* sin = job->sin + b * job->angle_stride + t * pairs;
    for (int64_t j = 0; j < dim; ++j) {
      const bool rotated = pair[j] < pairs;
      const float c = rotated ? cos[pair[j]] : 1.0f, s = rotated ? sin[pair[j]] * sign[j] : 0.0f;
      const float a = x[own[j]], p = x[partner[j]];
      // Un-rotated, the channel is a c + p s and its partner p c - a s; the map makes one channel of the two.
      out[j] = (a * c + p * s) * factor[j] + (p * c - a * s) * other_factor[j];
    }
  }
  return 0;
}
