// The codes of one subspace of a page, from bytes to numbers. `packing.py` says how they lie.

#pragma once

#include <cstdint>
#include <cstring>

namespace {

constexpr int kTokens = 64;  // of one page

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

inline void unpack(const uint8_t* bytes, int nbits, int32_t* index) {
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

}  // namespace
