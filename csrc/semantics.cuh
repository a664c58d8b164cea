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
constexpr int32_t kRoundToIntegerBits = 0x4b400000;

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

// GELU of float32 as y / (1 + 2^(-y q)), q a polynomial in y^2. Two approximate instructions (2^x, 1/x) instead of
// erf's thirty: within 2e-7 of max(|y|, 1) if both are exact, as in the emulation (tests/test_cuda_linear.py), and
// within 7e-7 by their 2 ulp each; torch's own erf form is within 12e-7.
__device__ __forceinline__ float times_sigmoid(float y, float q) {
  return divide_approximately(y, 1.0f + exp2_approximately(-y * q));
}

// The erf form: the logit of the normal distribution, by benchmarks/fit_gelu.py.
__device__ __forceinline__ float gelu_erf(float y) {
  const float square = y * y;
  float q = fmaf(5.209908e-09f, square, -3.8504498e-07f);
  q = fmaf(q, square, 1.145243e-05f);
  q = fmaf(q, square, -1.5938941e-04f);
  q = fmaf(q, square, -9.5592935e-05f);
  q = fmaf(q, square, 0.10483858f);
  return times_sigmoid(y, fmaf(q, square, 2.3022072f));
}

// The tanh form: y sigmoid(2 u) with u = sqrt(2 / pi) (y + 0.044715 y^3), in powers of 2.
__device__ __forceinline__ float gelu_tanh(float y) { return times_sigmoid(y, fmaf(0.10294324f, y * y, 2.3022082f)); }

// A real dtype that crosses the boundary; the numbers are those of launchers.h.
enum class Real : int { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };

__device__ __forceinline__ float real_from_16(uint16_t bits, Real dtype) {
  return dtype == Real::kFloat16 ? half_to_float(bits) : bfloat16_to_float(bits);
}
__device__ __forceinline__ uint32_t real_to_16(float x, Real dtype) {
  return dtype == Real::kFloat16 ? float_to_half(x) : float_to_bfloat16(x);
}

}  // namespace vitq
