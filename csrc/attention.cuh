// What attention does to a score: distance, log2 code, level (S4), and the reference's own logarithm of a row's sum.
#pragma once

#include "semantics.cuh"

namespace vitq {

__device__ __forceinline__ int32_t larger(int32_t a, int32_t b) { return a > b ? a : b; }

// A head's levels, as a warp looks them up: up to 16 in four registers, more in shared memory.
struct Levels {
  uint32_t words[4];           // 16 bytes, zeros behind the last level
  const unsigned char* table;  // all of them
  int count;
};

// log2(a / b) of positive integers below 2^52: reference.log2_ratio, rounding by rounding.
__device__ __forceinline__ void split(int32_t x, double& mantissa, int& exponent) {
  const uint64_t word = double_bits(static_cast<double>(x));
  mantissa = bits_double((word & ((uint64_t{1} << 52) - 1)) | uint64_t{1023} << 52);
  exponent = static_cast<int>(word >> 52) - 1023;
}

__device__ inline double log2_ratio(int32_t a, int32_t b) {
  constexpr double kTwoOverLn2 = 2.8853900817779268;
  constexpr int kTerms = 12;
  double m_a, m_b;
  int e_a, e_b;
  split(a, m_a, e_a);
  split(b, m_b, e_b);
  const double f = (m_a - m_b) / (m_a + m_b), square = f * f;
  double series = kTwoOverLn2 / (2 * kTerms - 1);
#pragma unroll
  for (int n = kTerms - 2; n >= 0; --n) series = series * square + kTwoOverLn2 / (2 * n + 1);
  return static_cast<double>(e_a - e_b) + f * series;
}

// Code steps from a row's maximum to probability 1: reference.attention_offset.
__device__ inline float attention_offset(int32_t total, int32_t largest, float inv_tau) {
  return static_cast<float>(log2_ratio(total, largest) * static_cast<double>(inv_tau));
}

// How distances become codes. Words near kRoundToInteger whose low byte is the code.
struct Coding {
  float kappa, offset, last;  // last: level count - 1
  bool normalised;            // with an offset, which is added after the product was rounded

  // Of four keys; which form it is is asked once for them.
  __device__ __forceinline__ void codes(const float (&distance)[4], uint32_t (&code)[4]) const {
    if (normalised) {
#pragma unroll
      for (int i = 0; i < 4; ++i) code[i] = float_bits(fminf(distance[i] * kappa + offset, last) + kRoundToInteger);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        code[i] = float_bits(fminf(fmaf(distance[i], kappa, kRoundToInteger), kRoundToInteger + last));
      }
    }
  }
};

// The levels of four codes, the first in the lowest byte, of a table of up to kMost.
template <int kMost>
__device__ __forceinline__ uint32_t levels_of(const Levels& levels, const uint32_t (&code)[4]) {
  if constexpr (kMost > 16) {
    uint32_t level[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) level[i] = levels.table[code[i] & 255];
    return pack_bytes(level[0], level[1], level[2], level[3]);
  }
  // Codes are below 16 and the constant's low 16 bits are zero, shifted or not: four nibbles, which select bytes.
  const uint32_t nibbles = code[0] + (code[1] << 4) + (code[2] << 8) + (code[3] << 12);
  const uint32_t low = permute_bytes(levels.words[0], levels.words[1], nibbles & 0x7777);
  if constexpr (kMost <= 8) return low;
  const uint32_t high = permute_bytes(levels.words[2], levels.words[3], nibbles & 0x7777);
  const uint32_t upper = permute_bytes(0x0000ff00u, 0, nibbles >> 3 & 0x1111);  // 0xff where a code is 8 or more
  return low ^ ((low ^ high) & upper);
}

// The same, of however many there are.
__device__ __forceinline__ uint32_t levels_of(const Levels& levels, const uint32_t (&code)[4]) {
  if (levels.count > 16) return levels_of<256>(levels, code);
  return levels.count > 8 ? levels_of<16>(levels, code) : levels_of<8>(levels, code);
}

// A number of both of the lane's rows, over the 4 lanes that share them.
template <class Operation>
__device__ __forceinline__ void over_row(int32_t (&x)[2], const Operation& operation) {
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    x[r] = operation(x[r], shuffle_xor(x[r], 1));
    x[r] = operation(x[r], shuffle_xor(x[r], 2));
  }
}

// Values of four keys and 8 channels.
struct KeyQuad {
  uint2 keys[4];

  // Of one channel, the first key in the lowest byte.
  __device__ __forceinline__ uint32_t of_channel(unsigned channel) const {
    const uint32_t pair = channel % 4 | (channel % 4 + 4) << 4;
    const auto word = [&](int i) { return channel < 4 ? keys[i].x : keys[i].y; };
    return permute_bytes(permute_bytes(word(0), word(1), pair), permute_bytes(word(2), word(3), pair), 0x5410);
  }
};

}  // namespace vitq
