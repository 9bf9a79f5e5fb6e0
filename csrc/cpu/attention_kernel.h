// Attention maps compiled for one instruction set, as the binding sees them.
#pragma once
#include "common/params.h"

namespace fastkd {

template <class T>
struct AttentionKernel {
  // out[i] = sum over the C elements of |x|^p, of rows begin + i
  void (*powers)(const RowsTensor& x, int64_t C, double p, int64_t begin, int64_t end, double* out);
  // grad = slope[i] |x|^(p - 1) sign x; stream: past the caches
  void (*slopes)(const RowsTensor& x, const RowsTensor& grad, int64_t C, double p, int64_t begin, int64_t end,
                 const double* slope, bool stream);
};

// One for each level of isa.h.
namespace baseline {
template <class T>
const AttentionKernel<T>& attention_kernel();
}
namespace avx2 {
template <class T>
const AttentionKernel<T>& attention_kernel();
}
namespace avx512 {
template <class T>
const AttentionKernel<T>& attention_kernel();
}

}  // namespace fastkd
