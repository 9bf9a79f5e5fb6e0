// What standardizes logits, compiled for one instruction set, as the binding sees it.
#pragma once
#include "common/standardize_params.h"

namespace fastkd {

template <class T>
struct StandardizeKernel {
  // Rows begin to end.
  void (*forward)(const StandardizeParams<T>&, int64_t begin, int64_t end);
  void (*backward)(const StandardizeParams<T>&, int64_t begin, int64_t end);
};

// One for each level of isa.h.
namespace baseline {
template <class T>
const StandardizeKernel<T>& standardize_kernel();
}
namespace avx2 {
template <class T>
const StandardizeKernel<T>& standardize_kernel();
}
namespace avx512 {
template <class T>
const StandardizeKernel<T>& standardize_kernel();
}

}  // namespace fastkd
