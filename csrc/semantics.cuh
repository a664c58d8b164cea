// The scalar integer semantics, twins of the functions of vitq_kernels/ops/reference.py. No rounding is left to the
// compiler: the build forbids contraction (-fmad=false, -ffp-contract=off), and where one rounding is meant fmaf is
// written.
#pragma once

#include <cmath>
#include <cstdint>

#include "ptx.cuh"

namespace vitq {

// 1.5 * 2^23: a float32 near it has a unit in the last place of 1, so a sum with it is rounded to an integer, half to
// even, and the low bits of the word are that integer in two's complement.
constexpr float kRoundToInteger = 12582912.0f;

// Bounds of b-bit codes, as float32 near kRoundToInteger.
struct CodeRange {
  float low, high;
};

inline __host__ __device__ CodeRange code_range(int bits) {
  const float half = static_cast<float>(1 << (bits - 1));
  return {kRoundToInteger - half, kRoundToInteger + half - 1.0f};
}

// A word near kRoundToInteger, clamped: its low byte is the code.
__device__ __forceinline__ uint32_t code_word(float shifted, CodeRange range) {
  return float_bits(fminf(fmaxf(shifted, range.low), range.high));
}

// S1: clamp(rint(value * multiplier + zero)), `shifted_zero` = kRoundToInteger + zero. The product is exact inside the
// fused multiply-add, whose rounding is the only one. Monotone, so it saturates however large the product is.
__device__ __forceinline__ uint32_t requantise(float value, float multiplier, float shifted_zero, CodeRange range) {
  return code_word(fmaf(value, multiplier, shifted_zero), range);
}

// The low bytes of four words, the first in the lowest byte.
__device__ __forceinline__ uint32_t pack_bytes(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3) {
  return permute_bytes(permute_bytes(w0, w1, 0x0040), permute_bytes(w2, w3, 0x0040), 0x5410);
}

// GELU of float32: the erf form, and the tanh form as y * sigmoid(2u).
__device__ __forceinline__ float gelu_erf(float y) { return 0.5f * y * (1.0f + erff(y * 0.7071067811865476f)); }

__device__ __forceinline__ float gelu_tanh(float y) {
  const float u = 0.7978845608028654f * fmaf(0.044715f * y * y, y, y);
  return divide_approximately(y, 1.0f + expf(-2.0f * u));
}

// A real dtype that crosses the boundary; the numbers are those of launchers.h.
enum class Real : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

__device__ __forceinline__ float real_from_16(uint16_t bits, Real dtype) {
  return dtype == Real::kFloat16 ? half_to_float(bits) : bfloat16_to_float(bits);
}
__device__ __forceinline__ uint32_t real_to_16(float x, Real dtype) {
  return dtype == Real::kFloat16 ? float_to_half(x) : float_to_bfloat16(x);
}

}  // namespace vitq
