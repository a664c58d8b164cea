// What happens to an int32 accumulator of a linear layer (S2, S5): the only place of this backend where it is rescaled.
#pragma once

#include <cstdint>

#include "launchers.h"
#include "semantics.cuh"

namespace vitq {

constexpr int kRun = 8;  // outputs that a thread finishes at a time: consecutive rows of a token, or tokens of a row

// What a run needs of the vectors, output by output.
struct RunVectors {
  float multiplier[kRun];
  int32_t bias[kRun];
  float zero[kRun];  // kRoundToInteger + zero point
  float inv_scale[kRun];
};

// The vectors' entries of one row; zeros beyond N.
template <Epilogue kKind>
__device__ __forceinline__ void load_vectors(const EpilogueArguments& with, int row, int rows, float& multiplier,
                                             int32_t& bias, float& zero, float& inv_scale) {
  const bool inside = row < rows;
  multiplier = inside ? with.multiplier[row] : 0.0f;
  bias = inside && with.bias_q != nullptr ? with.bias_q[row] : 0;
  const bool has_zero = kKind != Epilogue::kReal && inside && with.zero_point != nullptr;
  zero = kRoundToInteger + (has_zero ? static_cast<float>(with.zero_point[row]) : 0.0f);
  inv_scale = kKind == Epilogue::kGelu && inside ? with.inv_scale[row] : 0.0f;
}

// Sums of b-bit weights come 2^shift times too large, shift = 8 - b, because weights are unpacked left-aligned. The
// vectors of a row can take that instead of every sum: f32(2^shift acc) is 2^shift f32(acc), so nothing that follows
// changes a bit. False, and nothing done, where that could not be: sums of so many columns and the bias could leave
// int32, or the multiplier, or its product with a token's scale, the normal numbers.
constexpr float kLeastMultiplier = 0x1p-100f;
constexpr int kMostAlignedColumns = 1 << 16;  // sums within 2^30

template <Epilogue kKind>
__device__ __forceinline__ bool align_vectors(const EpilogueArguments& with, int columns, int shift, float& multiplier,
                                              int32_t& bias) {
  const int32_t room = (1 << 30) >> shift;
  if (columns > kMostAlignedColumns || bias >= room || bias < -room ||
      (multiplier != 0.0f && fabsf(multiplier) < kLeastMultiplier) ||
      (kKind == Epilogue::kReal && with.token_scale != nullptr)) {
    return false;
  }
  multiplier *= bits_float(static_cast<uint32_t>(127 - shift) << 23);
  bias *= 1 << shift;
  return true;
}

// The level of t: levels[#{j : t >= thresholds[j]}], by halving.
__device__ __forceinline__ uint32_t level_of(const EpilogueArguments& with, float t) {
  int below = 0;
#pragma unroll 1
  for (int step = 128; step > 0; step >>= 1) {
    if (below + step < with.level_count && t >= with.thresholds[below + step - 1]) below += step;
  }
  return static_cast<uint8_t>(with.levels[below]);
}

// The second half of kGelu: words that are float32 in real units to codes or levels. What to do is asked once a run, so
// that eight independent chains of instructions lie between two branches.
__device__ __forceinline__ void activate(const EpilogueArguments& with, const RunVectors& vectors, CodeRange range,
                                         uint32_t (&word)[kRun]) {
  if (with.tanh_form) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) word[i] = float_bits(gelu_tanh(bits_float(word[i])));
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) word[i] = float_bits(gelu_erf(bits_float(word[i])));
  }
  if (with.levels == nullptr) {
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      word[i] = requantise(bits_float(word[i]), vectors.inv_scale[i], vectors.zero[i], range);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kRun; ++i) word[i] = level_of(with, bits_float(word[i]) * vectors.inv_scale[i]);
  }
}

