// Attention over codes on a CPU, for up to four queries at a time: the meaning of pqkv_kernels.attention.code_attention.
// A pair of channels is a complex number (a plane), eight of them fill one vector of sixteen floats: one per token where codes
// of few planes are looked up, one per plane where one code stands for eight planes or more. Knows addresses and numbers only;
// `native_attention.py` lays out the arguments and merges the parts.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <vector>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

namespace {

constexpr int kTokens = 64;      // of one page
constexpr int kVectors = 8;      // vectors of eight planes or tokens per page
constexpr int kBlockPages = 8;   // pages that meet one table at a time: the table stays in the first-level cache
constexpr int kAhead = 256;      // bytes of codes fetched before they are needed
constexpr int kRowsAhead = 6;    // rows of a wide table, too
typedef float V __attribute__((vector_size(64), aligned(4), may_alias));
typedef float Half __attribute__((vector_size(32), aligned(4), may_alias));

}  // namespace

struct Group {
  int64_t byte_offset, num_subspaces, nbits, planes, first_plane, table, head_stride, wide;
};

struct Side {
  const Group* groups;
  int64_t num_groups;
  const int64_t* pages;  // addresses [B, P]
  int64_t page_bytes;
};

struct Job {
  Side keys, values;
  const float* query;    // [B, Hkv, Q, N, D2, 2], scaled
  const int64_t* spans;  // [B, 2]
  const int64_t* pair;   // [Hkv, D2], num_pairs where a plane is not turned; null: keys are not turned
  const float *base_cos, *base_sin;      // [B or 1, P, num_pairs]
  const float *step_real, *step_imag;    // [Hkv, D2, 64, 2]: (cos, cos) and (-sin, sin)
  const float *row_real, *row_imag;      // [Hkv, 64, D2, 2], the same
  float *out, *lse;                      // [B, Hkv, Q, C, N, D], [B, Hkv, Q, C, N]
  int64_t batch, heads, query_blocks, block, chunks, chunk_pages, num_pages, planes, num_pairs, base_row;  // block: N
  float softcap;  // 0: none
};

namespace {

inline V gather(const float* table, const int32_t* index) {
#ifdef __AVX512F__
  return (V)_mm512_i32gather_pd(_mm256_loadu_si256((const __m256i*)index), table, 8);
#else
  V found;
  for (int i = 0; i < 8; i++) std::memcpy((char*)&found + 8 * i, table + 2 * (int64_t)index[i], 8);
  return found;
#endif
}

inline V swapped(V x) { return __builtin_shufflevector(x, x, 1, 0, 3, 2, 5, 4, 7, 6, 9, 8, 11, 10, 13, 12, 15, 14); }
inline V doubled(Half x) { return __builtin_shufflevector(x, x, 0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7); }
inline V loaded(const float* p) { return *(const V*)p; }
inline V both(float x, float y) { return V{x, y, x, y, x, y, x, y, x, y, x, y, x, y, x, y}; }

inline float sum(V x) {
  const Half h = __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15);
  typedef float Quarter __attribute__((vector_size(16)));
  const Quarter q = __builtin_shufflevector(h, h, 0, 1, 2, 3) + __builtin_shufflevector(h, h, 4, 5, 6, 7);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

// Spread packed values over one byte each (on a little-endian machine): first places first.
inline void spread(const uint8_t* bytes, int width, uint8_t* to) {
  if (width == 4) {
    uint16_t found[32];
    for (int i = 0; i < 32; i++) found[i] = (bytes[i] | bytes[i] << 4) & 0x0F0F;
    std::memcpy(to, found, kTokens);
  } else if (width == 2) {
    uint32_t found[16];
    for (int i = 0; i < 16; i++) found[i] = (bytes[i] | bytes[i] << 6 | bytes[i] << 12 | bytes[i] << 18) & 0x03030303;
    std::memcpy(to, found, kTokens);
  } else {
    uint64_t found[8];
    for (int i = 0; i < 8; i++) {
      uint64_t b = bytes[i];
      b |= b << 28;
      b |= b << 14;
      found[i] = (b | b << 7) & 0x0101010101010101;
    }
    std::memcpy(to, found, kTokens);
  }
}

inline void unpack(const uint8_t* bytes, int nbits, int32_t* index) {
  int low = 0;
  for (int width = 8; width; width /= 2) {
    if (!(nbits & width)) continue;
    uint8_t part[kTokens];
    width == 8 ? (void)std::memcpy(part, bytes, kTokens) : spread(bytes + 8 * low, width, part);
    if (low)
      for (int t = 0; t < kTokens; t++) index[t] |= part[t] << low;
    else
      for (int t = 0; t < kTokens; t++) index[t] = part[t];
    low += width;
  }
}

// exp(x) of x <= 0 to 2e-7; minus infinity gives zero.
inline float exp_negative(float x) {
  x = std::max(x, -87.0f);
  const float shifted = x * 1.44269504f + 12582912.0f, n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  const float p = 1 + r * (1 + r * (0.5f + r * (0.166666667f + r * (0.0416666667f + r * (8.3333333e-3f + r * 1.3888889e-3f)))));
  int32_t bits;
  std::memcpy(&bits, &shifted, 4);
  bits = (bits - 0x4B400000 + 127) << 23;
  float power;
  std::memcpy(&power, &bits, 4);
  return x <= -87.0f ? 0.0f : p * power;
}

template <int N, bool TURN>
class Unit {
 public:
  explicit Unit(const Job& job) : job_(job), d2_(job.planes) {}

