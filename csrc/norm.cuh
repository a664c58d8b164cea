// LayerNorm of a row whose mean and moments are known (S3): what its elements become.
#pragma once

#include "semantics.cuh"

namespace vitq {

// (x - true mean) * rstd is fmaf(x - mean, rstd, shift).
struct Norm {
  float rstd, shift;
};

// `rest`, `square`: means of x - mean and of its square. The first mean is off by its rounding, up to half an ulp of x:
// as large as the deviations in a row that is nearly constant. `rest` takes that away.
__device__ __forceinline__ Norm norm_of(float rest, float square, float eps) {
  const float variance = fmaxf(square - rest * rest, 0.0f) + eps;
  float rstd = 1.0f / sqrtf(variance);
  // One step of Newton takes back what the root and the division rounded: a scale per token shows the last bit.
  const float ratio = variance * rstd;
  const float excess = fmaf(ratio, rstd, -1.0f) + fmaf(variance, rstd, -ratio) * rstd;
  rstd = fmaf(rstd, -0.5f * excess, rstd);
  return {rstd, -rest * rstd};
}

__device__ __forceinline__ float normalised(float centred, Norm norm, float gain, float offset) {
  return fmaf(fmaf(centred, norm.rstd, norm.shift), gain, offset);
}

// clamp(rint(x)). Clamped before it is shifted: an offset beyond 2^22 would not round to an integer.
__device__ __forceinline__ uint32_t static_code(float x, CodeRange range) {
  return float_bits(fminf(fmaxf(x, range.low - kRoundToInteger), range.high - kRoundToInteger) + kRoundToInteger);
}

}  // namespace vitq
