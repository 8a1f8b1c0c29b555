// The nearest of many centroids of two channels, by cells of the plane: a cell of a grid knows which centroids can be the nearest
// of a point in it, and those alone pass by.
//
// Scores are those of search.h to the bit, and so is what is found: a cell keeps every centroid whose score, rounding
// included, can be the largest of one of its points. Points outside the grid, and those that are no numbers, see all centroids.
//
// The grid is filled from the plane downward: the centroids of a square's quarters are among its own, and a square of few is not
// cut any more.

#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "cell_list.h"
#include "search.h"

namespace {

// A few centroids side by side: their lines channel by channel, last what is added, and their rows.
struct CellBlock {
  float line[kAxes + 1][kLanes];
  int32_t row[kLanes];
};

class Cells {
 public:
  // Whether to build them for `searches` among `k` centroids takes less time than it saves; of more they cannot number the blocks.
  static bool pay(int64_t k, int64_t searches) { return k >= 256 && k <= 65536 && searches >= 8192; }

  // For `lines` [k, 3].
  void build(const float* lines, int64_t k) {
    blocks_.clear();
    std::vector<CellList> lists(kLevels + 1, CellList(k));
    for (int64_t c = 0; c < k; ++c) {
      for (int i = 0; i <= kAxes; ++i) lists[0].line[i][c] = lines[c * (kAxes + 1) + i];
      lists[0].row[c] = static_cast<int32_t>(c);
    }
    lists[0].close(k);
    spans_.assign(kCells + 1, keep(lists[0]));
    const int32_t corner[kAxes] = {};
    if (measure(lists[0])) split(lists.data(), corner, kLevels);
  }

