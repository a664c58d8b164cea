// Rows of real numbers: how a thread loads and stores a run of 8 of them, and how the threads of a row agree on sums.
#pragma once

#include <type_traits>

#include "semantics.cuh"

namespace vitq {

constexpr int kRunOfRow = 8;  // elements: 16 bytes of a 16-bit dtype, 8 bytes of codes

// Calls `body` with the dtype as a constant. One uniform branch, above all loads: a branch between two of them would
// make the second wait for the first.
template <class Body>
__device__ __forceinline__ void with_constant(Real dtype, const Body& body) {
  if (dtype == Real::kFloat32) {
    body(std::integral_constant<Real, Real::kFloat32>());
  } else if (dtype == Real::kFloat16) {
    body(std::integral_constant<Real, Real::kFloat16>());
  } else {
    body(std::integral_constant<Real, Real::kBfloat16>());
  }
}

// A run as it lies in memory.
template <Real kDtype>
struct Words {
  static constexpr int kCount = kDtype == Real::kFloat32 ? 2 : 1;
  uint4 at[kCount] = {};
};

template <Real kDtype>
__device__ __forceinline__ int64_t byte_of(int64_t element) {
  return element * (kDtype == Real::kFloat32 ? 4 : 2);
}

// Elements `at` .. at + 7, 16-byte aligned.
template <Real kDtype>
__device__ __forceinline__ Words<kDtype> load_words(const void* base, int64_t at) {
  const uint4* source = reinterpret_cast<const uint4*>(static_cast<const char*>(base) + byte_of<kDtype>(at));
  Words<kDtype> words;
#pragma unroll
  for (int i = 0; i < words.kCount; ++i) words.at[i] = source[i];
  return words;
}

template <Real kDtype>
__device__ __forceinline__ void store_words(void* base, int64_t at, const Words<kDtype>& words) {
  uint4* target = reinterpret_cast<uint4*>(static_cast<char*>(base) + byte_of<kDtype>(at));
#pragma unroll
  for (int i = 0; i < words.kCount; ++i) target[i] = words.at[i];
}

template <Real kDtype>
__device__ __forceinline__ void reals_of(const Words<kDtype>& words, float (&x)[kRunOfRow]) {
  constexpr int kPerWord = kRunOfRow / (4 * Words<kDtype>::kCount);
#pragma unroll
  for (int i = 0; i < words.kCount; ++i) {
    const uint32_t word[4] = {words.at[i].x, words.at[i].y, words.at[i].z, words.at[i].w};
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (kPerWord == 1) {
        x[4 * i + j] = bits_float(word[j]);
      } else {
        x[2 * j] = real_from_16(static_cast<uint16_t>(word[j]), kDtype);
        x[2 * j + 1] = real_from_16(static_cast<uint16_t>(word[j] >> 16), kDtype);
      }
    }
  }
}

// Rounded to the dtype.
template <Real kDtype>
__device__ __forceinline__ Words<kDtype> words_of(const float (&x)[kRunOfRow]) {
  Words<kDtype> words;
  if constexpr (kDtype == Real::kFloat32) {
    words.at[0] = {float_bits(x[0]), float_bits(x[1]), float_bits(x[2]), float_bits(x[3])};
    words.at[1] = {float_bits(x[4]), float_bits(x[5]), float_bits(x[6]), float_bits(x[7])};
  } else {
    uint32_t pair[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) pair[i] = real_to_16(x[2 * i], kDtype) | real_to_16(x[2 * i + 1], kDtype) << 16;
    words.at[0] = {pair[0], pair[1], pair[2], pair[3]};
  }
  return words;
}

template <Real kDtype>
__device__ __forceinline__ float load_real(const void* base, int64_t at) {
  if constexpr (kDtype == Real::kFloat32) {
    return static_cast<const float*>(base)[at];
  } else {
    return real_from_16(static_cast<const uint16_t*>(base)[at], kDtype);
  }
}

template <Real kDtype>
__device__ __forceinline__ void store_real(void* base, int64_t at, float x) {
  if constexpr (kDtype == Real::kFloat32) {
    static_cast<float*>(base)[at] = x;
  } else {
    static_cast<uint16_t*>(base)[at] = static_cast<uint16_t>(real_to_16(x, kDtype));
  }
}

// The low bytes of 8 words as codes, 8-byte aligned.
__device__ __forceinline__ void store_codes(int8_t* target, const uint32_t (&word)[kRunOfRow]) {
  *reinterpret_cast<uint2*>(target) = {pack_bytes(word[0], word[1], word[2], word[3]),
                                       pack_bytes(word[4], word[5], word[6], word[7])};
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

// Each number of x over all threads of a row, the same in each: a warp by shuffles; kThreads of a block through the
// floats at `shared`, kCount * kThreads / 32 of them, which no other reduction may use.
template <class Operation, int kThreads, int kCount>
__device__ __forceinline__ void reduce(float (&x)[kCount], float* shared) {
#pragma unroll
  for (int mask = 16; mask > 0; mask >>= 1) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] = Operation::of(x[i], shuffle_xor(x[i], mask));
  }
  if constexpr (kThreads > 32) {
    constexpr int kWarps = kThreads / 32;
    if (lane_index() == 0) {
#pragma unroll
      for (int i = 0; i < kCount; ++i) shared[i * kWarps + threadIdx.x / 32] = x[i];
    }
    VITQ_BARRIER();  // every warp's numbers are there
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      x[i] = shared[i * kWarps];
#pragma unroll
      for (int warp = 1; warp < kWarps; ++warp) x[i] = Operation::of(x[i], shared[i * kWarps + warp]);
    }
  }
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
