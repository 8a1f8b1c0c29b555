// The codes of one subspace of a page: from packed bytes to numbers, and from numbers to the points that a table has for them.
//
// As pqkv_kernels.format.layout says, a code of `nbits` bits is cut into parts of 8, 4, 2 and 1 bits, the widest of which comes
// first and holds the lowest bits. A part of w bits takes 8 w bytes for the 64 tokens of a page: token t has bits w t to w (t +
// 1).

#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "simd.h"

namespace {

constexpr int kTokens = 64;  // of one page

// ---- Bytes to numbers ----------------------------------------------------------------------------------------------------
//
// Everywhere below, the parts of a code after its first `low` bits begin 8 * low bytes on.

#ifdef __AVX512BW__

// The parts of less than eight bits, which begin at `bytes`: one byte for each of 64 tokens.
inline __m512i narrow_parts(const uint8_t* bytes, int nbits) {
  __m512i codes = _mm512_setzero_si512();
  int low = 0;
  if (nbits & 4) {  // a byte holds two tokens: widened to two bytes, the upper one gets the second token's bits
    const __m512i x = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)bytes));
    codes = _mm512_and_si512(_mm512_or_si512(x, _mm512_slli_epi16(x, 4)), _mm512_set1_epi8(0x0F));
    low = 4;
  }
  if (nbits & 2) {  // a byte holds four tokens: widened to four bytes, cut into pairs of tokens and then into tokens
    const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(bytes + 8 * low)));
    const __m512i pairs = _mm512_or_si512(x, _mm512_slli_epi32(x, 12));  // tokens 0 and 1 from bit 0 on, 2 and 3 from bit 16 on
    const __m512i part = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 6)), _mm512_set1_epi8(3));
    codes = _mm512_or_si512(codes, low ? _mm512_slli_epi16(part, 4) : part);
    low += 2;
  }
  if (nbits & 1) {  // a bit for every token is a mask of bytes
    uint64_t set;
    std::memcpy(&set, bytes + 8 * low, 8);
    codes = _mm512_or_si512(codes, _mm512_maskz_set1_epi8(set, (char)(1 << low)));
  }
  return codes;
}

// The codes of 64 tokens.
inline void unpack(const uint8_t* bytes, int nbits, uint16_t* codes) {
  const bool has_byte = nbits & 8;
  const __m512i narrow = narrow_parts(bytes + (has_byte ? kTokens : 0), nbits);
  for (int half = 0; half < 2; half++) {
    __m512i code = _mm512_cvtepu8_epi16(half ? _mm512_extracti64x4_epi64(narrow, 1) : _mm512_castsi512_si256(narrow));
    if (has_byte) {
      const __m256i low = _mm256_loadu_si256((const __m256i*)(bytes + 32 * half));
      code = _mm512_or_si512(_mm512_slli_epi16(code, 8), _mm512_cvtepu8_epi16(low));
    }
    _mm512_storeu_si512(codes + 32 * half, code);
  }
}

#elif defined(__AVX2__)

// The parts of less than eight bits, which begin at `bytes`: one byte for each of 32 tokens, those of one half of the page.
// Steps are those of the form above.
inline __m256i narrow_parts(const uint8_t* bytes, int nbits, int half) {
  __m256i codes = _mm256_setzero_si256();
  int low = 0;
  if (nbits & 4) {
    const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(bytes + 16 * half)));
    codes = _mm256_and_si256(_mm256_or_si256(x, _mm256_slli_epi16(x, 4)), _mm256_set1_epi8(0x0F));
    low = 4;
  }
  if (nbits & 2) {
    const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(bytes + 8 * low + 8 * half)));
    const __m256i pairs = _mm256_or_si256(x, _mm256_slli_epi32(x, 12));
    const __m256i part = _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi32(pairs, 6)), _mm256_set1_epi8(3));
    codes = _mm256_or_si256(codes, low ? _mm256_slli_epi16(part, 4) : part);
    low += 2;
  }
  if (nbits & 1) {  // there is no mask of bytes: every token gets the byte that holds its bit, and asks for that bit
    int32_t set;
    std::memcpy(&set, bytes + 8 * low + 4 * half, 4);
    const __m256i byte = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);  // t / 8 of token t
    const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201);                                    // 1 << t % 8
    const __m256i own = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(set), byte), bit);
    codes = _mm256_or_si256(codes, _mm256_and_si256(_mm256_cmpeq_epi8(own, bit), _mm256_set1_epi8((char)(1 << low))));
  }
  return codes;
}