  void run(int64_t unit) {
    const Job& job = job_;
    chunk_ = unit % job.chunks;
    const int64_t rest = unit / job.chunks;
    head_ = rest / job.query_blocks % job.heads;
    row_ = rest / job.query_blocks / job.heads;
    first_ = chunk_ * job.chunk_pages;
    count_ = std::min(job.chunk_pages, job.num_pages - first_);
    query_ = job.query + rest * N * d2_ * 2;
    out_ = job.out + unit * N * d2_ * 2;
    lse_ = job.lse + unit * N;
    attend();
  }

 private:
  void attend() {
    const int64_t tokens = count_ * kTokens;
    scores_.assign(N * tokens, 0.0f);
    for (int64_t start = 0; start < count_; start += kBlockPages) score(start, std::min<int64_t>(count_ - start, kBlockPages));
    float total[N];
    for (int n = 0; n < N; n++) total[n] = to_weights(scores_.data() + n * tokens, tokens, lse_ + n);
    sums_.assign(N * d2_, V{});
    out_sums_.assign(N * d2_ * 2, 0.0f);
    size_t bins = 0;
    for (int64_t g = 0; g < job_.values.num_groups; g++)
      if (job_.values.groups[g].wide) bins += job_.values.groups[g].num_subspaces << job_.values.groups[g].nbits;
    bins_.assign(N * bins, 0.0f);
    for (int64_t start = 0; start < count_; start += kBlockPages) collect(start, std::min<int64_t>(count_ - start, kBlockPages));
    add_bins();
    for (int n = 0; n < N; n++)
      for (int64_t i = 0; i < d2_; i++) {
        const float* lanes = (const float*)&sums_[i * N + n];
        float x = out_sums_[(n * d2_ + i) * 2], y = out_sums_[(n * d2_ + i) * 2 + 1];
        for (int k = 0; k < 16; k += 2) x += lanes[k], y += lanes[k + 1];
        out_[(n * d2_ + i) * 2] = x / total[n];
        out_[(n * d2_ + i) * 2 + 1] = y / total[n];
      }
  }

  const uint8_t* codes(const Side& side, const Group& group, int64_t page, int64_t subspace) const {
    const auto* bytes = (const uint8_t*)side.pages[row_ * job_.num_pages + first_ + page];
    bytes += head_ * side.page_bytes + group.byte_offset + subspace * 8 * group.nbits;
    __builtin_prefetch(bytes + kAhead);
    return bytes;
  }

  // The queries turned back by the base of every page of a block: [page][N][D2][2].
  void turn_queries(int64_t start, int64_t count) {
    turned_.resize(count * N * d2_ * 2);
    for (int64_t p = 0; p < count; p++) {
      const int64_t at = (row_ * job_.base_row + first_ + start + p) * job_.num_pairs;
      for (int n = 0; n < N; n++)
        for (int64_t i = 0; i < d2_; i++) {
          const float x = query_[(n * d2_ + i) * 2], y = query_[(n * d2_ + i) * 2 + 1];
          float* to = &turned_[((p * N + n) * d2_ + i) * 2];
          const int64_t pair = TURN ? job_.pair[head_ * d2_ + i] : job_.num_pairs;
          const bool turns = pair < job_.num_pairs;
          const float c = turns ? job_.base_cos[at + pair] : 1, s = turns ? job_.base_sin[at + pair] : 0;
          to[0] = x * c + y * s;
          to[1] = y * c - x * s;
        }
    }
  }

