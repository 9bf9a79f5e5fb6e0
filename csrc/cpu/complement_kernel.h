// What sums the classes of a row beside K of them, compiled for one instruction set, as the binding sees it.
#pragma once
#include "common/complement_params.h"

namespace fastkd {

template <class T>
struct ComplementKernel {
  // Rows begin to end.
  void (*forward)(const ComplementParams<T>&, int64_t begin, int64_t end);
  void (*backward)(const ComplementParams<T>&, int64_t begin, int64_t end);
};

// One for each level of isa.h.
namespace baseline {
template <class T>
const ComplementKernel<T>& complement_kernel();
}
namespace avx2 {
template <class T>
const ComplementKernel<T>& complement_kernel();
}
namespace avx512 {
template <class T>
const ComplementKernel<T>& complement_kernel();
}

}  // namespace fastkd
