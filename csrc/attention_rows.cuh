// Where the operands of a head's attention lie in memory: rows of q, k and v, of all tokens of an image or of those of
// a window, its bias, and the rows of its output.
//
// Windows     A place of a window is the token that a table names. Nothing is gathered: each row is read where it lies,
//             and each output row is written there, so that partition, cyclic shift and their reverse cost a load.
// Source      design.md S4; reference.attention.
#pragma once

#include "launchers.h"
#include "semantics.cuh"

namespace vitq {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kQueries = 16 * kWarps;
constexpr int kKeys = 64;  // of a tile

struct AttentionArguments {
  AttentionOperand q, k, v;
  const float* kappa;
  const uint8_t* levels;
  int level_count;
  const float* multiplier;
  const int32_t* zero_point;
  AttentionBias bias;
  const float* inv_tau;  // or null
  AttentionWindows windows;
  int8_t* out;
  int heads, sequence, dim, padded_dim, bits;  // padded_dim: a multiple of 16, what q, k and v have
};

// Where 16 bytes of a row lie in shared memory: chunks are exchanged so that 8 rows' chunks of one number fall into all
// banks.
template <int kRowBytes>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  constexpr int kShift = kRowBytes == 128 ? 0 : kRowBytes == 64 ? 1 : 2;
  constexpr int kMask = kRowBytes == 128 ? 7 : kRowBytes == 64 ? 3 : 1;
  return row * kRowBytes + (chunk ^ (row >> kShift & kMask)) * 16;
}

// kSteps: of 32 channels. kWindows: a sequence is a window, else an image.
template <int kSteps, bool kWindows>
struct AttentionRows {
  static constexpr int kRowBytes = 32 * kSteps;
  static constexpr int kValueUnits = (kRowBytes / 8 * (kKeys / 4) + kThreads - 1) / kThreads;  // a thread's, of a tile
  static constexpr int kValueFragments = 4 * kSteps;

  const AttentionArguments& with;
  const int8_t *keys, *values;   // of this head
  int head, image, first_query;  // first_query: of the warp
  int which_bias;                // along the first dimension of the bias
  const int32_t* tokens;         // of the window, place by place

  __device__ __forceinline__ explicit AttentionRows(const AttentionArguments& arguments) : with(arguments) {
    const int blocks = (with.sequence + kQueries - 1) / kQueries;
    const int which = blockIdx.x / blocks;
    head = which % with.heads, image = which / with.heads;
    if constexpr (kWindows) {
      const int window = image % with.windows.count;
      image /= with.windows.count;
      tokens = with.windows.tokens + window * with.sequence;
      which_bias = with.windows.pattern == nullptr ? 0 : with.windows.pattern[window];
    } else {
      which_bias = image;
    }
    first_query = blockIdx.x % blocks * kQueries + warp_index() * 16;
    keys = with.k.data + image * with.k.batch + head * with.k.head;
    values = with.v.data + image * with.v.batch + head * with.v.head;
  }

  // The token at a place of the sequence, which must be one.
  __device__ __forceinline__ int token(int place) const {
    if constexpr (kWindows) return tokens[place];
    return place;
  }

  // Where the output of a place's token begins.
  __device__ __forceinline__ int8_t* output(int place) const {
    const int64_t of_image = int64_t{with.sequence} * (kWindows ? with.windows.count : 1);
    return with.out + (image * of_image + token(place)) * with.heads * with.dim + head * with.dim;
  }

