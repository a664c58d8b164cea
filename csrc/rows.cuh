// Rows of real numbers: how a thread loads and stores a run of 8 of them, and how the threads of a row agree on sums.
#pragma once

#include "semantics.cuh"

namespace vitq {

constexpr int kRunOfRow = 8;  // elements: 16 bytes of a 16-bit dtype, 8 bytes of codes

__host__ __device__ constexpr int bytes_of(Real dtype) { return dtype == Real::kFloat32 ? 4 : 2; }

// Elements `at` .. at + 7 as float32; `vector`: all of them are there, and 16-byte aligned; else those before `count`,
// zeros behind.
__device__ __forceinline__ void load_reals(const void* base, int64_t at, int count, Real dtype, bool vector,
                                           float (&x)[kRunOfRow]) {
  const bool wide = dtype == Real::kFloat32;
  if (vector) {
    const uint4* source = reinterpret_cast<const uint4*>(static_cast<const char*>(base) + at * (wide ? 4 : 2));
    const uint4 low = source[0];
    const uint32_t first[4] = {low.x, low.y, low.z, low.w};
    if (wide) {
      const uint4 high = source[1];
      const uint32_t second[4] = {high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = bits_float(first[i]), x[i + 4] = bits_float(second[i]);
      return;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = real_from_16(static_cast<uint16_t>(first[i]), dtype);
      x[2 * i + 1] = real_from_16(static_cast<uint16_t>(first[i] >> 16), dtype);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < kRunOfRow; ++i) {
    x[i] = 0.0f;
    if (i >= count) continue;
    x[i] = wide ? static_cast<const float*>(base)[at + i]
                : real_from_16(static_cast<const uint16_t*>(base)[at + i], dtype);
  }
}

// The inverse; x is in the dtype's numbers already (round_to).
__device__ __forceinline__ void store_reals(void* base, int64_t at, int count, Real dtype, bool vector,
                                            const float (&x)[kRunOfRow]) {
  const bool wide = dtype == Real::kFloat32;
  if (vector) {
    uint4* target = reinterpret_cast<uint4*>(static_cast<char*>(base) + at * (wide ? 4 : 2));
    if (wide) {
      target[0] = {float_bits(x[0]), float_bits(x[1]), float_bits(x[2]), float_bits(x[3])};
      target[1] = {float_bits(x[4]), float_bits(x[5]), float_bits(x[6]), float_bits(x[7])};
      return;
    }
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) packed[i] = real_to_16(x[2 * i], dtype) | real_to_16(x[2 * i + 1], dtype) << 16;
    target[0] = {packed[0], packed[1], packed[2], packed[3]};
    return;
  }
#pragma unroll
  for (int i = 0; i < kRunOfRow; ++i) {
    if (i >= count) continue;
    if (wide) {
      static_cast<float*>(base)[at + i] = x[i];
    } else {
      static_cast<uint16_t*>(base)[at + i] = static_cast<uint16_t>(real_to_16(x[i], dtype));
    }
  }
}

// A float32 rounded to a dtype.
__device__ __forceinline__ float round_to(float x, Real dtype) {
  return dtype == Real::kFloat32 ? x : real_from_16(static_cast<uint16_t>(real_to_16(x, dtype)), dtype);
}

// The low bytes of 8 words as codes; `vector`: 8-byte aligned.
__device__ __forceinline__ void store_codes(int8_t* target, int count, bool vector, const uint32_t (&word)[kRunOfRow]) {
  if (vector) {
    *reinterpret_cast<uint2*>(target) = {pack_bytes(word[0], word[1], word[2], word[3]),
                                         pack_bytes(word[4], word[5], word[6], word[7])};
    return;
  }
#pragma unroll
  for (int i = 0; i < kRunOfRow; ++i) {
    if (i < count) target[i] = static_cast<int8_t>(word[i]);
  }
}

__device__ __forceinline__ float sum_of(const float (&x)[kRunOfRow]) {
  return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]));
}

struct Sum {
  static __device__ __forceinline__ float of(float a, float b) { return a + b; }
};
struct Largest {
  static __device__ __forceinline__ float of(float a, float b) { return fmaxf(a, b); }
};

// One number of all threads of a row, the same in each: a warp by shuffles; kThreads of a block through the floats at
// `shared`, kThreads / 32 of them, which no other reduction may use.
template <class Operation, int kThreads>
__device__ __forceinline__ float reduce(float x, float* shared) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) x = Operation::of(x, shuffle_xor(x, mask));
  if constexpr (kThreads > 32) {
    if (lane_index() == 0) shared[threadIdx.x / 32] = x;
    VITQ_BARRIER();  // every warp's number is there
    x = shared[0];
#pragma unroll
    for (int warp = 1; warp < kThreads / 32; ++warp) x = Operation::of(x, shared[warp]);
  }
  return x;
}

// S5: codes of a token, absmax first.
struct TokenScale {
  float scale, inverse;
};
constexpr float kTokenAbsmaxFloor = 1e-30f;  // reference.TOKEN_ABSMAX_FLOOR

__device__ __forceinline__ TokenScale token_scale(float absmax) {
  const float a = fmaxf(absmax, kTokenAbsmaxFloor);
  return {a / 127.0f, 127.0f / a};
}

inline bool is_aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

}  // namespace vitq
