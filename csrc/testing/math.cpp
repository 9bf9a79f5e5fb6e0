// The scalar mathematics of csrc/math, for the tests: the same headers, called element by element.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "math/divergence.h"
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

template <class T, template <class> class D>
void divergence(py::module_& m, const char* loss, const char* grad) {
  m.def(loss, py::vectorize([](T p, T q, T w) { return D<T>::loss({p, q, w}); }));
  m.def(grad, py::vectorize([](T p, T q, T w) { return D<T>::grad({p, q, w}); }));
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
  divergence<float, ForwardKL>(m, "forward_kl_loss_float", "forward_kl_grad_float");
  divergence<double, ForwardKL>(m, "forward_kl_loss_double", "forward_kl_grad_double");
}
