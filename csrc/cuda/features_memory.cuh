// How the features schedule sees rows in memory: who takes what, and packs between memory and registers.
#pragma once
#include "cuda/features_launch.h"
#include "cuda/vec.cuh"

namespace fastkd::cuda {

// Elements of a pack, and how many rows they are of.
template <FeaturesPack kWhich>
struct Pack {
  static constexpr int kElements = kWhich == FeaturesPack::kFeatures ? kFeaturesPack
                                   : kWhich == FeaturesPack::kRows   ? kRowsPack
                                                                     : 1;
  static constexpr int kRows = kWhich == FeaturesPack::kRows ? kRowsPack : 1;
  template <class T>
  static constexpr int kKept = kFeaturesKept<T> / kElements;
};

// f(Pack) with that of a layer.
template <class T, class F>
__device__ __forceinline__ void with_pack(const FeaturesPart<T>& layer, F&& f) {
  if constexpr (kInPacks<T>) {
    if (layer.pack == FeaturesPack::kFeatures) return f(Pack<FeaturesPack::kFeatures>());
    if (layer.pack == FeaturesPack::kRows) return f(Pack<FeaturesPack::kRows>());
  }
  f(Pack<FeaturesPack::kElement>());
}

// The threads of a block that share a row.
struct Sharers {
  int threads, rank;
  int row;                 // the first of this thread's, among the block's
  int rows;                // of the block
  int first_bit, end_bit;  // of the lane: those of one row differ in these bits
  int warps;               // that have a part of a row
  bool leads;              // of the lanes of a row

  template <class T>
  __device__ __forceinline__ Sharers(const FeaturesPart<T>& layer, int rows_of_pack)
      : threads(layer.threads), rows(layer.rows) {
    const int thread = threadIdx.x, across = kFeaturesThreads / threads;
    rank = layer.side_by_side ? thread / across : thread % threads;
    row = (layer.side_by_side ? thread % across : thread / threads) * rows_of_pack;
    first_bit = layer.side_by_side ? across : 1;
    end_bit = layer.side_by_side || threads > 32 ? 32 : threads;
    warps = layer.side_by_side ? kFeaturesThreads / 32 : threads > 32 ? threads / 32 : 1;
    leads = (thread % 32 & (end_bit - first_bit)) == 0;
  }
};

// Where a row begins.
struct RowPointers {
  char *student, *teacher, *grad;

  template <class T>
  __device__ __forceinline__ RowPointers(const FeaturesPart<T>& layer, int64_t row)
      : student(layer.student.data), teacher(layer.teacher.data), grad(layer.grad.data) {
#pragma unroll 1
    for (int d = layer.dims - 1; d >= 0; --d) {
      int64_t at = row;
      if (d > 0) {  // a division in double, of less than 2^53, is off by one at most
        const int64_t size = layer.size[d];
        row = int64_t(double(at) * layer.inverse_size[d]);
        at -= row * size;
        const int off = at < 0 ? -1 : at >= size ? 1 : 0;
        row += off;
        at -= off * size;
      }
      student += at * layer.student.stride[d];
      teacher += at * layer.teacher.stride[d];
      grad += at * layer.grad.stride[d];
    }
  }
};

// ---- packs

template <int kBytes>
__device__ __forceinline__ void load_words(const char* p, uint32_t* words) {
  if constexpr (kBytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const uint4 x = *reinterpret_cast<const uint4*>(p + 16 * i);
      words[4 * i] = x.x;
      words[4 * i + 1] = x.y;
      words[4 * i + 2] = x.z;
      words[4 * i + 3] = x.w;
    }
  } else if constexpr (kBytes == 8) {
    const uint2 x = *reinterpret_cast<const uint2*>(p);
    words[0] = x.x;
    words[1] = x.y;
  } else if constexpr (kBytes == 4) {
    words[0] = *reinterpret_cast<const uint32_t*>(p);
  } else {
    words[0] = *reinterpret_cast<const uint16_t*>(p);
  }
}

template <int kBytes>
__device__ __forceinline__ void store_words(char* p, const uint32_t* words) {
  if constexpr (kBytes % 16 == 0) {
#pragma unroll
    for (int i = 0; i < kBytes / 16; ++i) {
      const uint32_t* w = words + 4 * i;
      __stcs(reinterpret_cast<uint4*>(p) + i, make_uint4(w[0], w[1], w[2], w[3]));
    }
  } else if constexpr (kBytes == 8) {
    __stcs(reinterpret_cast<uint2*>(p), make_uint2(words[0], words[1]));
  } else if constexpr (kBytes == 4) {
    *reinterpret_cast<uint32_t*>(p) = words[0];
  } else {
    *reinterpret_cast<uint16_t*>(p) = uint16_t(words[0]);
  }
}

