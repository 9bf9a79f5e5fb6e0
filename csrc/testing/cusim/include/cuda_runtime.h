// cusim: CUDA C++ kernels as host code, one fiber per CUDA thread, for tests.
//
// With this folder ahead of the CUDA toolkit's headers, `g++ -x c++` compiles a .cu file as it is.
// The types (float4, dim3, __nv_bfloat16, cudaLaunchConfig_t) and their conversions are NVIDIA's
// own; here is what only a device compiler has: built-in variables, barriers, clusters, warp
// collectives, atomics and the launch.
#pragma once
#define CUSIM 1
#include <cuda_runtime_api.h>
#include <driver_types.h>
#include <vector_functions.h>
#include <vector_types.h>

#include <cmath>
#include <cstdint>
#include <tuple>
#include <type_traits>

#undef __launch_bounds__
#define __launch_bounds__(...)
// The blocks of a cluster live at the same time: a static variable would be one for all of them.
#undef __shared__
#define __shared__ static_assert(false, "cusim: take shared memory dynamically, from cusim::dynamic_shared()");
#undef __cluster_dims__  // an attribute cannot be seen by the launch: cudaLaunchAttributeClusterDimension

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
inline constexpr int warpSize = 32;

namespace cusim {

// Where a kernel called a collective: for messages, and to tell one barrier from another.
struct Site {
  const char* file;
  int line;
  static constexpr Site here(const char* file = __builtin_FILE(), int line = __builtin_LINE()) { return {file, line}; }
};

// Ends the launch with cudaErrorLaunchFailure and this text.
[[noreturn]] void fail(const char* what, Site);

// ---- block and cluster
void* dynamic_shared();  // of this block, NaN (0xff) until written
void block_barrier(Site);
int block_barrier_count(int predicate, Site);
unsigned cluster_rank();
unsigned cluster_size();
void cluster_barrier(Site);  // barrier.cluster.arrive.release, then .wait.acquire
// The address in the shared memory of the cluster's block `rank` (mapa).
void* map_shared(const void* p, unsigned rank, Site = Site::here());

// ---- warp
extern unsigned lane;  // of the running thread
inline constexpr int kMaxWords = 8;
using WarpSlots = uint64_t[32][kMaxWords];

// Waits for the lanes of the mask at the same call, and returns what each of them gave.
// The slots are valid until this thread's next barrier or collective.
const WarpSlots& warp_exchange(const char* name, unsigned mask, const uint64_t* words, int n, Site);
void warp_barrier(unsigned mask, Site);

// ---- cp.async: the caller copies, so that the sanitizers see it
struct AsyncCopy {
  void* dst;
  const void* src;
  int bytes;
  int zeros;  // of these bytes at the end, not read from src
  int group;  // set by async_issue
};
bool async_eager();  // this copy lands at once; otherwise at its wait: both are allowed
void async_issue(AsyncCopy);
void async_commit();
bool async_take(int pending, AsyncCopy*);  // the next copy that a wait for all but `pending` groups completes

// ---- host side
cudaError_t launch(const cudaLaunchConfig_t&, const void* kernel, void (*thunk)(void*), void* arguments);
cudaError_t func_set_attribute(const void* kernel, cudaFuncAttribute, int value);
cudaError_t get_device(int* device);
cudaError_t device_get_attribute(int* value, cudaDeviceAttr, int device);
cudaError_t get_last_error();
cudaError_t peek_at_last_error();
const char* get_error_string(cudaError_t);

template <class T>
uint64_t to_word(T v) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t w = 0;
  __builtin_memcpy(&w, &v, sizeof v);
  return w;
}

template <class T>
T from_word(uint64_t w) {
  T v;
  __builtin_memcpy(static_cast<void*>(&v), &w, sizeof v);
  return v;
}

// source: the lane to read, or < 0: the own value.
template <class T>
T shuffle(unsigned mask, T v, int source, Site site) {
  const uint64_t w = to_word(v);
  const WarpSlots& slots = warp_exchange("a shuffle", mask, &w, 1, site);
  if (source < 0) return v;
  if (!(mask >> source & 1)) fail("a shuffle reads a lane that its mask does not name", site);
  return from_word<T>(slots[source][0]);
}

