// The only place where a dtype becomes a C++ type.
#pragma once
#include <torch/headeronly/core/ScalarType.h>

#include <utility>

#include "common/check.h"
#include "common/params.h"

namespace fastkd {

using torch::headeronly::ScalarType;

inline DType to_dtype(ScalarType type, const char* argument) {
  switch (type) {
    case ScalarType::Half:
      return DType::kHalf;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::Double:
      return DType::kDouble;
    default:
      FASTKD_CHECK(false, argument, ": float16, bfloat16, float32 or float64 wanted");
      return {};
  }
}

// What is computed in: double where an input is double, else float.
inline ScalarType compute_type(ScalarType a, ScalarType b) {
  return a == ScalarType::Double || b == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// f(T()) with T the compute type.
template <class F>
auto dispatch_compute(ScalarType type, F&& f) {
  return type == ScalarType::Double ? f(double()) : f(float());
}

}  // namespace fastkd
