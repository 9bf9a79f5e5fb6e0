// Eight classes at a time between memory and registers, in 16-byte accesses.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/params.h"

namespace fastkd::cuda {

inline constexpr int kPack = 8;  // classes of a pack: 16 bytes in half precision

// A storage type that is known at run time only: looked at once for each pack.
struct AnyType {};

template <class S>
__device__ __forceinline__ int element_size(const RowsTensor& x) {
  if constexpr (std::is_same_v<S, AnyType>) {
    return x.element_size;
  } else {
    return int(sizeof(S));
  }
}

// f(S()) for the dtype of x, where S does not say it. T is what is computed in: only in double is there a double.
template <class S, class T, class F>
__device__ __forceinline__ void with_type(DType type, F&& f) {
  if constexpr (!std::is_same_v<S, AnyType>) {
    f(S());
  } else if constexpr (std::is_same_v<T, float>) {
    if (type == DType::kFloat) return f(float());
    if (type == DType::kBFloat16) return f(__nv_bfloat16());
    f(__half());
  } else {
    switch (type) {
      case DType::kHalf:
        return f(__half());
      case DType::kBFloat16:
        return f(__nv_bfloat16());
      case DType::kFloat:
        return f(float());
      case DType::kDouble:
        return f(double());
    }
  }
}

template <class T>
__device__ __forceinline__ T widen(__half x) {
  return T(__half2float(x));
}
template <class T>
__device__ __forceinline__ T widen(__nv_bfloat16 x) {
  return T(__bfloat162float(x));
}
template <class T>
__device__ __forceinline__ T widen(float x) {
  return T(x);
}
template <class T>
__device__ __forceinline__ T widen(double x) {
  return T(x);
}

template <class To, class T>
__device__ __forceinline__ To narrow(T x) {
  if constexpr (std::is_same_v<To, __half>) {
    return __float2half_rn(float(x));
  } else if constexpr (std::is_same_v<To, __nv_bfloat16>) {
    return __float2bfloat16_rn(float(x));
  } else {
    return To(x);
  }
}

enum class Memory {
  kShared,
  kGlobal,      // will be read again soon
  kGlobalLast,  // will not: the first to leave the caches
};

template <Memory kMemory>
__device__ __forceinline__ uint4 load_16(const char* p) {
  const uint4* at = reinterpret_cast<const uint4*>(p);
  if constexpr (kMemory == Memory::kGlobal) return __ldcg(at);
  if constexpr (kMemory == Memory::kGlobalLast) return __ldcs(at);
  return *at;
}

// p is a multiple of 16.
template <class S, Memory kMemory, class T>
__device__ __forceinline__ void load_pack(const char* p, DType type, T (&v)[kPack]) {
  with_type<S, T>(type, [&](auto storage) {
    using From = decltype(storage);
    constexpr int kWords = kPack * int(sizeof(From)) / 16;
    union {
      uint4 words[kWords];
      From elements[kPack];
    } raw = {};
#pragma unroll
    for (int i = 0; i < kWords; ++i) raw.words[i] = load_16<kMemory>(p + 16 * i);
#pragma unroll
    for (int i = 0; i < kPack; ++i) v[i] = widen<T>(raw.elements[i]);
  });
}

// Past the caches as far as can be: nobody here reads it again.
template <class S, class T>
__device__ __forceinline__ void store_pack(char* p, DType type, const T (&v)[kPack]) {
  with_type<S, T>(type, [&](auto storage) {
    using To = decltype(storage);
    constexpr int kWords = kPack * int(sizeof(To)) / 16;
    union {
      uint4 words[kWords];
      To elements[kPack];
    } raw = {};
#pragma unroll
    for (int i = 0; i < kPack; ++i) raw.elements[i] = narrow<To>(v[i]);
#pragma unroll
    for (int i = 0; i < kWords; ++i) __stcs(reinterpret_cast<uint4*>(p) + i, raw.words[i]);
  });
}

template <class S, class T>
__device__ __forceinline__ T load_one(const char* p, DType type) {
  T v = 0;
  with_type<S, T>(type, [&](auto storage) { v = widen<T>(*reinterpret_cast<const decltype(storage)*>(p)); });
  return v;
}
template <class S, class T>
__device__ __forceinline__ void store_one(char* p, DType type, T v) {
  with_type<S, T>(type, [&](auto storage) {
    using To = decltype(storage);
    *reinterpret_cast<To*>(p) = narrow<To>(v);
  });
}

}  // namespace fastkd::cuda