template <class T, class F>
T reduce(unsigned mask, T v, F f, Site site) {
  static_assert(std::is_integral_v<T>);
  const uint64_t w = to_word(v);
  const WarpSlots& slots = warp_exchange("a reduction", mask, &w, 1, site);
  const int first = __builtin_ctz(mask);
  T r = from_word<T>(slots[first][0]);
  for (int i = first + 1; i < 32; ++i) {
    if (mask >> i & 1) r = f(r, from_word<T>(slots[i][0]));
  }
  return r;
}

template <class F>
cudaError_t set_attribute(F* kernel, cudaFuncAttribute attribute, int value) {
  return func_set_attribute(reinterpret_cast<const void*>(kernel), attribute, value);
}

template <class... P, class... A>
cudaError_t launch_kernel_ex(const cudaLaunchConfig_t* config, void (*kernel)(P...), A&&... arguments) {
  struct Call {
    void (*kernel)(P...);
    std::tuple<P...> arguments;  // converted once, as a launch converts them
  } call{kernel, {static_cast<P>(arguments)...}};
  const auto thunk = [](void* p) {
    const auto* call = static_cast<const Call*>(p);
    std::apply(call->kernel, call->arguments);
  };
  return launch(*config, reinterpret_cast<const void*>(kernel), thunk, &call);
}

}  // namespace cusim

// ---- the host's API: macros, since NVIDIA's header has declared these names
#define cudaLaunchKernelEx cusim::launch_kernel_ex
#define cudaFuncSetAttribute cusim::set_attribute
#define cudaGetDevice cusim::get_device
#define cudaDeviceGetAttribute cusim::device_get_attribute
#define cudaGetLastError cusim::get_last_error
#define cudaPeekAtLastError cusim::peek_at_last_error
#define cudaGetErrorString cusim::get_error_string

// ---- for the tests
extern "C" {
#define CUSIM_API __attribute__((visibility("default")))
CUSIM_API const char* cusim_error();                    // of the last launch; null: it succeeded
CUSIM_API void cusim_order(int mode, unsigned seed);    // of threads and blocks: 0 forward, 1 reverse, 2 random
CUSIM_API void cusim_device(int attribute, int value);  // plays another GPU; value < 0: the default again
CUSIM_API void cusim_races_in_cluster_only(int yes);    // ThreadSanitizer takes clusters for ordered
#undef CUSIM_API
}

// ---- barriers and warp collectives
inline void __syncthreads(cusim::Site site = cusim::Site::here()) { cusim::block_barrier(site); }
inline int __syncthreads_count(int predicate, cusim::Site site = cusim::Site::here()) {
  return cusim::block_barrier_count(predicate, site);
}
inline int __syncthreads_or(int predicate, cusim::Site site = cusim::Site::here()) {
  return cusim::block_barrier_count(predicate, site) > 0;
}
inline int __syncthreads_and(int predicate, cusim::Site site = cusim::Site::here()) {
  return cusim::block_barrier_count(!predicate, site) == 0;
}
inline void __syncwarp(unsigned mask = ~0u, cusim::Site site = cusim::Site::here()) { cusim::warp_barrier(mask, site); }
inline void __threadfence() {}
inline void __threadfence_block() {}

