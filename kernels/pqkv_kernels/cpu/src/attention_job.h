// What an attention over codes is asked to do, and where its codes and tables lie. `cpu/attention.py` reads the structures and
// constants here and fills the structures in.
//
// A plane is a channel pair, whose values are the points of a plane. D2 planes are D channels.

#pragma once

#include <algorithm>
#include <cstdint>

#include "codes.h"

constexpr int kBlocks[] = {1, 2, 3, 4};  // so many queries share what is looked up
constexpr int kRowMultiple = 16;         // rows of a wide table are filled up with zeros to a multiple of so many planes

// Neighbouring subspaces that are coded alike, and the table of their centroids.
struct Group {
  int64_t byte_offset, num_subspaces, nbits;  // byte_offset: from the start of a page of one head to the group's codes
  int64_t planes, first_plane;                // of one code; of the whole group
  const void* table;                          // [Hkv, num_subspaces, planes] tables, see codes.h; or wide ones
  int64_t head_bytes, subspace_bytes;         // of the table: from head to head, from subspace to subspace
  int64_t wide;                               // 1: a code is of many planes, [Hkv, num_subspaces, entries, 2, padded(planes)]
};

// Keys or values.
struct Side {
  const Group* groups;
  int64_t num_groups;
  const int64_t* pages;  // addresses [B, P]: of the pages of all heads, one after the other
  int64_t page_bytes;    // of one head
};

// Q blocks of N queries each meet C chunks of the P pages.
struct AttentionJob {
  Side keys, values;
  const float* query;                // [B, Hkv, Q, N, D2, 2], scaled
  const int64_t* spans;              // [B, 2]: the first slot that a row reads as codes, and the one behind the last
  const int64_t* pair;               // [Hkv, D2], num_pairs where a plane is not rotated; null: keys are not rotated here
  const float *base_cos, *base_sin;  // [B or 1, P, num_pairs]: the angles of every page's first token
  const float *step_cos, *step_sin;  // [Hkv, D2, 64]: the angles from a page's first token to each of its tokens
  const float *row_cos, *row_sin;    // the same as [Hkv, 64, D2], and kRowMultiple - 1 numbers that are read but not used
  float *out, *lse;                  // [B, Hkv, Q, C, N, width], [B, Hkv, Q, C, N]
  int64_t batch, heads, query_blocks, block, chunks, chunk_pages;  // B, Hkv, Q, N, C, pages of a chunk
  int64_t num_pages, planes, num_pairs;                            // P, D2, rotary pairs
  int64_t width;     // D: sums of values; 2 D: and behind them the sums of keys, which say something of values
  int64_t base_row;  // pages of the base angles from row to row: P, or 0 where all rows have the same
  float softcap;     // 0: none
};

namespace {

constexpr int kBlockPages = 16;  // pages that meet one table at a time: the table stays in the first-level cache

constexpr int64_t padded(int64_t planes) { return (planes + kRowMultiple - 1) / kRowMultiple * kRowMultiple; }

// The pages of one key/value head that a part of an attention reads: `first` to first + count - 1 of a row.
struct PageRange {
  int64_t row, head, first, count;

  int64_t tokens() const { return count * kTokens; }

  // The codes of `page`, counted from `first`; those of the next block are fetched before they are needed.
  const uint8_t* code_bytes(const AttentionJob& job, const Side& side, const Group& group, int64_t page,
                            int64_t subspace) const {
    const int64_t* pages = side.pages + row * job.num_pages + first;
    const int64_t offset = head * side.page_bytes + group.byte_offset + subspace * 8 * group.nbits;  // 64 codes: 8 nbits bytes
    __builtin_prefetch((const uint8_t*)pages[std::min(page + kBlockPages, count - 1)] + offset);
    return (const uint8_t*)pages[page] + offset;
  }

  // Fill `codes` [kBlockPages] with those of `num` pages from `page` on. Pages are looked up kPagesTogether at a time: the last
  // page's codes stand twice where `num` is odd.
  void read_codes(const AttentionJob& job, const Side& side, const Group& group, int64_t page, int64_t num, int64_t subspace,
                  PageCodes* codes) const {
    for (int64_t p = 0; p < num; p++) codes[p].read(code_bytes(job, side, group, page + p, subspace), group.nbits);
    if (num % kPagesTogether) codes[num] = codes[num - 1];
  }

  // The table of one plane of a subspace; a wide group has one table for all planes of a subspace.
  const void* table(const Group& group, int64_t subspace, int64_t plane = 0) const {
    const int64_t bytes = head * group.head_bytes + subspace * group.subspace_bytes;
    return (const uint8_t*)group.table + bytes + plane * (group.subspace_bytes / group.planes);
  }
};

}  // namespace
