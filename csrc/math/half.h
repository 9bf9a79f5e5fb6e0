// fp16 and bf16 as bit patterns: conversions to and from fp32, round to nearest even, by
// integer arithmetic alone (branch-free, so loops over them vectorise on any processor).
#pragma once
#include "math/scalar.h"

namespace fastkd::FASTKD_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

FASTKD_HD float to_float(BFloat16 x) { return bits_as<float>(uint32_t(x.bits) << 16); }

FASTKD_HD float to_float(Half x) {
  const uint32_t magnitude = uint32_t(x.bits & 0x7fffu) << 13;
  const uint32_t sign = uint32_t(x.bits & 0x8000u) << 16;
  // times 2^112 moves the exponent bias from 15 to 127, subnormals included
  const uint32_t finite = bits_as<uint32_t>(bits_as<float>(magnitude) * 5.192296858534828e33f);
  const uint32_t special = magnitude | 0x7f800000u;
  return bits_as<float>(sign | (magnitude >= 0x0f800000u ? special : finite));
}

FASTKD_HD BFloat16 to_bfloat16(float x) {
  const uint32_t u = bits_as<uint32_t>(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  return {uint16_t(x != x ? 0x7fc0u : rounded)};
}

FASTKD_HD Half to_half(float x) {
  const uint32_t u = bits_as<uint32_t>(x), sign = (u >> 16) & 0x8000u, a = u & 0x7fffffffu;
  // below 2^-14: adding 1/2 lets the fp32 addition round to the subnormal grid of 2^-24
  const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(a) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (a - 0x38000000u + 0xfffu + ((a >> 13) & 1u)) >> 13;
  const uint32_t finite = a < 0x38800000u ? subnormal : normal;
  const uint32_t special = a > 0x7f800000u ? 0x7e00u : 0x7c00u;
  return {uint16_t(sign | (a >= 0x47800000u ? special : finite))};
}

FASTKD_HD float to_float(float x) { return x; }

}  // namespace fastkd::FASTKD_ISA
