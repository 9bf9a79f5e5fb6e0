// The runtime of cusim, as kernels and their host call it. Its parts are compiled with it: fibers.h, waiting.h and
// scheduler.h.
//
// To be compiled without -fsanitize: it tells whichever sanitizer the process has, through weak
// symbols, about the fibers and about which of their accesses a barrier orders.
#include <cuda_runtime.h>

#include <mutex>
#include <string>
#include <utility>

#include "fibers.h"
#include "sanitizer.h"
#include "scheduler.h"
#include "waiting.h"

uint3 threadIdx, blockIdx;
dim3 blockDim, gridDim;

namespace cusim {
unsigned lane;

namespace {

int device_attribute(int attribute) {
  const auto set = device_attributes.find(attribute);
  if (set != device_attributes.end()) return set->second;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      return 4;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      return 227 << 10;
    case cudaDevAttrL2CacheSize:
      return 1 << 20;
    case cudaDevAttrComputeCapabilityMajor:
      return 9;
    case cudaDevAttrComputeCapabilityMinor:
      return 0;
    default:
      return -1;
  }
}

cudaError_t cluster_of(const cudaLaunchConfig_t& config, unsigned* size) {
  *size = 1;
  for (unsigned i = 0; i < config.numAttrs; ++i) {
    if (config.attrs[i].id != cudaLaunchAttributeClusterDimension) continue;
    const auto& d = config.attrs[i].val.clusterDim;
    if (d.x == 0 || d.x > kMaxCluster || d.y != 1 || d.z != 1) return cudaErrorInvalidValue;
    *size = d.x;
  }
  if (*size > 1 && device_attribute(cudaDevAttrComputeCapabilityMajor) < 9) return cudaErrorNotSupported;
  return config.gridDim.x % *size ? cudaErrorInvalidConfiguration : cudaSuccess;
}

cudaError_t check(const cudaLaunchConfig_t& config, const void* kernel, unsigned* cluster_size) {
  const dim3 g = config.gridDim, b = config.blockDim;
  if (!g.x || !g.y || !g.z || g.x > 0x7fffffffu || g.y > 65535 || g.z > 65535) return cudaErrorInvalidConfiguration;
  if (!b.x || !b.y || !b.z || b.x > 1024 || b.y > 1024 || b.z > 64) return cudaErrorInvalidConfiguration;
  if (b.x * b.y * b.z > 1024) return cudaErrorInvalidConfiguration;
  const auto allowed = max_shared.find(kernel);
  if (config.dynamicSmemBytes > size_t(allowed == max_shared.end() ? 48 << 10 : allowed->second)) {
    return cudaErrorInvalidValue;
  }
  return cluster_of(config, cluster_size);
}

cudaError_t note(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}

}  // namespace

void fail(const char* what, Site site) {
  {
    const Unseen unseen;
    set_error(std::string(what) + ": " + thread_text(*self) + ", " + site_text(site));
  }
  abandon();
}

void* dynamic_shared() { return self->block->shared; }

void block_barrier(Site site) { block_barrier_count(0, site); }

int block_barrier_count(int predicate, Site site) {
  return wait_at(self->block->barrier, State::kInBlock, "__syncthreads", predicate, site);
}

unsigned cluster_rank() { return self->block->rank; }

unsigned cluster_size() { return current->cluster_size; }

void cluster_barrier(Site site) {
  wait_at(*current->cluster_barrier, State::kInCluster, "the cluster's barrier", 0, site);
}

void* map_shared(const void* p, unsigned rank, Site site) {
  const uintptr_t offset = reinterpret_cast<uintptr_t>(p) - reinterpret_cast<uintptr_t>(self->block->shared);
  if (offset >= current->shared_bytes) fail("map_shared: the address is not in this block's shared memory", site);
  if (rank >= current->cluster_size) fail("map_shared: no block of this rank in the cluster", site);
  const Block& b = current->cluster[rank];
  if (b.returned == current->threads) fail("map_shared: the block of this rank has left the cluster", site);
  return b.shared + offset;
}

