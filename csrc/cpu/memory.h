// Moving a block of a row between memory and the L1 buffers that the arithmetic works on.
#pragma once
#include <cstring>

#include "common/params.h"
#include "math/half.h"
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace fastkd::FASTKD_ISA {

// Arithmetic runs over whole vectors: blocks are padded to a multiple of the widest one.
inline constexpr int64_t kLanes = 16;
FASTKD_HD constexpr int64_t padded(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// dst[i] = src[i * stride]
template <class T, class From>
void widen(const From* src, int64_t stride, int64_t n, T* dst) {
  if (stride == 1) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) dst[i] = T(to_float(src[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i] = T(to_float(src[i * stride]));
  }
}
inline void widen(const double* src, int64_t stride, int64_t n, double* dst) {
  for (int64_t i = 0; i < n; ++i) dst[i] = src[i * stride];
}

// Elements begin .. begin + n of a row as T, padded with -inf (a class of probability 0);
// straight from memory where it can be, else through the buffer.
template <class T>
const T* load_block(const RowsTensor& x, const char* row, int64_t begin, int64_t n, T* buffer) {
  const char* src = row + begin * x.stride_v * x.element_size;
  const bool is_T = x.dtype == (sizeof(T) == 8 ? DType::kDouble : DType::kFloat);
  if (is_T && x.stride_v == 1 && n % kLanes == 0) return reinterpret_cast<const T*>(src);
  switch (x.dtype) {
    case DType::kHalf:
      widen(reinterpret_cast<const Half*>(src), x.stride_v, n, buffer);
      break;
    case DType::kBFloat16:
      widen(reinterpret_cast<const BFloat16*>(src), x.stride_v, n, buffer);
      break;
    case DType::kFloat:
      widen(reinterpret_cast<const float*>(src), x.stride_v, n, buffer);
      break;
    case DType::kDouble:
      if constexpr (sizeof(T) == 8) widen(reinterpret_cast<const double*>(src), x.stride_v, n, buffer);
      break;
  }
  for (int64_t i = n; i < padded(n); ++i) buffer[i] = -kInf<T>;
  return buffer;
}

// memcpy past the caches: the lines are not read before they are written, and do not push
// out what the next row needs.
inline void stream_copy(char* dst, const char* src, int64_t bytes) {
#if defined(__SSE2__)
#if defined(__AVX512F__)
  constexpr int64_t kVector = 64;
#elif defined(__AVX2__)
  constexpr int64_t kVector = 32;
#else
  constexpr int64_t kVector = 16;
#endif
  int64_t head = -reinterpret_cast<intptr_t>(dst) & (kVector - 1);
  if (head > bytes) head = bytes;
  std::memcpy(dst, src, head);
  int64_t i = head;
  for (; i + kVector <= bytes; i += kVector) {
#if defined(__AVX512F__)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(dst + i), _mm512_loadu_si512(src + i));
#elif defined(__AVX2__)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(dst + i),
                        _mm256_loadu_si256(reinterpret_cast<const __m256i*>(src + i)));
#else
    _mm_stream_si128(reinterpret_cast<__m128i*>(dst + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(src + i)));
#endif
  }
  std::memcpy(dst + i, src + i, bytes - i);
#else
  std::memcpy(dst, src, bytes);
#endif
}

// Streaming stores are weakly ordered: to be called before another thread may read them.
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class To, class T, class Convert>
void narrow(const T* src, int64_t n, char* dst, int64_t stride, bool stream, Convert convert) {
  To* out = reinterpret_cast<To*>(dst);
  if (stride != 1) {
    for (int64_t i = 0; i < n; ++i) out[i * stride] = convert(src[i]);
  } else if (!stream) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) out[i] = convert(src[i]);
  } else {
    constexpr int64_t kChunk = 256;
    alignas(64) To chunk[kChunk];
    for (int64_t i = 0; i < n; i += kChunk) {
      const int64_t m = n - i < kChunk ? n - i : kChunk;
#pragma omp simd
      for (int64_t k = 0; k < m; ++k) chunk[k] = convert(src[i + k]);
      stream_copy(reinterpret_cast<char*>(out + i), reinterpret_cast<const char*>(chunk), m * sizeof(To));
    }
  }
}

template <class T>
void store_block(const RowsTensor& x, char* row, int64_t begin, int64_t n, const T* src, bool stream) {
  char* dst = row + begin * x.stride_v * x.element_size;
  switch (x.dtype) {
    case DType::kHalf:
      narrow<Half>(src, n, dst, x.stride_v, stream, [](T v) { return to_half(float(v)); });
      break;
    case DType::kBFloat16:
      narrow<BFloat16>(src, n, dst, x.stride_v, stream, [](T v) { return to_bfloat16(float(v)); });
      break;
    case DType::kFloat:
      if (sizeof(T) == 4 && stream && x.stride_v == 1) {
        stream_copy(dst, reinterpret_cast<const char*>(src), n * 4);
      } else {
        narrow<float>(src, n, dst, x.stride_v, stream, [](T v) { return float(v); });
      }
      break;
    case DType::kDouble:
      narrow<double>(src, n, dst, x.stride_v, stream, [](T v) { return double(v); });
      break;
  }
}

}  // namespace fastkd::FASTKD_ISA