// The codes of 64 tokens.
inline void unpack(const uint8_t* bytes, int nbits, uint16_t* codes) {
  const bool has_byte = nbits & 8;
  for (int half = 0; half < 2; half++) {
    const __m256i narrow = narrow_parts(bytes + (has_byte ? kTokens : 0), nbits, half);
    for (int quarter = 0; quarter < 2; quarter++) {
      const int first = 32 * half + 16 * quarter;
      __m256i code = _mm256_cvtepu8_epi16(quarter ? _mm256_extracti128_si256(narrow, 1) : _mm256_castsi256_si128(narrow));
      if (has_byte) {
        const __m256i low = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(bytes + first)));
        code = _mm256_or_si256(_mm256_slli_epi16(code, 8), low);
      }
      _mm256_storeu_si256((__m256i*)(codes + first), code);
    }
  }
}

#else

// Spread a part of `width` bits over one byte for each token. A byte holds 8 / width tokens: it is shifted to where each of
// them belongs, and the bits of the others are masked away. The first token is the lowest byte, for the machine is
// little-endian.
inline void spread(const uint8_t* bytes, int width, uint8_t* to) {
  if (width == 4) {
    uint16_t tokens[32];
    for (int i = 0; i < 32; i++) tokens[i] = (bytes[i] | bytes[i] << 4) & 0x0F0F;
    std::memcpy(to, tokens, kTokens);
  } else if (width == 2) {
    uint32_t tokens[16];
    for (int i = 0; i < 16; i++) tokens[i] = (bytes[i] | bytes[i] << 6 | bytes[i] << 12 | bytes[i] << 18) & 0x03030303;
    std::memcpy(to, tokens, kTokens);
  } else {
    uint64_t tokens[8];
    for (int i = 0; i < 8; i++) {
      uint64_t b = bytes[i];
      b |= b << 28;
      b |= b << 14;
      tokens[i] = (b | b << 7) & 0x0101010101010101;
    }
    std::memcpy(to, tokens, kTokens);
  }
}

// The codes of 64 tokens.
inline void unpack(const uint8_t* bytes, int nbits, uint16_t* codes) {
  int low = 0;
  for (int width = 8; width; width /= 2) {
    if (!(nbits & width)) continue;
    uint8_t part[kTokens];
    width == 8 ? (void)std::memcpy(part, bytes, kTokens) : spread(bytes + 8 * low, width, part);
    if (low)
      for (int t = 0; t < kTokens; t++) codes[t] |= part[t] << low;
    else
      for (int t = 0; t < kTokens; t++) codes[t] = part[t];
    low += width;
  }
}

#endif

// ---- Numbers to points ---------------------------------------------------------------------------------------------------
//
// A table holds the points of one plane (a channel pair), one for each code. It has two forms, and which one is read is decided
// when this is built; `pqkv_byte_tables` says it:
// - bytes, where a processor looks up 64 of them in one instruction (AVX-512 VBMI): [x, y][3][entries], the upper three bytes
//   of a float, lowest first, at least 2^kFewestBits entries;
// - floats elsewhere: [entries][2].

constexpr int kPageVectors = kTokens / kLanes;  // of one coordinate of a page
constexpr int kPagesTogether = 2;               // that share what is loaded of a table
constexpr int kFewestBits = 7;                  // a table of bytes that has fewer than 2^7 entries is filled up

#ifdef __AVX512VBMI__

constexpr int kByteTables = 1;
constexpr int kHighBits = 5;  // of a code, from the eighth on: codes have up to twelve

// The points of one page.
struct Points {
  Floats x[kPageVectors], y[kPageVectors];

  Point at(int first) const { return {x[first / kLanes], y[first / kLanes]}; }
};

