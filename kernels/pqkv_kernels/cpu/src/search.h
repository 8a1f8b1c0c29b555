// The nearest centroid of points: what nearest.cpp and parts.cpp share. There are two ways, which find the same to the bit:
// `largest` passes all centroids by some points, and `Cells` does with points of two channels what cells of the plane permit.
//
// An augmented centroid is twice the centroid c, then minus its square: its product with (x, 1) is a score that is largest
// where c is nearest to x, because the squared distance is x^2 minus the score. A score is a few fused multiply-adds, and the
// best so far and its index are kept by selection, so the inner loop reads nothing but centroids.

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "simd.h"

namespace {

constexpr int kBlockVectors = 4;  // of every channel: points that stay in registers while centroids pass
constexpr int kBlockPoints = kLanes * kBlockVectors;
constexpr float kLowest = std::numeric_limits<float>::lowest();

// ---- Among all centroids -------------------------------------------------------------------------------------------------

// The largest score of each of kBlockPoints points `x` among `augmented` centroids [k, D + 1], and the first that reaches it.
template <int D>
inline void largest(const Floats (&x)[kBlockVectors][D], const float* augmented, int64_t k, Floats (&best)[kBlockVectors],
                    Ints (&index)[kBlockVectors]) {
  for (int v = 0; v < kBlockVectors; ++v) {
    best[v] = Floats{} + kLowest;
    index[v] = Ints{};
  }
  for (int64_t c = 0; c < k; ++c) {
    const float* centroid = augmented + c * (D + 1);
    const Ints here = Ints{} + static_cast<int32_t>(c);
#pragma GCC unroll 4
    for (int v = 0; v < kBlockVectors; ++v) {
      Floats score = centroid[D] - Floats{};  // not plus: -0 + 0 is 0, so that would be an addition
      for (int i = 0; i < D; ++i) score += x[v][i] * centroid[i];
      const Ints better = score > best[v];
      best[v] = better ? score : best[v];
      index[v] = better ? here : index[v];
    }
  }
}

// ---- Centroids of a cell -------------------------------------------------------------------------------------------------

constexpr int kAxes = 2;  // of a plane: with more, a cell has too many neighbours

// A box of points: its middle, half its widths, and a bound for the squares of its points.
struct CellBox {
  float middle[kAxes], half[kAxes], square;
};

// Augmented centroids in the order of their rows, channel by channel, with room behind them for vectors that read beyond the
// end.
struct CellList {
  explicit CellList(int64_t most) : row(most + kLanes) {
    for (auto& channel : augmented) channel.resize(most + kLanes);
  }

  // Scores at `x` of kLanes centroids from `first` on.
  Floats score(int64_t first, const float* x) const {
    Floats total = load(&augmented[kAxes][first]);
    for (int i = 0; i < kAxes; ++i) total += load(&augmented[i][first]) * x[i];
    return total;
  }

  // What lies behind the end never has the largest score.
  void close(int64_t end) {
    size = end;
    for (int i = 0; i < kAxes; ++i) store(&augmented[i][end], Floats{});
    store(&augmented[kAxes][end], Floats{} - std::numeric_limits<float>::infinity());
  }

  // Which one of this list has the largest score at `x`.
  int64_t best(const float* x) const {
    Floats top = Floats{} + kLowest;
    Ints index{}, here;
    for (int lane = 0; lane < kLanes; ++lane) here[lane] = lane;
    for (int64_t first = 0; first < size; first += kLanes, here += kLanes) {
      const Floats scores = score(first, x);
      const Ints better = scores > top;
      top = better ? scores : top;
      index = better ? here : index;
    }
    return index[__builtin_ctz(mask_bits(top == lane_max(top)))];
  }

  // Write those that can be the nearest of a point in `box` to the list `to`, which may be this one: all whose score can
  // exceed, at some point of the box, the score of the rival that is nearest to `x`. The difference of two scores is linear in
  // the point, so it is largest in a corner: that of the middle, plus half a width times the difference of the centroids for
  // every axis. Rounding moves a score by less than kRounding times the squares of point and centroid, which bound its terms.
  void narrow(const float* x, const CellBox& box, CellList& to) const {
    const int64_t rival = best(x), end = size;
    float own[kAxes], least = augmented[kAxes][rival] * (1 + 2 * kRounding) - 2 * kRounding * box.square;
    for (int i = 0; i < kAxes; ++i) {
      own[i] = augmented[i][rival];
      least += own[i] * box.middle[i];
    }
    int64_t kept = 0;
    for (int64_t first = 0; first < end; first += kLanes) {
      Floats here[kAxes + 1];
      for (int i = 0; i <= kAxes; ++i) here[i] = load(&augmented[i][first]);
      const Ints rows = load(&row[first]);
      Floats most = here[kAxes] * (1 - 2 * kRounding);
      for (int i = 0; i < kAxes; ++i) {
        const Floats apart = here[i] - own[i];
        most += here[i] * box.middle[i] + (apart > 0.0f ? apart : -apart) * box.half[i];
      }
      const uint32_t which = mask_bits(most >= least);
      for (int i = 0; i <= kAxes; ++i) compress_store(&to.augmented[i][kept], here[i], which);
      compress_store(&to.row[kept], rows, which);
      kept += __builtin_popcount(which);
    }
    to.close(kept);
  }

