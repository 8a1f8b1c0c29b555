// The pages of one key/value head that a part of an attention reads, and where their codes lie.

#pragma once

#include <algorithm>
#include <cstdint>

#include "attention_job.h"
#include "codes.h"
#include "lookup.h"

namespace {

constexpr int kBlockPages = 16;  // pages that meet one table at a time: the table stays in the first-level cache

// Planes of a row as it lies in a wide table.
constexpr int64_t padded(int64_t planes) { return (planes + 15) / 16 * 16; }

struct Place {
  int64_t row, head, first, count;  // pages first..first+count-1 of the row

  int64_t tokens() const { return count * kTokens; }

  // The codes of `page`, counted from `first`; those of the next block are fetched before they are needed.
  const uint8_t* codes(const Job& job, const Side& side, const Group& group, int64_t page, int64_t subspace) const {
    const int64_t* pages = side.pages + row * job.num_pages + first;
    const int64_t at = head * side.page_bytes + group.byte_offset + subspace * 8 * group.nbits;
    __builtin_prefetch((const uint8_t*)pages[std::min(page + kBlockPages, count - 1)] + at);
    return (const uint8_t*)pages[page] + at;
  }

  // Fill `codes` [kBlockPages] with those of `count` pages; the last one's stand twice where their number is odd.
  void read(const Job& job, const Side& side, const Group& group, int64_t page, int64_t count, int64_t subspace,
            PageCodes* codes) const {
    for (int64_t p = 0; p < count; p++) codes[p].read(this->codes(job, side, group, page + p, subspace), group.nbits);
    if (count % kPagesTogether) codes[count] = codes[count - 1];
  }

  // The table of one of the planes of a subspace; that of a wide group is of all its planes.
  const void* table(const Group& group, int64_t subspace, int64_t plane = 0) const {
    const int64_t bytes = head * group.head_bytes + subspace * group.subspace_bytes;
    return (const uint8_t*)group.table + bytes + plane * (group.subspace_bytes / group.planes);
  }
};

}  // namespace