  // The warp's 16 queries as A fragments, straight from memory; zeros where there are none.
  __device__ __forceinline__ void load_query(uint32_t (&query)[kSteps][4]) const {
    const int8_t* base = with.q.data + image * with.q.batch + head * with.q.head;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first_query + lane_index() / 4 + i % 2 * 8, at = 32 * s + i / 2 * 16 + lane_index() % 4 * 4;
        const bool inside = row < with.sequence && at < with.padded_dim;
        query[s][i] = inside ? *reinterpret_cast<const uint32_t*>(base + token(row) * with.q.position + at) : 0;
      }
    }
  }

  // Starts the copy of a tile of keys to where its stage begins.
  __device__ __forceinline__ void load_keys(int tile, unsigned char* stage) const {
    constexpr int kChunks = kRowBytes / 16;
    for (int i = threadIdx.x; i < kKeys * kChunks; i += kThreads) {
      const int place = i / kChunks, chunk = i % kChunks, n = place % 8, f = place / 8;
      const int key = tile * kKeys + f / 2 * 16 + n / 2 * 4 + f % 2 * 2 + n % 2;
      const bool inside = key < with.sequence && chunk * 16 < with.padded_dim;
      copy_async_16(stage + swizzled<kRowBytes>(place, chunk),
                    inside ? keys + token(key) * with.k.position + chunk * 16 : keys, inside ? 16 : 0);
    }
    commit_copies();
  }

  __device__ __forceinline__ void add_bias(int key, int32_t (&first)[4], int32_t (&second)[4]) const {
    const AttentionBias& bias = with.bias;
    const int32_t* base = bias.data + which_bias * bias.batch + head * bias.head;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_query + lane_index() / 4 + i / 2 * 8;
      if (row >= with.sequence) continue;
      const int32_t* line = base + row * bias.query;
      if (key + i % 2 < with.sequence) first[i] += line[(key + i % 2) * bias.key];
      if (key + 2 + i % 2 < with.sequence) second[i] += line[(key + 2 + i % 2) * bias.key];
    }
  }

  // A thread's share of a tile of values: 4 keys of 8 channels a unit.
  __device__ __forceinline__ void load_values(int tile, KeyQuad (&raw)[kValueUnits]) const {
#pragma unroll
    for (int u = 0; u < kValueUnits; ++u) {
      const int unit = threadIdx.x + u * kThreads, channel = unit / (kKeys / 4) * 8;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = tile * kKeys + unit % (kKeys / 4) * 4 + i;
        raw[u].keys[i] = {0, 0};
        if (key < with.sequence && channel < with.padded_dim) {
          raw[u].keys[i] = *reinterpret_cast<const uint2*>(values + token(key) * with.v.position + channel);
        }
      }
    }
  }

  __device__ __forceinline__ void store(const int32_t (&o)[kValueFragments][4], const int32_t (&total)[2]) const {
    const int of_lane = with.padded_dim / 4, channel = lane_index() % 4 * of_lane;
    const float* multiplier = with.multiplier + head * with.dim;
    const int32_t* zero_point = with.zero_point + head * with.dim;
    const CodeRange range = code_range(with.bits);
    const float inverse[2] = {1.0f / int_to_float(total[0]), 1.0f / int_to_float(total[1])};
    uint32_t packed[2][kValueFragments / 2];
#pragma unroll
    for (int jj = 0; jj < kValueFragments / 2; ++jj) {
      const int at = channel + 4 * jj;
      uint32_t word[2][4] = {};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (4 * jj >= of_lane || at + i >= with.dim) continue;
        const float m = multiplier[at + i], zero = kRoundToInteger + static_cast<float>(zero_point[at + i]);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          word[r][i] = requantise(int_to_float(o[2 * jj + i / 2][2 * r + i % 2]), m * inverse[r], zero, range);
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) packed[r][jj] = pack_bytes(word[r][0], word[r][1], word[r][2], word[r][3]);
    }
    // Widest first: 16 bytes where a lane's channels are as many (dims 64 and 128), 4 where dims are multiples of 4.
    const bool wide = of_lane % 16 == 0 && with.dim == with.padded_dim && with.heads * with.dim % 16 == 0;
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int row = first_query + static_cast<int>(lane_index()) / 4 + 8 * r;
      if (row >= with.sequence) continue;
      int8_t* line = output(row);
#pragma unroll
      for (int jj = 0; jj < kValueFragments / 2; ++jj) {
        const int at = channel + 4 * jj;
        if (4 * jj >= of_lane) continue;
        if (wide) {
          if (jj % 4 == 0 && kValueFragments >= 8) {
            *reinterpret_cast<uint4*>(line + at) = {packed[r][jj], packed[r][jj + 1], packed[r][jj + 2],
                                                    packed[r][jj + 3]};
          }
        } else if (with.dim % 4 == 0) {
          if (at < with.dim) *reinterpret_cast<uint32_t*>(line + at) = packed[r][jj];
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (at + i < with.dim) line[at + i] = static_cast<int8_t>(packed[r][jj] >> 8 * i);
          }
        }
      }
    }
  }
};

}  // namespace vitq
