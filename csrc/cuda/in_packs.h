// Which types of computation read packs of classes or features.
#pragma once

namespace fastkd::cuda {

// Double reads one element at a time: it is for checks, and its packs would be a tenth of all code. Neighbouring
// threads take neighbouring elements, so its accesses are wide all the same.
template <class T>
inline constexpr bool kInPacks = sizeof(T) == 4;

}  // namespace fastkd::cuda