template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, cusim::Site site = cusim::Site::here()) {
  const int base = cusim::lane & ~(width - 1);
  return cusim::shuffle(mask, v, base + (source & (width - 1)), site);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int bits, int width = 32, cusim::Site site = cusim::Site::here()) {
  const int lane = cusim::lane, source = lane ^ bits;
  return cusim::shuffle(mask, v, source < (lane & ~(width - 1)) + width ? source : -1, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, cusim::Site site = cusim::Site::here()) {
  const int lane = cusim::lane, source = lane + int(delta);
  return cusim::shuffle(mask, v, source < (lane & ~(width - 1)) + width ? source : -1, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T v, unsigned delta, int width = 32, cusim::Site site = cusim::Site::here()) {
  const int lane = cusim::lane, source = lane - int(delta);
  return cusim::shuffle(mask, v, source >= (lane & ~(width - 1)) ? source : -1, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, cusim::Site site = cusim::Site::here()) {
  const uint64_t w = predicate != 0;
  const cusim::WarpSlots& slots = cusim::warp_exchange("a vote", mask, &w, 1, site);
  unsigned votes = 0;
  for (int i = 0; i < 32; ++i) {
    if (mask >> i & 1) votes |= unsigned(slots[i][0]) << i;
  }
  return votes;
}
inline int __any_sync(unsigned mask, int predicate, cusim::Site site = cusim::Site::here()) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline int __all_sync(unsigned mask, int predicate, cusim::Site site = cusim::Site::here()) {
  return __ballot_sync(mask, !predicate, site) == 0;
}
template <class T>
T __reduce_add_sync(unsigned mask, T v, cusim::Site site = cusim::Site::here()) {
  return cusim::reduce(mask, v, [](T a, T b) { return T(a + b); }, site);
}
template <class T>
T __reduce_max_sync(unsigned mask, T v, cusim::Site site = cusim::Site::here()) {
  return cusim::reduce(mask, v, [](T a, T b) { return a < b ? b : a; }, site);
}
template <class T>
T __reduce_min_sync(unsigned mask, T v, cusim::Site site = cusim::Site::here()) {
  return cusim::reduce(mask, v, [](T a, T b) { return b < a ? b : a; }, site);
}

// ---- atomics: relaxed, so that ThreadSanitizer sees an atomic that orders nothing
template <class T>
T atomicAdd(T* p, std::type_identity_t<T> v) {
  if constexpr (std::is_integral_v<T>) {
    return __atomic_fetch_add(p, v, __ATOMIC_RELAXED);
  } else {
    T before, after;
    __atomic_load(p, &before, __ATOMIC_RELAXED);
    do {
      after = before + v;
    } while (!__atomic_compare_exchange(p, &before, &after, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
    return before;
  }
}
template <class T>
T atomicOr(T* p, std::type_identity_t<T> v) {
  return __atomic_fetch_or(p, v, __ATOMIC_RELAXED);
}
template <class T>
T atomicMax(T* p, std::type_identity_t<T> v) {
  static_assert(std::is_integral_v<T>);
  T before = __atomic_load_n(p, __ATOMIC_RELAXED);
  while (before < v && !__atomic_compare_exchange_n(p, &before, v, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return before;
}
template <class T>
T atomicExch(T* p, std::type_identity_t<T> v) {
  T before;
  __atomic_exchange(p, &v, &before, __ATOMIC_RELAXED);
  return before;
}
template <class T>
T atomicCAS(T* p, std::type_identity_t<T> expected, std::type_identity_t<T> v) {
  __atomic_compare_exchange_n(p, &expected, v, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return expected;
}

// ---- memory and arithmetic
template <class T>
T __ldg(const T* p) {
  return *p;
}
template <class T>
T __ldca(const T* p) {
  return *p;
}
template <class T>
T __ldcg(const T* p) {
  return *p;
}
template <class T>
T __ldcs(const T* p) {
  return *p;
}
template <class T>
void __stcg(T* p, std::type_identity_t<T> v) {
  *p = v;
}
template <class T>
void __stcs(T* p, std::type_identity_t<T> v) {
  *p = v;
}

inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int __float_as_int(float x) { return cusim::from_word<int>(cusim::to_word(x)); }
inline unsigned __float_as_uint(float x) { return cusim::from_word<unsigned>(cusim::to_word(x)); }
inline float __int_as_float(int x) { return cusim::from_word<float>(cusim::to_word(x)); }
inline float __uint_as_float(unsigned x) { return cusim::from_word<float>(cusim::to_word(x)); }
inline long long __double_as_longlong(double x) { return cusim::from_word<long long>(cusim::to_word(x)); }
inline double __longlong_as_double(long long x) { return cusim::from_word<double>(cusim::to_word(x)); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz(unsigned(x)) : 32; }

template <class A, class B, class T = std::common_type_t<A, B>>
constexpr T min(A a, B b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmin(T(a), T(b));  // of a NaN and a number: the number
  return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B, class T = std::common_type_t<A, B>>
constexpr T max(A a, B b) {
  if constexpr (std::is_floating_point_v<T>) return std::fmax(T(a), T(b));
  return T(a) < T(b) ? T(b) : T(a);
}
[[noreturn]] inline void __trap(cusim::Site site = cusim::Site::here()) { cusim::fail("__trap()", site); }
