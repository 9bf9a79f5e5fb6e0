// The schema of every op. Fakes and autograd are in fastkd/ops.
#include <torch/csrc/stable/library.h>

// What all ops of the rows schedule are told. *_rows: one value per row, [N], in the compute
// dtype; no normalizer and no normalizer_tensor: the reduction's own divisor.
#define ROWS_OPTIONS                                                                               \
  "int divergence, float temperature, Tensor? temperature_rows, float teacher_temperature, "       \
  "Tensor? teacher_temperature_rows, bool t_squared, Tensor? mask, Tensor? weight, int reduction," \
  " float? normalizer, Tensor? normalizer_tensor"

STABLE_TORCH_LIBRARY(fastkd, m) {
  // save: 0 nothing, 1 the gradient (upstream 1), 2 the statistics for rows_bwd; what is not
  // saved is empty
  m.def("rows_fwd(Tensor student, Tensor teacher, " ROWS_OPTIONS
        ", int save) -> (Tensor loss, Tensor grad, Tensor stats)");
  m.def("rows_fwd_(Tensor(a!) student, Tensor teacher, " ROWS_OPTIONS ") -> Tensor loss");
  m.def("rows_bwd(Tensor student, Tensor teacher, " ROWS_OPTIONS ", Tensor stats, Tensor upstream) -> Tensor grad");
  m.def("rows_bwd_(Tensor(a!) student, Tensor teacher, " ROWS_OPTIONS ", Tensor stats, Tensor upstream) -> ()");
  m.def("cpu_isa(str name) -> str");
}
