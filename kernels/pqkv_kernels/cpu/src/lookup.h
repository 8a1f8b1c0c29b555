// Centroids of two channels by their codes: the points of one page of tokens, both coordinates apart.
//
// Two forms of a table, told apart when this is built; `pqkv_byte_tables` says which one it reads:
// - bytes, where a processor looks up 64 of them in one instruction (AVX-512 VBMI): [x, y][3][entries], the upper three bytes
//   of a float, lowest first, at least 128 entries;
// - floats elsewhere: [entries][2].

#pragma once

#include <cstdint>
#include <type_traits>

#include "codes.h"
#include "vectors.h"

namespace {

constexpr int kVectors = kTokens / kLanes;  // of one coordinate of a page
constexpr int kPagesTogether = 2;           // that share what is loaded of a table

#ifdef __AVX512VBMI__

constexpr int kByteTables = 1;
constexpr int kFewestBits = 7;  // a table of fewer entries is filled up
constexpr int kMostBits = 5;    // of a code, from the eighth on

// The points of one page.
struct Points {
  Floats x[kVectors], y[kVectors];

  Point at(int first) const { return {x[first / kLanes], y[first / kLanes]}; }
};

// In this order bytes become floats of the tokens one after the other: place 16 l + 4 j + i is token 16 j + 4 l + i's.
struct alignas(64) Order {
  uint8_t token[kTokens];
  constexpr Order() : token() {
    for (int k = 0; k < kTokens; k++) token[k] = k / 4 % 4 * 16 + k / 16 * 4 + k % 4;
  }
};
constexpr Order kOrder;

// Codes of 64 tokens, in `kOrder`.
struct PageCodes {
  __m512i low;                // the lower eight bits
  __mmask64 bits[kMostBits];  // those from the eighth on

  void read(const uint8_t* bytes, int nbits) {
    const __m512i from = _mm512_load_si512(kOrder.token);
    const __m512i narrow = _mm512_permutexvar_epi8(from, narrow_parts(bytes + (nbits & 8 ? kTokens : 0), nbits));
    low = nbits & 8 ? _mm512_permutexvar_epi8(from, _mm512_loadu_si512(bytes)) : narrow;
    bits[0] = _mm512_movepi8_mask(low);
    for (int i = 8; i < nbits; i++) bits[i - 7] = _mm512_test_epi8_mask(narrow, _mm512_set1_epi8(1 << (i - 8)));
  }
};

// One byte of every code's entry, for some pages: two to the power of BITS bytes are `table`.
struct Bytes {
  __m512i page[kPagesTogether];
};

template <int BITS>
__attribute__((always_inline)) inline Bytes find(const uint8_t* table, const PageCodes* codes) {
  Bytes found;
  if constexpr (BITS == kFewestBits) {
    const __m512i first = _mm512_loadu_si512(table), second = _mm512_loadu_si512(table + 64);
    for (int p = 0; p < kPagesTogether; p++) found.page[p] = _mm512_permutex2var_epi8(first, codes[p].low, second);
  } else {
    const Bytes lower = find<BITS - 1>(table, codes), upper = find<BITS - 1>(table + (1 << (BITS - 1)), codes);
    for (int p = 0; p < kPagesTogether; p++)
      found.page[p] = _mm512_mask_blend_epi8(codes[p].bits[BITS - 8], lower.page[p], upper.page[p]);
  }
  return found;
}

// Floats of their upper three bytes.
__attribute__((always_inline)) inline void join(__m512i low, __m512i middle, __m512i top, Floats* found) {
  const __m512i zero = _mm512_setzero_si512();
  const __m512i lower[2] = {_mm512_unpacklo_epi8(zero, low), _mm512_unpackhi_epi8(zero, low)};
  const __m512i upper[2] = {_mm512_unpacklo_epi8(middle, top), _mm512_unpackhi_epi8(middle, top)};
  for (int half = 0; half < 2; half++) {
    found[2 * half] = (Floats)_mm512_unpacklo_epi16(lower[half], upper[half]);
    found[2 * half + 1] = (Floats)_mm512_unpackhi_epi16(lower[half], upper[half]);
  }
}

// One coordinate of every code's entry, for some pages.
template <int BITS, Floats (Points::*COORDINATE)[kVectors]>
__attribute__((always_inline)) inline void look_up(const uint8_t* table, const PageCodes* codes, Points* found) {
  constexpr int entries = 1 << BITS;
  const Bytes low = find<BITS>(table, codes), middle = find<BITS>(table + entries, codes);
  const Bytes top = find<BITS>(table + 2 * entries, codes);
  for (int p = 0; p < kPagesTogether; p++) join(low.page[p], middle.page[p], top.page[p], found[p].*COORDINATE);
}

// Fill `found` [kPagesTogether].
template <int BITS>
__attribute__((always_inline)) inline void look_up(const void* table, const PageCodes* codes, Points* found) {
  look_up<BITS, &Points::x>((const uint8_t*)table, codes, found);
  look_up<BITS, &Points::y>((const uint8_t*)table + (3 << BITS), codes, found);
}

// Call `work` with the width of codes as a type: tables of each have loops of their own.
template <typename Work>
inline void with_width(int64_t nbits, const Work& work) {
  switch (nbits) {
    case 8: return work(std::integral_constant<int, 8>{});
    case 9: return work(std::integral_constant<int, 9>{});
    case 10: return work(std::integral_constant<int, 10>{});
    case 11: return work(std::integral_constant<int, 11>{});
    case 12: return work(std::integral_constant<int, 12>{});
    default: return work(std::integral_constant<int, kFewestBits>{});
  }
}

#else

constexpr int kByteTables = 0;

struct PageCodes {
  uint16_t index[kTokens];

  void read(const uint8_t* bytes, int nbits) { unpack(bytes, nbits, index); }
};

// The points of one page, looked up when they are needed, so that they stay in registers.
struct Points {
  const float* table;
  const uint16_t* index;

  Point at(int first) const { return gathered(table, index + first); }
};

template <int BITS>
inline void look_up(const void* table, const PageCodes* codes, Points* found) {
  for (int p = 0; p < kPagesTogether; p++) found[p] = {(const float*)table, codes[p].index};
}

template <typename Work>
inline void with_width(int64_t, const Work& work) {
  work(std::integral_constant<int, 0>{});
}

#endif

}  // namespace