  void score(int64_t start, int64_t count) {
    turn_queries(start, count);
    const int64_t tokens = count_ * kTokens;
    pairs_.assign(count * N * kVectors, V{});
    for (int64_t g = 0; g < job_.keys.num_groups; g++) {
      const Group& group = job_.keys.groups[g];
      for (int64_t m = 0; m < group.num_subspaces; m++)
        for (int64_t p = 0; p < count; p++) {
          unpack(codes(job_.keys, group, start + p, m), group.nbits, index_);
          group.wide ? score_rows(group, m, p, start) : score_planes(group, m, p);
        }
    }
    for (int64_t p = 0; p < count; p++)
      for (int n = 0; n < N; n++) {
        const float* pair = (const float*)&pairs_[(p * N + n) * kVectors];
        float* to = &scores_[n * tokens + (start + p) * kTokens];
        for (int t = 0; t < kTokens; t++) to[t] += pair[2 * t] + pair[2 * t + 1];
      }
    const int64_t* span = job_.spans + 2 * row_;
    const int64_t before = (first_ + start) * kTokens, number = count * kTokens;
    const int64_t first = std::clamp<int64_t>(span[0] - before, 0, number), stop = std::clamp<int64_t>(span[1] - before, 0, number);
    for (int n = 0; n < N; n++) {
      float* to = &scores_[n * tokens + start * kTokens];
      if (job_.softcap > 0)
        for (int64_t t = 0; t < number; t++) to[t] = job_.softcap * std::tanh(to[t] / job_.softcap);
      std::fill(to, to + first, -std::numeric_limits<float>::infinity());
      std::fill(to + stop, to + number, -std::numeric_limits<float>::infinity());
    }
  }

  void score_planes(const Group& group, int64_t m, int64_t p) {
    V* to = &pairs_[p * N * kVectors];
    for (int64_t k = 0; k < group.planes; k++) {
      const int64_t local = m * group.planes + k, plane = group.first_plane + local;
      const float* table = (const float*)group.table + head_ * group.head_stride + (local << group.nbits) * 2;
      const float* query = &turned_[(p * N * d2_ + plane) * 2];
      V q[N];
      for (int n = 0; n < N; n++) q[n] = both(query[n * d2_ * 2], query[n * d2_ * 2 + 1]);
      const int64_t at = (head_ * d2_ + plane) * kTokens * 2;
      const float *real = job_.step_real + at, *imag = job_.step_imag + at;
      for (int j = 0; j < kVectors; j++) {
        V key = gather(table, index_ + 8 * j);
        if (TURN) key = key * loaded(real + 16 * j) + swapped(key) * loaded(imag + 16 * j);
        for (int n = 0; n < N; n++) to[n * kVectors + j] += key * q[n];
      }
    }
  }

  void score_rows(const Group& group, int64_t m, int64_t p, int64_t start) {
    const int64_t width = group.planes * 2, plane = group.first_plane + m * group.planes, tokens = count_ * kTokens;
    const float* table = (const float*)group.table + head_ * group.head_stride + (m << group.nbits) * width;
    const float* queries = &turned_[(p * N * d2_ + plane) * 2];
    const int64_t at = (head_ * kTokens * d2_ + plane) * 2, step = d2_ * 2;
    const float *real = job_.row_real + at, *imag = job_.row_imag + at;
    float* to = &scores_[(start + p) * kTokens];
    for (int t = 0; t < kTokens; t++, real += step, imag += step) {
      const float* row = table + index_[t] * width;
      if (t + kRowsAhead < kTokens)
        for (int64_t i = 0; i < width; i += 16) __builtin_prefetch(table + index_[t + kRowsAhead] * width + i);
      V total[N] = {};
      for (int64_t i = 0; i < width; i += 16) {
        V key = loaded(row + i);
        if (TURN) key = key * loaded(real + i) + swapped(key) * loaded(imag + i);
        for (int n = 0; n < N; n++) total[n] += key * loaded(queries + n * step + i);
      }
      for (int n = 0; n < N; n++) to[n * tokens + t] += sum(total[n]);
    }
  }

  static float to_weights(float* x, int64_t count, float* lse) {
    float high = -1e30f, total = 0;
    for (int64_t t = 0; t < count; t++) high = std::max(high, x[t]);
    float partial[16] = {};
    for (int64_t t = 0; t < count; t += 16)
      for (int i = 0; i < 16; i++) {
        x[t + i] = exp_negative(x[t + i] - high);
        partial[i] += x[t + i];
      }
    for (float part : partial) total += part;
    *lse = total > 0 ? high + std::log(total) : -std::numeric_limits<float>::infinity();
    return std::max(total, 1e-30f);
  }

