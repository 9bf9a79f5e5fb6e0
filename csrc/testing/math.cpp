// The scalar mathematics of csrc/math, for the tests: the same headers, called element by element.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "common/enum.h"
#include "divergence_functors.h"
#include "math/half.h"

namespace py = pybind11;
using namespace fastkd::FASTKD_ISA;

namespace {

float half_to_float(uint16_t bits) { return to_float(Half{bits}); }
float bfloat16_to_float(uint16_t bits) { return to_float(BFloat16{bits}); }
uint16_t float_to_half(float x) { return to_half(x).bits; }
uint16_t float_to_bfloat16(float x) { return to_bfloat16(x).bits; }

template <class T>
T exp2_of(T x, T k) {
  return exp2_scaled(x, k, exp2_lowest(k));
}
template <class T>
T bregman_of(T w) {
  return bregman_series(w);
}
template <class T>
T log_ratio_of(T a, T x) {
  return log_ratio(a + x, a, x).log;
}

template <class T>
T loss(int64_t divergence, double parameter, T p, T q, T w) {
  return fastkd::with_constant(fastkd::Divergence(divergence),
                               [&](auto k) { return FunctorOf<k.value, T>(parameter).loss({p, q, w}); });
}
template <class T>
T slope(int64_t divergence, double parameter, T p, T q, T w) {
  return fastkd::with_constant(fastkd::Divergence(divergence),
                               [&](auto k) { return FunctorOf<k.value, T>(parameter).slope({p, q, w}); });
}

}  // namespace

PYBIND11_MODULE(_testing, m) {
  m.def("half_to_float", py::vectorize(half_to_float));
  m.def("bfloat16_to_float", py::vectorize(bfloat16_to_float));
  m.def("float_to_half", py::vectorize(float_to_half));
  m.def("float_to_bfloat16", py::vectorize(float_to_bfloat16));
  m.def("exp2_float", py::vectorize(exp2_of<float>));
  m.def("exp2_double", py::vectorize(exp2_of<double>));
  m.def("bregman_series_float", py::vectorize(bregman_of<float>));
  m.def("bregman_series_double", py::vectorize(bregman_of<double>));
  m.def("log_ratio_float", py::vectorize(log_ratio_of<float>));
  m.def("log_ratio_double", py::vectorize(log_ratio_of<double>));
  m.def("loss_float", py::vectorize(loss<float>));
  m.def("loss_double", py::vectorize(loss<double>));
  m.def("slope_float", py::vectorize(slope<float>));
  m.def("slope_double", py::vectorize(slope<double>));
}
