// Numbers of a call. They travel as a tensor in the CPU's memory, which the host reads on any device without waiting;
// see fastkd/ops/numbers.py.
#pragma once
#include <vector>

#include "common/arguments.h"
#include "common/check.h"

namespace fastkd {

inline std::vector<double> numbers(const Tensor& x, int64_t count, const char* name) {
  FASTKD_CHECK(
      x.is_cpu() && x.scalar_type() == torch::headeronly::ScalarType::Double && x.is_contiguous() && x.numel() == count,
      name, ": a contiguous float64 tensor on the CPU wanted, with elements: ", count);
  const double* values = static_cast<const double*>(x.const_data_ptr());
  return {values, values + count};
}

inline double number(const Tensor& x, const char* name) { return numbers(x, 1, name)[0]; }

}  // namespace fastkd