  void collect(int64_t start, int64_t count) {
    const int64_t tokens = count_ * kTokens;
    pairs_.resize(count * N * kVectors);
    for (int64_t p = 0; p < count; p++)
      for (int n = 0; n < N; n++)
        for (int j = 0; j < kVectors; j++)
          pairs_[(p * N + n) * kVectors + j] = doubled(*(const Half*)&scores_[n * tokens + (start + p) * kTokens + 8 * j]);
    float* bins = bins_.data();
    for (int64_t g = 0; g < job_.values.num_groups; g++) {
      const Group& group = job_.values.groups[g];
      for (int64_t m = 0; m < group.num_subspaces; m++) {
        for (int64_t p = 0; p < count; p++) {
          unpack(codes(job_.values, group, start + p, m), group.nbits, index_);
          if (!group.wide)
            collect_planes(group, m, p);
          else
            for (int n = 0; n < N; n++)
              for (int t = 0; t < kTokens; t++)
                bins[(n << group.nbits) + index_[t]] += scores_[n * tokens + (start + p) * kTokens + t];
        }
        if (group.wide) bins += (int64_t)N << group.nbits;
      }
    }
  }

  void collect_planes(const Group& group, int64_t m, int64_t p) {
    for (int64_t k = 0; k < group.planes; k++) {
      const int64_t local = m * group.planes + k;
      const float* table = (const float*)group.table + head_ * group.head_stride + (local << group.nbits) * 2;
      V* to = &sums_[(group.first_plane + local) * N];
      V total[N];
      for (int n = 0; n < N; n++) total[n] = to[n];
      for (int j = 0; j < kVectors; j++) {
        const V value = gather(table, index_ + 8 * j);
        for (int n = 0; n < N; n++) total[n] += value * pairs_[(p * N + n) * kVectors + j];
      }
      for (int n = 0; n < N; n++) to[n] = total[n];
    }
  }

  // A code of many planes: its weights were added up per entry, and every entry is read once.
  void add_bins() {
    const float* bins = bins_.data();
    for (int64_t g = 0; g < job_.values.num_groups; g++) {
      const Group& group = job_.values.groups[g];
      if (!group.wide) continue;
      const int64_t width = group.planes * 2;
      for (int64_t m = 0; m < group.num_subspaces; m++, bins += (int64_t)N << group.nbits) {
        const float* table = (const float*)group.table + head_ * group.head_stride + (m << group.nbits) * width;
        for (int n = 0; n < N; n++) {
          float* to = &out_sums_[(n * d2_ + group.first_plane + m * group.planes) * 2];
          for (int64_t k = 0; k < (int64_t)1 << group.nbits; k++)
            for (int64_t i = 0; i < width; i++) to[i] += bins[(n << group.nbits) + k] * table[k * width + i];
        }
      }
    }
  }

  const Job& job_;
  const int64_t d2_;
  int64_t chunk_, head_, row_, first_, count_;
  const float* query_;
  float *out_, *lse_;
  int32_t index_[kTokens];
  std::vector<float> scores_, turned_, bins_, out_sums_;
  std::vector<V> pairs_, sums_;
};

template <int N, bool TURN>
void run_units(const Job& job, int64_t begin, int64_t end) {
  Unit<N, TURN> unit(job);
  for (int64_t i = begin; i < end; i++) unit.run(i);
}

template <int N>
int run_turned(const Job& job, int64_t begin, int64_t end) {
  job.pair ? run_units<N, true>(job, begin, end) : run_units<N, false>(job, begin, end);
  return 0;
}

}  // namespace

extern "C" int pqkv_attend(const Job* job, int64_t begin, int64_t end) {
  if (job->block == 1) return run_turned<1>(*job, begin, end);
  if (job->block == 2) return run_turned<2>(*job, begin, end);
  if (job->block == 4) return run_turned<4>(*job, begin, end);
  return 1;
}

// Merges the parts of query blocks begin..end-1, counted over all heads, into the first one of each, by their log-sum-exp.
extern "C" int pqkv_merge(const Job* job, int64_t begin, int64_t end) {
  const int64_t chunks = job->chunks, block = job->block, dim = 2 * job->planes;
  for (int64_t unit = begin; unit < end; unit++)
    for (int64_t n = 0; n < block; n++) {
      float *out = job->out + (unit * chunks * block + n) * dim, *lse = job->lse + unit * chunks * block + n;
      float high = *lse, total = 0;
      for (int64_t c = 1; c < chunks; c++) high = std::max(high, lse[c * block]);
      if (high == -std::numeric_limits<float>::infinity()) continue;
      for (int64_t c = 0; c < chunks; c++) {
        const float share = std::exp(lse[c * block] - high), *part = out + c * block * dim;
        total += share;
        for (int64_t i = 0; i < dim; i++) out[i] = share * part[i] + (c ? out[i] : 0.0f);
      }
      for (int64_t i = 0; i < dim; i++) out[i] /= total;
      *lse = high + std::log(total);
    }
  return 0;
}
