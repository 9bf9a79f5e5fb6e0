// What every CUDA binding starts with: the device of its tensors, and their stream.
// FASTKD_CUSIM: host memory instead, for the tests.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#if !defined(FASTKD_CUSIM)
#include <torch/csrc/stable/accelerator.h>
#endif

#include "common/check.h"
#include "cuda/rows_launch.h"

#if !defined(FASTKD_CUSIM)
// torch has it where it was built with CUDA; this library loads where it was not as well
#pragma weak aoti_torch_get_current_cuda_stream
#endif

#define FASTKD_CUDA_CHECK(call)                                                                   \
  do {                                                                                            \
    const cudaError_t e = (call);                                                                 \
    FASTKD_CHECK(e == cudaSuccess, "CUDA: ", cudaGetErrorString(e), " (", int(e), ") at " #call); \
  } while (false)

namespace fastkd::cuda {

// The device of a tensor, made the current one, and its current stream.
class Context {
 public:
#if defined(FASTKD_CUSIM)
  explicit Context(const torch::stable::Tensor&) { FASTKD_CUDA_CHECK(current_device(device)); }
#else
  explicit Context(const torch::stable::Tensor& x) : guard_(x.get_device_index()) {
    FASTKD_CHECK(aoti_torch_get_current_cuda_stream, "this torch was built without CUDA");
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &current));
    stream = static_cast<cudaStream_t>(current);
    FASTKD_CUDA_CHECK(current_device(device));
  }
#endif
  Device device{};
  cudaStream_t stream = nullptr;

#if !defined(FASTKD_CUSIM)
 private:
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

inline bool lies_with(const torch::stable::Tensor& x, const torch::stable::Tensor& student) {
#if defined(FASTKD_CUSIM)
  return x.is_cpu() && student.is_cpu();
#else
  return x.is_cuda() && x.get_device_index() == student.get_device_index();
#endif
}

}  // namespace fastkd::cuda
