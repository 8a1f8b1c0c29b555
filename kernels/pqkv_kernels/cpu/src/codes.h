// The codes of one subspace of a page, from bytes to numbers. `packing.py` says how they lie.

#pragma once

#include <cstdint>
#include <cstring>

#ifdef __AVX2__
#include <immintrin.h>
#endif

namespace {

constexpr int kTokens = 64;  // of one page

#ifdef __AVX512BW__

// The parts of less than eight bits, from `bytes` on, lowest first: one byte for each of 64 tokens.
inline __m512i narrow_parts(const uint8_t* bytes, int nbits) {
  __m512i found = _mm512_setzero_si512();
  int low = 0;
  if (nbits & 4) {
    const __m512i x = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)bytes));
    found = _mm512_and_si512(_mm512_or_si512(x, _mm512_slli_epi16(x, 4)), _mm512_set1_epi8(0x0F));
    low = 4;
  }
  if (nbits & 2) {
    const __m512i x = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)(bytes + 8 * low)));
    const __m512i pairs = _mm512_or_si512(x, _mm512_slli_epi32(x, 12));  // bits of tokens 0 and 1, then of 2 and 3
    const __m512i part = _mm512_and_si512(_mm512_or_si512(pairs, _mm512_slli_epi32(pairs, 6)), _mm512_set1_epi8(3));
    found = _mm512_or_si512(found, low ? _mm512_slli_epi16(part, 4) : part);
    low += 2;
  }
  if (nbits & 1) {
    uint64_t set;
    std::memcpy(&set, bytes + 8 * low, 8);
    found = _mm512_or_si512(found, _mm512_maskz_set1_epi8(set, (char)(1 << low)));
  }
  return found;
}

// The codes of 64 tokens, packed as `packing.py` says.
inline void unpack(const uint8_t* bytes, int nbits, uint16_t* index) {
  const bool is_wide = nbits & 8;
  const __m512i narrow = narrow_parts(bytes + (is_wide ? kTokens : 0), nbits);
  for (int half = 0; half < 2; half++) {
    __m512i found = _mm512_cvtepu8_epi16(half ? _mm512_extracti64x4_epi64(narrow, 1) : _mm512_castsi512_si256(narrow));
    if (is_wide) {
      const __m256i low = _mm256_loadu_si256((const __m256i*)(bytes + 32 * half));
      found = _mm512_or_si512(_mm512_slli_epi16(found, 8), _mm512_cvtepu8_epi16(low));
    }
    _mm512_storeu_si512(index + 32 * half, found);
  }
}

#elif defined(__AVX2__)

// The parts of less than eight bits, from `bytes` on, lowest first: one byte for each of 32 tokens, the first or the second ones.
inline __m256i narrow_parts(const uint8_t* bytes, int nbits, int half) {
  __m256i found = _mm256_setzero_si256();
  int low = 0;
  if (nbits & 4) {
    const __m256i x = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(bytes + 16 * half)));
    found = _mm256_and_si256(_mm256_or_si256(x, _mm256_slli_epi16(x, 4)), _mm256_set1_epi8(0x0F));
    low = 4;
  }
  if (nbits & 2) {
    const __m256i x = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)(bytes + 8 * low + 8 * half)));
    const __m256i pairs = _mm256_or_si256(x, _mm256_slli_epi32(x, 12));  // bits of tokens 0 and 1, then of 2 and 3
    const __m256i part = _mm256_and_si256(_mm256_or_si256(pairs, _mm256_slli_epi32(pairs, 6)), _mm256_set1_epi8(3));
    found = _mm256_or_si256(found, low ? _mm256_slli_epi16(part, 4) : part);
    low += 2;
  }
  if (nbits & 1) {
    int32_t set;
    std::memcpy(&set, bytes + 8 * low + 4 * half, 4);
    const __m256i from = _mm256_set_epi64x(0x0303030303030303, 0x0202020202020202, 0x0101010101010101, 0);  // whose byte is asked
    const __m256i asked = _mm256_set1_epi64x((int64_t)0x8040201008040201);
    const __m256i bits = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(set), from), asked);
    found = _mm256_or_si256(found, _mm256_and_si256(_mm256_cmpeq_epi8(bits, asked), _mm256_set1_epi8((char)(1 << low))));
  }
  return found;
}

// The codes of 64 tokens, packed as `packing.py` says.
inline void unpack(const uint8_t* bytes, int nbits, uint16_t* index) {
  const bool is_wide = nbits & 8;
  for (int half = 0; half < 2; half++) {
    const __m256i narrow = narrow_parts(bytes + (is_wide ? kTokens : 0), nbits, half);
    for (int quarter = 0; quarter < 2; quarter++) {
      const int first = 32 * half + 16 * quarter;
      __m256i found = _mm256_cvtepu8_epi16(quarter ? _mm256_extracti128_si256(narrow, 1) : _mm256_castsi256_si128(narrow));
      if (is_wide) {
        const __m256i low = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)(bytes + first)));
        found = _mm256_or_si256(_mm256_slli_epi16(found, 8), low);
      }
      _mm256_storeu_si256((__m256i*)(index + first), found);
    }
  }
}

#else

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

inline void unpack(const uint8_t* bytes, int nbits, uint16_t* index) {
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

#endif

}  // namespace
