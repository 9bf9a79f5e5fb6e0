// The only place where a value of an enumeration becomes a constant of the compiler.
#pragma once
#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/inline.h"

namespace fastkd {

// f(std::integral_constant<E, value>()). E's values are 0, 1, ..., and kCount is their number.
template <class E, E kFirst = E(0), class F>
FASTKD_HD decltype(auto) with_constant(E value, F&& f) {
  constexpr E kNext = E(int64_t(kFirst) + 1);
  if constexpr (kNext != E::kCount) {
    if (value != kFirst) return with_constant<E, kNext>(value, std::forward<F>(f));
  }
  return f(std::integral_constant<E, kFirst>());
}

}  // namespace fastkd