// The order in which tokens are looked up. `join` makes floats of bytes by unpacking, which works on every 16 bytes alone: of
// each 16, bytes 4 j to 4 j + 3 become floats of vector j. So byte 16 l + 4 j + i is the one of token 16 j + 4 l + i, and
// vector j has tokens 16 j to 16 j + 15 one after the other.
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
  __mmask64 bits[kHighBits];  // one bit of every token's code, from the eighth on

  void read(const uint8_t* bytes, int nbits) {
    const __m512i order = _mm512_load_si512(kOrder.token);
    const __m512i narrow = _mm512_permutexvar_epi8(order, narrow_parts(bytes + (nbits & 8 ? kTokens : 0), nbits));
    low = nbits & 8 ? _mm512_permutexvar_epi8(order, _mm512_loadu_si512(bytes)) : narrow;
    bits[0] = _mm512_movepi8_mask(low);
    for (int i = 8; i < nbits; i++) bits[i - 7] = _mm512_test_epi8_mask(narrow, _mm512_set1_epi8(1 << (i - 8)));
  }
};

// One byte of every code's entry, for some pages.
struct Bytes {
  __m512i page[kPagesTogether];
};

// Look up bytes in a table of 2^BITS of them. One instruction knows 128 entries; from there on the next bit of a code chooses
// between what the two halves of the table give.
template <int BITS>
__attribute__((always_inline)) inline Bytes look_up_bytes(const uint8_t* table, const PageCodes* codes) {
  Bytes bytes;
  if constexpr (BITS == kFewestBits) {
    const __m512i first = _mm512_loadu_si512(table), second = _mm512_loadu_si512(table + 64);
    for (int p = 0; p < kPagesTogether; p++) bytes.page[p] = _mm512_permutex2var_epi8(first, codes[p].low, second);
  } else {
    constexpr int half = 1 << (BITS - 1);
    const Bytes lower = look_up_bytes<BITS - 1>(table, codes), upper = look_up_bytes<BITS - 1>(table + half, codes);
    for (int p = 0; p < kPagesTogether; p++)
      bytes.page[p] = _mm512_mask_blend_epi8(codes[p].bits[BITS - 8], lower.page[p], upper.page[p]);
  }
  return bytes;
}

// Floats of their upper three bytes; the lowest byte is zero.
__attribute__((always_inline)) inline void join(__m512i low, __m512i middle, __m512i top, Floats* floats) {
  const __m512i zero = _mm512_setzero_si512();
  const __m512i lower[2] = {_mm512_unpacklo_epi8(zero, low), _mm512_unpackhi_epi8(zero, low)};
  const __m512i upper[2] = {_mm512_unpacklo_epi8(middle, top), _mm512_unpackhi_epi8(middle, top)};
  for (int half = 0; half < 2; half++) {
    floats[2 * half] = (Floats)_mm512_unpacklo_epi16(lower[half], upper[half]);
    floats[2 * half + 1] = (Floats)_mm512_unpackhi_epi16(lower[half], upper[half]);
  }
}

// One coordinate of every code's entry, for some pages.
template <int BITS, Floats (Points::*COORDINATE)[kPageVectors]>
__attribute__((always_inline)) inline void look_up(const uint8_t* table, const PageCodes* codes, Points* points) {
  constexpr int entries = 1 << BITS;
  const Bytes low = look_up_bytes<BITS>(table, codes), middle = look_up_bytes<BITS>(table + entries, codes);
  const Bytes top = look_up_bytes<BITS>(table + 2 * entries, codes);
  for (int p = 0; p < kPagesTogether; p++) join(low.page[p], middle.page[p], top.page[p], points[p].*COORDINATE);
}

// Fill `points` [kPagesTogether].
template <int BITS>
__attribute__((always_inline)) inline void look_up(const void* table, const PageCodes* codes, Points* points) {
  look_up<BITS, &Points::x>((const uint8_t*)table, codes, points);
  look_up<BITS, &Points::y>((const uint8_t*)table + (3 << BITS), codes, points);
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
  uint16_t code[kTokens];

  void read(const uint8_t* bytes, int nbits) { unpack(bytes, nbits, code); }
};

// The points of one page, looked up when they are needed, so that they stay in registers.
struct Points {
  const float* table;
  const uint16_t* code;

  Point at(int first) const { return gather(table, code + first); }
};

template <int BITS>
inline void look_up(const void* table, const PageCodes* codes, Points* points) {
  for (int p = 0; p < kPagesTogether; p++) points[p] = {(const float*)table, codes[p].code};
}

// Tables of floats are read alike whatever the width of codes.
template <typename Work>
inline void with_width(int64_t, const Work& work) {
  work(std::integral_constant<int, 0>{});
}

#endif

}  // namespace
