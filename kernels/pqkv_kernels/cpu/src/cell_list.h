// Centroids of two channels, and which of them can be the nearest of a point in a box of the plane. See cells.h.

#pragma once

#include <cstdint>
#include <limits>
#include <vector>

#include "lanes.h"
#include "search.h"

namespace {

constexpr int kAxes = 2;  // with more, a cell has too many neighbours

// A box of points: its middle, half its widths, and a bound for the squares of its points.
struct CellBox {
  float middle[kAxes], half[kAxes], square;
};

// Centroids in the order of their rows, channel by channel, with room behind them for vectors that read beyond the end.
struct CellList {
  explicit CellList(int64_t most) : row(most + kLanes) {
    for (auto& channel : line) channel.resize(most + kLanes);
  }

  Floats score(int64_t at, const float* x) const {
    Floats total = loaded(&line[kAxes][at]);
    for (int i = 0; i < kAxes; ++i) total += loaded(&line[i][at]) * x[i];
    return total;
  }

  // What lies behind the end can win nowhere.
  void close(int64_t end) {
    size = end;
    for (int i = 0; i < kAxes; ++i) store(&line[i][end], Floats{});
    store(&line[kAxes][end], Floats{} - std::numeric_limits<float>::infinity());
  }

  // The place of the largest score at `x`.
  int64_t best(const float* x) const {
    Floats top = Floats{} + kLowest;
    Ints place{}, here;
    for (int lane = 0; lane < kLanes; ++lane) here[lane] = lane;
    for (int64_t at = 0; at < size; at += kLanes, here += kLanes) {
      const Floats found = score(at, x);
      const Ints better = found > top;
      top = better ? found : top;
      place = better ? here : place;
    }
    return place[__builtin_ctz(bits(top == largest_lane(top)))];
  }

  // Those that can be the nearest of a point in `box`, as far as the one that is so at `x` tells, go `to`, which may be this list.
  // The difference of two scores is largest in a corner. Rounding moves a score by less than kRounding times the squares of point
  // and centroid, which bound its terms.
  void narrow(const float* x, const CellBox& box, CellList& to) const {
    const int64_t rival = best(x), end = size;
    float own[kAxes], least = line[kAxes][rival] * (1 + 2 * kRounding) - 2 * kRounding * box.square;
    for (int i = 0; i < kAxes; ++i) {
      own[i] = line[i][rival];
      least += own[i] * box.middle[i];
    }
    int64_t kept = 0;
    for (int64_t at = 0; at < end; at += kLanes) {
      Floats here[kAxes + 1];
      for (int i = 0; i <= kAxes; ++i) here[i] = loaded(&line[i][at]);
      const Ints rows = loaded(&row[at]);
      Floats most = here[kAxes] * (1 - 2 * kRounding);
      for (int i = 0; i < kAxes; ++i) {
        const Floats over = here[i] - own[i];
        most += here[i] * box.middle[i] + (over > 0.0f ? over : -over) * box.half[i];
      }
      const uint32_t which = bits(most >= least);
      for (int i = 0; i <= kAxes; ++i) write_kept(&to.line[i][kept], here[i], which);
      write_kept(&to.row[kept], rows, which);
      kept += __builtin_popcount(which);
    }
    to.close(kept);
  }

  static constexpr float kRounding = 4e-6f;  // of a score, relative to its terms: some dozen times what it can be

  std::vector<float> line[kAxes + 1];
  std::vector<int32_t> row;
  int64_t size = 0;
};

}  // namespace