  // As search.h's `largest`.
  void largest(const Floats (&x)[kVectors][kAxes], Floats (&best)[kVectors], Ints (&index)[kVectors]) const {
    float points[kAxes][kBlock], top[kBlock];
    int32_t cell[kBlock], row[kBlock];
    for (int v = 0; v < kVectors; ++v) {
      Ints inside = ~Ints{}, place{};
      for (int i = 0; i < kAxes; ++i) {
        store(points[i] + v * kLanes, x[v][i]);
        const Floats along = (x[v][i] - low_[i]) * per_cell_[i];
        inside &= (along >= 0.0f) & (along < static_cast<float>(kSide));
        place = place * kSide + __builtin_convertvector(inside ? along : Floats{}, Ints);
      }
      store(cell + v * kLanes, inside ? place : Ints{} + kCells);
    }
    const CellBlock* first[kBlock];
    for (int p = 0; p < kBlock; ++p) {
      first[p] = &blocks_[spans_[cell[p]].first];
      for (size_t at = 0; at < sizeof(CellBlock); at += 64) __builtin_prefetch(reinterpret_cast<const char*>(first[p]) + at);
    }
    for (int p = 0; p < kBlock; ++p) {
      float point[kAxes];
      for (int i = 0; i < kAxes; ++i) point[i] = points[i][p];
      row[p] = nearest(point, spans_[cell[p]], top[p]);
    }
    for (int v = 0; v < kVectors; ++v) {
      best[v] = loaded(top + v * kLanes);
      index[v] = loaded(row + v * kLanes);
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

  // Lay the grid over the centroids; whether they permit one.
  bool measure(const CellList& all) {
    for (int i = 0; i < kAxes; ++i) {
      float low = kLargest, high = -kLargest;
      for (int64_t c = 0; c < all.size; ++c) {
        low = std::fmin(low, all.line[i][c] / 2);
        high = std::fmax(high, all.line[i][c] / 2);
      }
      const float margin = (high - low) / 8;
      low_[i] = low - margin;
      cell_[i] = (high - low + 2 * margin) / kSide;
      per_cell_[i] = 1 / cell_[i];
      if (!(cell_[i] > 1 / kLargest) || !(low > -kLargest) || !(high < kLargest)) return false;
    }
    return true;
  }

  CellBox box(const int32_t* corner, int level) const {
    CellBox found{};
    for (int i = 0; i < kAxes; ++i) {
      const float half = 0.5f * static_cast<float>(1 << level), far = std::fabs(low_[i]) + kSide * cell_[i];
      found.middle[i] = low_[i] + (corner[i] + half) * cell_[i];
      found.half[i] = (half + kOverlap) * cell_[i] + 4 * std::numeric_limits<float>::epsilon() * far;
      const float reach = std::fabs(found.middle[i]) + found.half[i];
      found.square += reach * reach;
    }
    return found;
  }

  // Give the cells of the square of 2^level from `corner` on their centroids out of lists[0]; what follows it is scratch space.
  void split(CellList* lists, const int32_t* corner, int level) {
    if (lists[0].size <= kLanes || level == 0) return fill(corner, level, keep(lists[0]));
    for (int part = 0; part < 1 << kAxes; ++part) {
      int32_t own[kAxes];
      for (int i = 0; i < kAxes; ++i) own[i] = corner[i] + ((part >> i & 1) << (level - 1));
      const CellBox inner = box(own, level - 1);
      lists[0].narrow(inner.middle, inner, lists[1]);
      for (int end = 0; end < 1 << kAxes && lists[1].size > kLanes; ++end) {
        float x[kAxes];
        for (int i = 0; i < kAxes; ++i) x[i] = inner.middle[i] + (end >> i & 1 ? inner.half[i] : -inner.half[i]);
        lists[1].narrow(x, inner, lists[1]);
      }
      split(lists + 1, own, level - 1);
    }
  }

  void fill(const int32_t* corner, int level, Span span) {
    for (int32_t c = 0; c < 1 << kAxes * level; ++c) {
      int32_t place = 0;
      for (int i = 0; i < kAxes; ++i) place = place * kSide + corner[i] + (c >> i * level & ((1 << level) - 1));
      spans_[place] = span;
    }
  }

  Span keep(const CellList& list) {
    const Span span{static_cast<uint16_t>(blocks_.size()), static_cast<uint16_t>((list.size + kLanes - 1) / kLanes)};
    if (span.first && (!span.count || span.first + span.count > kMostBlocks)) return spans_[kCells];
    for (int64_t at = 0; at < list.size; at += kLanes) {
      CellBlock block;
      for (int i = 0; i <= kAxes; ++i) store(block.line[i], loaded(&list.line[i][at]));
      store(block.row, loaded(&list.row[at]));
      blocks_.push_back(block);
    }
    return span;
  }

  static Floats scores(const CellBlock& block, const float* point) {
    Floats total = loaded(block.line[kAxes]);
    for (int i = 0; i < kAxes; ++i) total += loaded(block.line[i]) * point[i];
    return total > kLowest ? total : Floats{} + kLowest;  // which is not NaN
  }

  int32_t nearest(const float* point, Span span, float& top) const {
    const CellBlock* block = &blocks_[span.first];
    Floats best = scores(*block, point);
    if (span.count == 1) {  // nearly always
      top = largest_lane(best);
      return block->row[__builtin_ctz(bits(best == top))];
    }
    Ints row = loaded(block->row);
    for (const CellBlock* end = block++ + span.count; block != end; ++block) {
      const Floats score = scores(*block, point);
      const Ints better = score > best;
      best = better ? score : best;
      row = better ? loaded(block->row) : row;
    }
    top = largest_lane(best);
    uint32_t which = bits(best == top);
    int32_t found = row[__builtin_ctz(which)];
    while (which &= which - 1) found = row[__builtin_ctz(which)] < found ? row[__builtin_ctz(which)] : found;
    return found;
  }

  std::vector<CellBlock> blocks_;
  std::vector<Span> spans_;  // of every cell, and of all centroids
  float low_[kAxes] = {}, cell_[kAxes] = {}, per_cell_[kAxes] = {};
};

}  // namespace