const WarpSlots& warp_exchange(const char* name, unsigned mask, const uint64_t* words, int n, Site site) {
  enter_exchange(name, mask, words, n, site);
  if (failed) abandon();
  // The last to arrive may go on at once: that it does so in one order only shows what relies on it.
  if (self->state != State::kReady || order_mode != kForward) yield();
  return self->exchange->slots;
}

void warp_barrier(unsigned mask, Site site) {
  // A shuffle or a vote orders no memory accesses; this does.
  Warp& warp = *self->warp;
  void* tag = nullptr;
  if (const unsigned lanes = mask & present(warp)) {
    SyncTag& sync = warp.lanes[__builtin_ctz(lanes)].warp_sync;
    tag = &sync.tags[sync.generation & 1];
    release(tag);
    if (++sync.arrived == unsigned(__builtin_popcount(lanes))) {
      sync.arrived = 0;
      ++sync.generation;
    }
  }
  warp_exchange("__syncwarp", mask, nullptr, 0, site);
  acquire(tag);
}

bool async_eager() { return order_mode == kRandom ? rng() & 1 : order_mode == kReverse; }

void async_issue(AsyncCopy copy) {
  const Unseen unseen;
  copy.group = self->groups;
  self->copies.push_back(copy);
}

void async_commit() { ++self->groups; }

bool async_take(int pending, AsyncCopy* out) {
  const Unseen unseen;
  Fiber* f = self;
  if (f->copies_done == f->copies.size()) {
    f->copies.clear();
    f->copies_done = 0;
    return false;
  }
  *out = f->copies[f->copies_done];
  if (out->group >= f->groups - pending) return false;
  ++f->copies_done;
  return true;
}

cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel, void (*thunk)(void*), void* arguments) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  const Unseen unseen;
  Launch l{};
  const cudaError_t refused = check(config, kernel, &l.cluster_size);
  if (refused != cudaSuccess) return note(refused);
  l.thunk = thunk;
  l.arguments = arguments;
  l.threads = config.blockDim.x * config.blockDim.y * config.blockDim.z;
  l.shared_bytes = config.dynamicSmemBytes;
  gridDim = config.gridDim;
  blockDim = config.blockDim;
  rng.seed(order_seed);
  failed = false;
  current = &l;
  run_grid();
  current = nullptr;
  self = nullptr;
  return note(failed ? cudaErrorLaunchFailure : cudaSuccess);
}

cudaError_t func_set_attribute(const void* kernel, cudaFuncAttribute attribute, int value) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (value < 0 || value > device_attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin)) {
    return note(cudaErrorInvalidValue);
  }
  max_shared[kernel] = value;
  return cudaSuccess;
}

cudaError_t get_device(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t device_get_attribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return note(cudaErrorInvalidDevice);
  const int found = device_attribute(attribute);
  if (found < 0) return note(cudaErrorInvalidValue);
  *value = found;
  return cudaSuccess;
}

cudaError_t get_last_error() { return std::exchange(last_error, cudaSuccess); }

cudaError_t peek_at_last_error() { return last_error; }

const char* get_error_string(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidValue:
      return "invalid argument";
    case cudaErrorInvalidConfiguration:
      return "invalid configuration argument";
    case cudaErrorInvalidDevice:
      return "invalid device ordinal";
    case cudaErrorNotSupported:
      return "operation not supported";
    case cudaErrorLaunchFailure:
      return error_text.c_str();
    default:
      return "unrecognized error code";
  }
}

}  // namespace cusim

const char* cusim_error() { return cusim::failed ? cusim::error_text.c_str() : nullptr; }

void cusim_order(int mode, unsigned seed) {
  cusim::order_mode = mode;
  cusim::order_seed = seed;
}

void cusim_device(int attribute, int value) {
  if (value < 0) {
    cusim::device_attributes.erase(attribute);
  } else {
    cusim::device_attributes[attribute] = value;
  }
}

void cusim_races_in_cluster_only(int yes) { cusim::races_in_cluster_only = yes; }
