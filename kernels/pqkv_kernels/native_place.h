// The pages of one key/value head that a part of an attention reads, and where their codes lie.

#pragma once

#include <cstdint>

#include "native_attention_job.h"
#include "native_codes.h"

namespace {

constexpr int kVectors = 8;     // vectors of eight planes or tokens per page
constexpr int kBlockPages = 8;  // pages that meet one table at a time: the table stays in the first-level cache
constexpr int kTogether = 2;    // subspaces read at a time: what they share is loaded once
constexpr int kAhead = 256;     // bytes of codes fetched before they are needed

struct Place {
  int64_t row, head, first, count;  // pages first..first+count-1 of the row

  int64_t tokens() const { return count * kTokens; }

  // The codes of `page`, counted from `first`.
  const uint8_t* codes(const Job& job, const Side& side, const Group& group, int64_t page, int64_t subspace) const {
    const auto* bytes = (const uint8_t*)side.pages[row * job.num_pages + first + page];
    bytes += head * side.page_bytes + group.byte_offset + subspace * 8 * group.nbits;
    __builtin_prefetch(bytes + kAhead);
    return bytes;
  }

  // The entries of `plane`, counted over the planes of the group's subspaces; those of a wide group lie together.
  const float* table(const Group& group, int64_t plane) const {
    return (const float*)group.table + head * group.head_stride + (plane << group.nbits) * 2;
  }
};

}  // namespace