  static constexpr float kRounding = 4e-6f;  // of a score, relative to its terms: some dozen times what it can be

  std::vector<float> augmented[kAxes + 1];
  std::vector<int32_t> row;
  int64_t size = 0;
};

// Centroids side by side, as many as fill a vector: augmented, channel by channel, and their rows.
struct CellBlock {
  float augmented[kAxes + 1][kLanes];
  int32_t row[kLanes];
};

// ---- Cells of the plane --------------------------------------------------------------------------------------------------

// A grid over centroids of two channels. Every cell knows the centroids that can be the nearest of a point in it, and a point
// meets only those of its cell.
//
// Scores are those of `largest` to the bit, and so is what is chosen: a cell keeps every centroid whose score, rounding
// included, can be the largest of one of its points. Points outside the grid, and those that are not finite, meet all
// centroids.
//
// The grid is filled from the whole plane downward: what can be nearest in a quarter of a square is among what can be nearest
// in the square. A square that has no more centroids than a vector has lanes is not divided any more.
class Cells {
 public:
  // Whether building them for `searches` among `k` centroids takes less time than it saves. The blocks of more centroids could
  // not be numbered with 16 bits.
  static bool pay(int64_t k, int64_t searches) { return k >= 256 && k <= 65536 && searches >= 8192; }

  // For `augmented` centroids [k, 3].
  void build(const float* augmented, int64_t k) {
    blocks_.clear();
    std::vector<CellList> lists(kLevels + 1, CellList(k));
    for (int64_t c = 0; c < k; ++c) {
      for (int i = 0; i <= kAxes; ++i) lists[0].augmented[i][c] = augmented[c * (kAxes + 1) + i];
      lists[0].row[c] = static_cast<int32_t>(c);
    }
    lists[0].close(k);
    spans_.assign(kCells + 1, keep(lists[0]));
    const int32_t corner[kAxes] = {};
    if (measure(lists[0])) split(lists.data(), corner, kLevels);
  }

  // As the function `largest` does.
  void largest(const Floats (&x)[kBlockVectors][kAxes], Floats (&best)[kBlockVectors], Ints (&index)[kBlockVectors]) const {
    float points[kAxes][kBlockPoints], top[kBlockPoints];
    int32_t cell[kBlockPoints], row[kBlockPoints];
    for (int v = 0; v < kBlockVectors; ++v) {
      Ints inside = ~Ints{}, number{};  // of the cell: digits of base kSide, one for each axis
      for (int i = 0; i < kAxes; ++i) {
        store(points[i] + v * kLanes, x[v][i]);
        const Floats along = (x[v][i] - low_[i]) * per_cell_[i];
        inside &= (along >= 0.0f) & (along < static_cast<float>(kSide));
        number = number * kSide + __builtin_convertvector(inside ? along : Floats{}, Ints);
      }
      store(cell + v * kLanes, inside ? number : Ints{} + kCells);
    }
    const CellBlock* first[kBlockPoints];
    for (int p = 0; p < kBlockPoints; ++p) {
      first[p] = &blocks_[spans_[cell[p]].first];
      for (size_t at = 0; at < sizeof(CellBlock); at += 64) __builtin_prefetch(reinterpret_cast<const char*>(first[p]) + at);
    }
    for (int p = 0; p < kBlockPoints; ++p) {
      float point[kAxes];
      for (int i = 0; i < kAxes; ++i) point[i] = points[i][p];
      row[p] = nearest(point, spans_[cell[p]], top[p]);
    }
    for (int v = 0; v < kBlockVectors; ++v) {
      best[v] = load(top + v * kLanes);
      index[v] = load(row + v * kLanes);
    }
  }

 private:
  static constexpr int kLevels = 6, kSide = 1 << kLevels, kCells = kSide * kSide;
  static constexpr int64_t kMostBlocks = 4 * kCells;  // beyond them cells see all centroids
  static constexpr float kOverlap = 1e-3f;  // of a cell, for points that rounding puts into its neighbour
  static constexpr float kLargest = 1e15f;  // its square is far from overflowing

  // Where the blocks of a cell's centroids lie.
  struct Span {
    uint16_t first, count;
  };

  // Lay the grid over the centroids, which are half of what `all` holds; returns whether they permit one.
  bool measure(const CellList& all) {
    for (int i = 0; i < kAxes; ++i) {
      float low = kLargest, high = -kLargest;
      for (int64_t c = 0; c < all.size; ++c) {
        low = std::fmin(low, all.augmented[i][c] / 2);
        high = std::fmax(high, all.augmented[i][c] / 2);
      }
      const float margin = (high - low) / 8;
      low_[i] = low - margin;
      cell_[i] = (high - low + 2 * margin) / kSide;
      per_cell_[i] = 1 / cell_[i];
      if (!(cell_[i] > 1 / kLargest) || !(low > -kLargest) || !(high < kLargest)) return false;
    }
    return true;
  }

