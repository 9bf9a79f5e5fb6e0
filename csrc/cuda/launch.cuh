// One way to launch a kernel: shared memory raised where it must be, clusters where they are asked for.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#define FASTKD_CUDA_RETURN(call)                                  \
  do {                                                            \
    if (const cudaError_t e = (call); e != cudaSuccess) return e; \
  } while (false)

namespace fastkd::cuda {

class Launch {
 public:
  // most_shared: what a block can have on this device, where shared_bytes may be beyond 48 KB
  Launch(int64_t blocks, dim3 threads, int64_t shared_bytes, cudaStream_t stream, int most_shared = 0)
      : most_shared_(most_shared) {
    config_.gridDim = dim3(unsigned(blocks));
    config_.blockDim = threads;
    config_.dynamicSmemBytes = size_t(shared_bytes);
    config_.stream = stream;
    fits_ = blocks <= 0x7fffffff;
  }
  void cluster(int blocks) {
    if (blocks == 1) return;
    attribute_.id = cudaLaunchAttributeClusterDimension;
    attribute_.val.clusterDim.x = unsigned(blocks);
    attribute_.val.clusterDim.y = 1;
    attribute_.val.clusterDim.z = 1;
    clusters_ = true;
  }

  template <class... P, class... A>
  cudaError_t operator()(void (*kernel)(P...), const A&... arguments) const {
    if (!fits_) return cudaErrorInvalidConfiguration;
    if (config_.dynamicSmemBytes > (48u << 10)) {
      // The kernel's limit, not this launch's: always the same, so that threads cannot lower each other's.
      FASTKD_CUDA_RETURN(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most_shared_));
    }
    cudaLaunchConfig_t config = config_;
    cudaLaunchAttribute attribute = attribute_;
    if (clusters_) {
      config.attrs = &attribute;
      config.numAttrs = 1;
    }
    return cudaLaunchKernelEx(&config, kernel, static_cast<P>(arguments)...);
  }

 private:
  cudaLaunchConfig_t config_{};
  cudaLaunchAttribute attribute_{};
  int most_shared_;
  bool clusters_ = false, fits_ = true;
};

}  // namespace fastkd::cuda