// Rescales the accumulators of a run. What comes out: the low byte is the code (kCodes, kGelu); the word is the float32
// in real units, without residual (kReal, kNorm); or the accumulator (kPartial). scale_of(i): of output i's token,
// asked for where there are scales of tokens.
template <Epilogue kKind, class ScaleOf>
__device__ __forceinline__ void rescale(const EpilogueArguments& with, const RunVectors& vectors,
                                        const ScaleOf& scale_of, const int32_t (&acc)[kRun], uint32_t (&word)[kRun]) {
  const CodeRange range = code_range(kKind == Epilogue::kPartial ? 8 : with.bits);
  if constexpr (kKind == Epilogue::kReal) {
    if (with.token_scale != nullptr) {
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        const float y = int_to_float(acc[i]) * (scale_of(i) * vectors.multiplier[i]);
        word[i] = float_bits(with.bias_q == nullptr ? y : y + bits_float(static_cast<uint32_t>(vectors.bias[i])));
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if constexpr (kKind == Epilogue::kPartial) {
      word[i] = static_cast<uint32_t>(acc[i]);
    } else if constexpr (kKind == Epilogue::kCodes) {
      word[i] = requantise(int_to_float(acc[i] + vectors.bias[i]), vectors.multiplier[i], vectors.zero[i], range);
    } else {
      word[i] = float_bits(int_to_float(acc[i] + vectors.bias[i]) * vectors.multiplier[i]);
    }
  }
  if constexpr (kKind == Epilogue::kGelu) activate(with, vectors, range, word);
}

// The last step of kReal: adds the residual, rounds to the output's dtype and stores a run of a token's row: `at`
// elements into the outputs, `residual_at` into the residual, of which `left` are inside. `vector`: N is a multiple of
// the run, so that runs are inside or outside as a whole and 16-byte aligned.
__device__ __forceinline__ void store_real(const EpilogueArguments& with, uint32_t (&word)[kRun], void* out, int64_t at,
                                           int64_t residual_at, int left, bool vector) {
  const Real dtype = static_cast<Real>(with.real_dtype);
  if (dtype == Real::kFloat32) {
    float* target = static_cast<float*>(out) + at;
    const float* residual = static_cast<const float*>(with.residual);
    if (vector) {
#pragma unroll
      for (int half = 0; half < kRun; half += 4) {
        if (residual != nullptr) {
          const uint4 r = *reinterpret_cast<const uint4*>(residual + residual_at + half);
          word[half] = float_bits(bits_float(r.x) + bits_float(word[half]));
          word[half + 1] = float_bits(bits_float(r.y) + bits_float(word[half + 1]));
          word[half + 2] = float_bits(bits_float(r.z) + bits_float(word[half + 2]));
          word[half + 3] = float_bits(bits_float(r.w) + bits_float(word[half + 3]));
        }
        *reinterpret_cast<uint4*>(target + half) = {word[half], word[half + 1], word[half + 2], word[half + 3]};
      }
      return;
    }
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (i >= left) continue;
      target[i] = residual == nullptr ? bits_float(word[i]) : bits_float(word[i]) + residual[residual_at + i];
    }
    return;
  }
  uint16_t* target = static_cast<uint16_t*>(out) + at;
  const uint16_t* residual = static_cast<const uint16_t*>(with.residual);
  if (vector) {
    uint32_t packed[kRun / 2];
    uint4 r = {0, 0, 0, 0};
    if (residual != nullptr) r = *reinterpret_cast<const uint4*>(residual + residual_at);
    const uint32_t added[4] = {r.x, r.y, r.z, r.w};
#pragma unroll
    for (int i = 0; i < kRun / 2; ++i) {
      float low = bits_float(word[2 * i]), high = bits_float(word[2 * i + 1]);
      if (residual != nullptr) {
        low += real_from_16(static_cast<uint16_t>(added[i]), dtype);
        high += real_from_16(static_cast<uint16_t>(added[i] >> 16), dtype);
      }
      packed[i] = real_to_16(low, dtype) | real_to_16(high, dtype) << 16;
    }
    *reinterpret_cast<uint4*>(target) = {packed[0], packed[1], packed[2], packed[3]};
    return;
  }
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    if (i >= left) continue;
    float y = bits_float(word[i]);
    if (residual != nullptr) y += real_from_16(residual[residual_at + i], dtype);
    target[i] = static_cast<uint16_t>(real_to_16(y, dtype));
  }
}

}  // namespace vitq