// Unconverted vector loads of a row, of elements no wider than T. All loads are issued before the first is used, so
// that their latencies overlap.
template <class T, class K>
struct RawPacks {
  static constexpr int kPacks = K::template kKept<T>, kWords = (K::kElements * int(sizeof(T)) + 3) / 4;
  uint32_t words[kPacks][kWords];

  // The packs rank, rank + threads, .. below end; the others are 0.
  __device__ __forceinline__ void load(const FeaturesTensor& x, const char* row, int first, int end,
                                       const Sharers& by) {
    const char* at = row + int64_t(first + by.rank) * x.step;
    const int64_t step = by.threads * x.step;
    if (x.element_size == 2) {
      load_as<2>(at, step, end, by);
    } else if (sizeof(T) == 4 || x.element_size == 4) {
      load_as<4>(at, step, end, by);
    } else {
      load_as<sizeof(T)>(at, step, end, by);
    }
  }

  __device__ __forceinline__ void unpack(DType type, T* values) const {
    if (type == DType::kHalf) {
      unpack_as<__half, kPacks>(values, 0);
    } else if (type == DType::kBFloat16) {
      unpack_as<__nv_bfloat16, kPacks>(values, 0);
    } else if (sizeof(T) == 4 || type == DType::kFloat) {
      unpack_as<float, kPacks>(values, 0);
    } else {
      unpack_as<T, kPacks>(values, 0);
    }
  }
  // One of them.
  __device__ __forceinline__ void unpack(DType type, int j, T* values) const {
    if (type == DType::kHalf) {
      unpack_as<__half, 1>(values, j);
    } else if (type == DType::kBFloat16) {
      unpack_as<__nv_bfloat16, 1>(values, j);
    } else if (sizeof(T) == 4 || type == DType::kFloat) {
      unpack_as<float, 1>(values, j);
    } else {
      unpack_as<T, 1>(values, j);
    }
  }

 private:
  template <int kBytes>
  __device__ __forceinline__ void load_as(const char* at, int64_t step, int end, const Sharers& by) {
#pragma unroll
    for (int j = 0, left = end - by.rank; j < kPacks; ++j, left -= by.threads, at += step) {
#pragma unroll
      for (int w = 0; w < kWords; ++w) words[j][w] = 0;
      if (left > 0) load_words<K::kElements * kBytes>(at, words[j]);
    }
  }
  template <class From, int kCount>
  __device__ __forceinline__ void unpack_as(T* values, int first) const {
#pragma unroll
    for (int j = 0; j < kCount; ++j) {
      union {
        uint32_t words[kWords];
        From elements[K::kElements];
      } raw = {};
#pragma unroll
      for (int w = 0; w < kWords; ++w) raw.words[w] = words[first + j][w];
#pragma unroll
      for (int k = 0; k < K::kElements; ++k) values[j * K::kElements + k] = widen<T>(raw.elements[k]);
    }
  }
};

// Packs of values to the places from which RawPacks::load takes them: kCount of them, of which the
// first is at `at`, where so many are left.
template <class To, int kElements, int kCount, class T>
__device__ __forceinline__ void store_packs_as(char* at, int64_t step, int left, int threads, const T* values) {
#pragma unroll
  for (int j = 0; j < kCount; ++j, left -= threads, at += step) {
    union {
      uint32_t words[(kElements * sizeof(To) + 3) / 4];
      To elements[kElements];
    } raw = {};
#pragma unroll
    for (int k = 0; k < kElements; ++k) raw.elements[k] = narrow<To>(values[j * kElements + k]);
    if (left > 0) store_words<kElements* int(sizeof(To))>(at, raw.words);
  }
}
template <int kElements, int kCount, class T>
__device__ __forceinline__ void store_packs(DType type, char* at, int64_t step, int left, int threads,
                                            const T* values) {
  if (type == DType::kHalf) {
    store_packs_as<__half, kElements, kCount>(at, step, left, threads, values);
  } else if (type == DType::kBFloat16) {
    store_packs_as<__nv_bfloat16, kElements, kCount>(at, step, left, threads, values);
  } else if (sizeof(T) == 4 || type == DType::kFloat) {
    store_packs_as<float, kElements, kCount>(at, step, left, threads, values);
  } else {
    store_packs_as<T, kElements, kCount>(at, step, left, threads, values);
  }
}

}  // namespace fastkd::cuda
