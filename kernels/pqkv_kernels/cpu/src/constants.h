// Numbers of a job that loops want to know when they are compiled, so that what they count stays in registers.

#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace {

// Call `work` with `number` as a type whose value is known, where it is one of KNOWN; returns whether it is.
template <const auto& KNOWN, size_t I = 0, typename Work>
inline bool with_constant(int64_t number, const Work& work) {
  if constexpr (I == std::extent_v<std::remove_reference_t<decltype(KNOWN)>>) {
    return false;
  } else {
    if (number != KNOWN[I]) return with_constant<KNOWN, I + 1>(number, work);
    work(std::integral_constant<int, KNOWN[I]>{});
    return true;
  }
}

}  // namespace
