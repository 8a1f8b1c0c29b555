// What attention.cpp is asked to do. `cpu/attention.py` lays it out.

#pragma once

#include <cstdint>

struct Group {
  int64_t byte_offset, num_subspaces, nbits, planes, first_plane, table, head_bytes, subspace_bytes, wide;
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
  const float *step_cos, *step_sin;      // [Hkv, D2, 64]
  const float *row_cos, *row_sin;        // [Hkv, 64, D2], and fifteen more numbers
  float *out, *lse;                      // [B, Hkv, Q, C, N, D], [B, Hkv, Q, C, N]
  int64_t batch, heads, query_blocks, block, chunks, chunk_pages, num_pages, planes, num_pairs, base_row;  // block: N
  float softcap;  // 0: none
};
