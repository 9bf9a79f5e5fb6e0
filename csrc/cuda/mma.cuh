// Tensor cores: matrices from shared memory, and products of 16 x 8 (x 32 bytes of depth), each
// instruction once, as in ptx.cuh.
//
// In the lane l of a warp, with g = l / 4 and t = l % 4, the words of one operand hold
//   a[0..3]  rows g, g + 8, g, g + 8 at word t, t, t + 4, t + 4 of the depth
//   b[0..1]  column g at word t, t + 4
//   d[0..3]  (row, column) (g, 2t), (g, 2t + 1), (g + 8, 2t), (g + 8, 2t + 1)
// where a word is two elements of 16 bits, or one of tf32.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "cuda/ptx.cuh"

namespace fastkd::ptx {

#if defined(__CUDACC__)

// Four 8 x 16-byte matrices: lane l gives the address of row l % 8 of matrix l / 8, a multiple of
// 16; r[m]: word t of row g of matrix m.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}
// Each transposed, of elements of 16 bits: r[m] holds rows 2t and 2t + 1 of column g.
__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(uint32_t(__cvta_generic_to_shared(row)))
               : "memory");
}

#define FASTKD_MMA(name, shape)                                                                               \
  __device__ __forceinline__ void name(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {     \
    asm volatile("mma.sync.aligned." shape " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
                 : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                             \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));                             \
  }
FASTKD_MMA(mma_bf16, "m16n8k16.row.col.f32.bf16.bf16.f32")
FASTKD_MMA(mma_f16, "m16n8k16.row.col.f32.f16.f16.f32")
FASTKD_MMA(mma_tf32, "m16n8k8.row.col.f32.tf32.tf32.f32")
#undef FASTKD_MMA

// To 10 bits after the point, to nearest.
__device__ __forceinline__ uint32_t to_tf32(float x) {
  uint32_t y;
  asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(y) : "f"(x));
  return y;
}

#else

template <bool kTrans>
void ldmatrix(uint32_t (&r)[4], const void* row, cusim::Site site) {
  const uint64_t address = reinterpret_cast<uintptr_t>(row);
  if (address % 16) cusim::fail("ldmatrix: a row that is not 16-byte aligned", site);
  const cusim::WarpSlots& slots = cusim::warp_exchange("ldmatrix", ~0u, &address, 1, site);
  const int g = cusim::lane / 4, t = cusim::lane % 4;
  for (int m = 0; m < 4; ++m) {
    const auto at = [&](int i) { return reinterpret_cast<const uint16_t*>(slots[8 * m + i][0]); };
    const uint16_t low = kTrans ? at(2 * t)[g] : at(g)[2 * t], high = kTrans ? at(2 * t + 1)[g] : at(g)[2 * t + 1];
    r[m] = low | uint32_t(high) << 16;
  }
}
inline void ldmatrix_x4(uint32_t (&r)[4], const void* row, cusim::Site site = cusim::Site::here()) {
  ldmatrix<false>(r, row, site);
}
inline void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row, cusim::Site site = cusim::Site::here()) {
  ldmatrix<true>(r, row, site);
}

struct Bf16Words {
  static constexpr int kElements = 2;
  static float at(uint64_t word, int i) { return cusim::from_word<float>((word >> (16 * i) & 0xffff) << 16); }
};
struct F16Words {
  static constexpr int kElements = 2;
  static float at(uint64_t word, int i) { return __half2float(cusim::from_word<__half>(word >> (16 * i) & 0xffff)); }
};
struct Tf32Words {  // the hardware does not look at the low 13 bits
  static constexpr int kElements = 1;
  static float at(uint64_t word, int) { return cusim::from_word<float>(word & 0xffffe000u); }
};

template <class Words>
void mma(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, cusim::Site site) {
  const uint64_t words[6] = {a[0], a[1], a[2], a[3], b0, b1};
  const cusim::WarpSlots& slots = cusim::warp_exchange("mma", ~0u, words, 6, site);
  const int g = cusim::lane / 4, t = cusim::lane % 4;
  for (int i = 0; i < 4; ++i) {
    const int column = 2 * t + i % 2;
    float sum = 0;
    for (int word = 0; word < 8; ++word) {
      const uint64_t x = slots[4 * g + word % 4][i / 2 + 2 * (word / 4)],
                     y = slots[4 * column + word % 4][4 + word / 4];
      for (int k = 0; k < Words::kElements; ++k) sum += Words::at(x, k) * Words::at(y, k);
    }
    d[i] += sum;
  }
}
#define FASTKD_MMA(name, words)                                                     \
  inline void name(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, \
                   cusim::Site site = cusim::Site::here()) {                        \
    mma<words>(d, a, b0, b1, site);                                                 \
  }
FASTKD_MMA(mma_bf16, Bf16Words)
FASTKD_MMA(mma_f16, F16Words)
FASTKD_MMA(mma_tf32, Tf32Words)
#undef FASTKD_MMA

inline uint32_t to_tf32(float x) {
  const uint32_t bits = __float_as_uint(x);
  return (bits & 0x7f800000u) == 0x7f800000u ? bits : (bits + 0x1000u) & 0xffffe000u;
}

#endif

}  // namespace fastkd::ptx