  // The box of the square of 2^level cells a side from the cell `corner` on, a little larger on all sides: a point that
  // rounding puts into one of these cells is in the box.
  CellBox box(const int32_t* corner, int level) const {
    CellBox around{};
    for (int i = 0; i < kAxes; ++i) {
      const float half = 0.5f * static_cast<float>(1 << level), far = std::fabs(low_[i]) + kSide * cell_[i];
      around.middle[i] = low_[i] + (corner[i] + half) * cell_[i];
      around.half[i] = (half + kOverlap) * cell_[i] + 4 * std::numeric_limits<float>::epsilon() * far;
      const float reach = std::fabs(around.middle[i]) + around.half[i];
      around.square += reach * reach;
    }
    return around;
  }

  // Give the cells of the square of 2^level cells a side from `corner` on their centroids, which are some of those of lists[0].
  // The lists behind it are scratch space, one for each level.
  void split(CellList* lists, const int32_t* corner, int level) {
    if (lists[0].size <= kLanes || level == 0) return fill(corner, level, keep(lists[0]));
    for (int part = 0; part < 1 << kAxes; ++part) {  // bit i of `part`, and below of `end`: which half on axis i
      int32_t own[kAxes];
      for (int i = 0; i < kAxes; ++i) own[i] = corner[i] + ((part >> i & 1) << (level - 1));
      const CellBox inner = box(own, level - 1);
      lists[0].narrow(inner.middle, inner, lists[1]);
      for (int end = 0; end < 1 << kAxes && lists[1].size > kLanes; ++end) {  // rivals nearest to the corners drop more of them
        float x[kAxes];
        for (int i = 0; i < kAxes; ++i) x[i] = inner.middle[i] + (end >> i & 1 ? inner.half[i] : -inner.half[i]);
        lists[1].narrow(x, inner, lists[1]);
      }
      split(lists + 1, own, level - 1);
    }
  }

  // Let all cells of a square have `span`. Cell `c` of the square has `level` bits of its number for each axis.
  void fill(const int32_t* corner, int level, Span span) {
    for (int32_t c = 0; c < 1 << kAxes * level; ++c) {
      int32_t number = 0;
      for (int i = 0; i < kAxes; ++i) number = number * kSide + corner[i] + (c >> i * level & ((1 << level) - 1));
      spans_[number] = span;
    }
  }

  // Keep the centroids of `list` as blocks; those of all centroids serve where there are none, or no room for more blocks.
  Span keep(const CellList& list) {
    const Span span{static_cast<uint16_t>(blocks_.size()), static_cast<uint16_t>((list.size + kLanes - 1) / kLanes)};
    if (span.first && (!span.count || span.first + span.count > kMostBlocks)) return spans_[kCells];
    for (int64_t first = 0; first < list.size; first += kLanes) {
      CellBlock block;
      for (int i = 0; i <= kAxes; ++i) store(block.augmented[i], load(&list.augmented[i][first]));
      store(block.row, load(&list.row[first]));
      blocks_.push_back(block);
    }
    return span;
  }

  static Floats scores(const CellBlock& block, const float* point) {
    Floats total = load(block.augmented[kAxes]);
    for (int i = 0; i < kAxes; ++i) total += load(block.augmented[i]) * point[i];
    return total > kLowest ? total : Floats{} + kLowest;  // which is not NaN
  }

  // The row of the largest score among the blocks of `span`, of equal ones the smallest row; `top` gets the score.
  int32_t nearest(const float* point, Span span, float& top) const {
    const CellBlock* block = &blocks_[span.first];
    Floats best = scores(*block, point);
    if (span.count == 1) {  // nearly always
      top = lane_max(best);
      return block->row[__builtin_ctz(mask_bits(best == top))];
    }
    Ints row = load(block->row);
    for (const CellBlock* end = block++ + span.count; block != end; ++block) {
      const Floats score = scores(*block, point);
      const Ints better = score > best;
      best = better ? score : best;
      row = better ? load(block->row) : row;
    }
    top = lane_max(best);
    uint32_t which = mask_bits(best == top);
    int32_t smallest = row[__builtin_ctz(which)];
    while (which &= which - 1) smallest = row[__builtin_ctz(which)] < smallest ? row[__builtin_ctz(which)] : smallest;
    return smallest;
  }

  std::vector<CellBlock> blocks_;
  std::vector<Span> spans_;  // of every cell, and of all centroids
  float low_[kAxes] = {}, cell_[kAxes] = {}, per_cell_[kAxes] = {};  // start of the grid, width of a cell, 1 / width
};

}  // namespace
