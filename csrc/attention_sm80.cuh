// Log2-quantized softmax attention in integers (S4) for sm_80 and later: two tensor-core products, codes in between in
// registers.
//
// Computes    acc = q k^T (+ bias); code = min(rint(f32(max - acc) * kappa), levels - 1); Z and o are sums of levels
//             and of levels times v; out = requantise(o, multiplier / Z). With inv_tau, codes of the normalised
//             probability.
// Layouts     q, k, v int8 by strides, dim contiguous, 16-byte aligned; out int8 [batch, tokens, heads * dim].
// Work split  A block has 4 warps of 16 queries of one head; they share tiles of 64 keys and values in shared memory. A
//             warp without queries only copies. Rows of windows are found by a table (attention_rows.cuh).
// Passes      Up to 256 keys all scores of a warp's rows stay in registers: one pass over k, one over v. Beyond, a pass
//             for the maximum, one for Z where it is normalised, and one for codes and v.
// Key order   Row 8 f + n of a tile in shared memory is key 16 (f / 2) + 4 (n / 2) + 2 (f % 2) + n % 2: so a lane's
//             scores are of 4 consecutive keys, whose levels are the very register that the second product asks for.
// Values      v is transposed on its way into shared memory, 4 x 4 bytes at a time; its columns are ordered so that a
//             lane ends with dim / 4 consecutive ones.
// Exactness   Exact. |acc| <= 2^21 + 2^29, o <= 4096 * 255 * 128 < 2^31.
// Source      design.md S4, kernels.md 3.4; reference.attention; fragment layouts: PTX ISA 9.7.14.5.

#pragma once

#include <type_traits>

#include "attention.cuh"
#include "attention_rows.cuh"
#include "launch.cuh"

namespace vitq {

constexpr int kPairs = kKeys / 16;   // of fragments of 8 keys
constexpr int kMasked = -(1 << 30);  // below every score, and no distance from it overflows
constexpr int kTableBytes = 256;

// kSteps: of 32 channels. kTiles: of 64 keys whose scores stay in registers; 0: none do. kWindows: as in AttentionRows.
template <int kSteps, int kTiles, bool kWindows>
struct Attention {
  using Rows = AttentionRows<kSteps, kWindows>;
  static constexpr int kRowBytes = Rows::kRowBytes, kKeyBytes = kKeys * kRowBytes;
  static constexpr int kValueFragments = Rows::kValueFragments, kValueBytes = kRowBytes * kKeys;
  static constexpr int kValueUnits = Rows::kValueUnits;
  static constexpr int kSharedBytes = 2 * kKeyBytes + kValueBytes + kTableBytes;

  const AttentionArguments& with;
  Rows rows;
  unsigned char* shared;
  bool active;    // the warp has queries
  int stage = 0;  // that the next tile of keys is in
  uint32_t query[kSteps][4];
  Levels levels;

  __device__ __forceinline__ explicit Attention(const AttentionArguments& arguments)
      : with(arguments), rows(arguments) {
    active = rows.first_query < with.sequence;
    shared = shared_memory();
    load_levels();
    rows.load_query(query);
  }

  __device__ __forceinline__ void load_levels() {
    unsigned char* table = shared + 2 * kKeyBytes + kValueBytes;
    const uint8_t* source = with.levels + rows.head * with.level_count;
    for (int i = threadIdx.x; i < kTableBytes; i += kThreads) table[i] = i < with.level_count ? source[i] : 0;
    levels.table = table, levels.count = with.level_count;
    VITQ_BARRIER();  // the table is complete
#pragma unroll
    for (int i = 0; i < 4; ++i) levels.words[i] = reinterpret_cast<const uint32_t*>(table)[i];
  }

  // Waits for the tile of keys that was loaded last, and starts the next one, if there is one.
  __device__ __forceinline__ void next_keys(int following) {
    wait_copies<0>();
    VITQ_BARRIER();  // the tile is there; and all warps have left what is overwritten from here on
    if (following >= 0) rows.load_keys(following, shared + (stage ^ 1) * kKeyBytes);
  }

  // Scores of the warp's rows with a tile: of pair p, the lane's 4 keys 16 p + 4 (lane % 4) .. + 3 in row lane / 4 are
  // [2p][0], [2p][1], [2p + 1][0], [2p + 1][1], those in row + 8 the others.
  __device__ __forceinline__ void score(int tile, int32_t (&acc)[2 * kPairs][4]) {
    const unsigned char* source = shared + stage * kKeyBytes;
    const int lane = lane_index();
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
#pragma unroll
      for (int i = 0; i < 4; ++i) acc[2 * p][i] = acc[2 * p + 1][i] = 0;
      const int first_key = tile * kKeys + 16 * p;
      if (first_key >= with.sequence) continue;
      uint32_t b[4 * kSteps];
#pragma unroll
      for (int x = 0; x < kSteps; ++x) {
        const int matrix = 4 * x + lane / 8, place = 16 * p + matrix / (2 * kSteps) * 8 + lane % 8;
        uint32_t four[4];
        load_matrices(four, source + swizzled<kRowBytes>(place, matrix % (2 * kSteps)));
#pragma unroll
        for (int i = 0; i < 4; ++i) b[4 * x + i] = four[i];
      }
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
        mma_s8(acc[2 * p], query[s], b[2 * s], b[2 * s + 1]);
        mma_s8(acc[2 * p + 1], query[s], b[2 * kSteps + 2 * s], b[2 * kSteps + 2 * s + 1]);
      }
      const int key = first_key + lane % 4 * 4;
      if (with.bias.data != nullptr) rows.add_bias(key, acc[2 * p], acc[2 * p + 1]);
      if (first_key + 16 > with.sequence) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (key + i % 2 >= with.sequence) acc[2 * p][i] = kMasked;
          if (key + 2 + i % 2 >= with.sequence) acc[2 * p + 1][i] = kMasked;
        }
      }
    }
  }

  __device__ __forceinline__ void take_maximum(int tile, const int32_t (&acc)[2 * kPairs][4], int32_t (&top)[2]) const {
#pragma unroll
    for (int f = 0; f < 2 * kPairs; ++f) {
      if (tile * kKeys + 8 * (f & ~1) >= with.sequence) continue;
#pragma unroll
      for (int i = 0; i < 4; ++i) top[i / 2] = acc[f][i] > top[i / 2] ? acc[f][i] : top[i / 2];
    }
  }

  static __device__ __forceinline__ void largest_of_row(int32_t (&x)[2]) { over_row(x, larger); }
  static __device__ __forceinline__ void sum_of_row(int32_t (&x)[2]) {
    over_row(x, [](int32_t a, int32_t b) { return a + b; });
  }

  // Levels of a tile's scores, four keys a word, and their sums.
  __device__ __forceinline__ void code(int tile, const int32_t (&acc)[2 * kPairs][4], const int32_t (&top)[2],
                                       const Coding (&coding)[2], uint32_t (&level)[kPairs][2],
                                       int32_t (&total)[2]) const {
#pragma unroll
    for (int p = 0; p < kPairs; ++p) {
      level[p][0] = level[p][1] = 0;
      const int first_key = tile * kKeys + 16 * p;
      if (first_key >= with.sequence) continue;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float distance[4];
        uint32_t codes[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) distance[i] = int_to_float(top[r] - acc[2 * p + i / 2][2 * r + i % 2]);
        coding[r].codes(distance, codes);
        uint32_t word = levels_of(levels, codes);
        if (first_key + 16 > with.sequence) {
          const int left = with.sequence - first_key - static_cast<int>(lane_index()) % 4 * 4;
          word &= left >= 4 ? ~0u : left <= 0 ? 0u : (1u << 8 * left) - 1;
        }
        level[p][r] = word;
        total[r] = static_cast<int32_t>(dot_u8(word, 0x01010101u, static_cast<uint32_t>(total[r])));
      }
    }
  }

  // Row of the transposed values that holds a channel: fragment j, column 2 t + c for channel (dim / 4) t + 2 j + c.
  __device__ __forceinline__ int value_row(int channel) const {
    const int of_lane = with.padded_dim / 4, rest = channel % of_lane;
    return rest / 2 * 8 + channel / of_lane * 2 + rest % 2;
  }

  __device__ __forceinline__ void store_values(const KeyQuad (&raw)[kValueUnits]) const {
    unsigned char* target = shared + 2 * kKeyBytes;
#pragma unroll
    for (int u = 0; u < kValueUnits; ++u) {
      const int unit = threadIdx.x + u * kThreads, quad = unit % (kKeys / 4), channel = unit / (kKeys / 4) * 8;
      if (channel >= with.padded_dim) continue;
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        *reinterpret_cast<uint32_t*>(target + swizzled<kKeys>(value_row(channel + c), quad / 4) + quad % 4 * 4) =
            raw[u].of_channel(static_cast<unsigned>(c));
      }
    }
  }

  // o += levels * v of a tile.
  __device__ __forceinline__ void multiply(int tile, const uint32_t (&level)[kPairs][2],
                                           int32_t (&o)[kValueFragments][4]) const {
    const unsigned char* source = shared + 2 * kKeyBytes;
    const uint32_t first[4] = {level[0][0], level[0][1], level[1][0], level[1][1]};
    const uint32_t second[4] = {level[2][0], level[2][1], level[3][0], level[3][1]};
#pragma unroll
    for (int j = 0; j < kValueFragments; ++j) {
      if (8 * j >= with.padded_dim) continue;
      uint32_t b[4];
      load_matrices(b, source + swizzled<kKeys>(8 * j + lane_index() % 8, lane_index() / 8));
      mma_u8_s8(o[j], first, b[0], b[1]);
      if (tile * kKeys + 32 < with.sequence) mma_u8_s8(o[j], second, b[2], b[3]);
    }
  }

  __device__ __forceinline__ void plain_coding(Coding (&coding)[2]) const {
    coding[0] = coding[1] = {with.kappa[rows.head], 0.0f, static_cast<float>(with.level_count - 1), false};
  }

  // Codes of the normalised probability from here on; what divides the output is the largest level then.
  __device__ __forceinline__ void normalise(Coding (&coding)[2], int32_t (&total)[2]) const {
    const int32_t largest = static_cast<int32_t>(levels.words[0] & 255);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      coding[r].offset = attention_offset(total[r], largest, with.inv_tau[rows.head]);
      coding[r].normalised = true;
      total[r] = largest;
    }
  }

  // The second product with a tile. `levels_of_tile` gives its levels, and in doing so brings all warps past the values
  // of the tile before.
  template <class LevelsOfTile>
  __device__ __forceinline__ void weigh(int tile, int32_t (&o)[kValueFragments][4],
                                        const LevelsOfTile& levels_of_tile) {
    KeyQuad raw[kValueUnits];
    rows.load_values(tile, raw);
    uint32_t level[kPairs][2];
    levels_of_tile(level);
    store_values(raw);
    VITQ_BARRIER();  // the transposed values are complete
    if (active) multiply(tile, level, o);
  }

  __device__ __forceinline__ void run() {
    const int tiles = (with.sequence + kKeys - 1) / kKeys;
    int32_t top[2] = {kMasked, kMasked}, total[2] = {0, 0}, o[kValueFragments][4] = {};
    Coding coding[2];
    plain_coding(coding);
    const bool normalised = with.inv_tau != nullptr;
    rows.load_keys(0, shared);
    if constexpr (kTiles > 0) {
      int32_t acc[kTiles][2 * kPairs][4];
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (tile >= tiles) continue;
        next_keys(tile + 1 < tiles ? tile + 1 : -1);
        if (active) {
          score(tile, acc[tile]);
          take_maximum(tile, acc[tile], top);
        }
        stage ^= 1;
      }
      largest_of_row(top);
      if (normalised) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          uint32_t level[kPairs][2];
          if (tile < tiles && active) code(tile, acc[tile], top, coding, level, total);
        }
        sum_of_row(total);
        if (active) normalise(coding, total);
      }
      int32_t sums[2] = {0, 0};
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        if (tile >= tiles) continue;
        weigh(tile, o, [&](uint32_t (&level)[kPairs][2]) {
          if (active) code(tile, acc[tile], top, coding, level, sums);
          VITQ_BARRIER();  // all warps have left the values of the tile before
        });
      }
      if (!normalised) total[0] = sums[0], total[1] = sums[1];
    } else {
      int32_t acc[2 * kPairs][4];
      for (int tile = 0; tile < tiles; ++tile) {
        next_keys(tile + 1 < tiles ? tile + 1 : 0);
        if (active) {
          score(tile, acc);
          take_maximum(tile, acc, top);
        }
        stage ^= 1;
      }
      largest_of_row(top);
      if (normalised) {
        for (int tile = 0; tile < tiles; ++tile) {
          next_keys(tile + 1 < tiles ? tile + 1 : 0);
          if (active) {
            uint32_t level[kPairs][2];
            score(tile, acc);
            code(tile, acc, top, coding, level, total);
          }
          stage ^= 1;
        }
        sum_of_row(total);
        if (active) normalise(coding, total);
      }
      int32_t sums[2] = {0, 0};
      for (int tile = 0; tile < tiles; ++tile) {
        weigh(tile, o, [&](uint32_t (&level)[kPairs][2]) {
          next_keys(tile + 1 < tiles ? tile + 1 : -1);
          if (active) {
            score(tile, acc);
            code(tile, acc, top, coding, level, sums);
          }
          stage ^= 1;
        });
      }
      if (!normalised) total[0] = sums[0], total[1] = sums[1];
    }
    if (!normalised) sum_of_row(total);
    if (active) rows.store(o, total);
  }
};

// Calls `launch` with how many tiles of keys stay in registers.
template <class Launch>
void with_tiles(int sequence, const Launch& launch) {
  if (sequence <= 64) return launch(std::integral_constant<int, 1>());
  if (sequence <= 128) return launch(std::integral_constant<int, 2>());
  if (sequence <= 256) return launch(std::integral_constant<int, 4>());
  launch(std::integral_constant<int, 0>());
}

template <int kSharedBytes, class Kernel>
void launch_attention(Kernel* kernel, const AttentionArguments& with, int64_t sequences, cudaStream_t stream) {
  const int64_t blocks = sequences * with.heads * ((with.sequence + kQueries - 1) / kQueries);
  require(blocks < int64_t{1} << 31, "attention: too many heads, windows and images");
  VITQ_LAUNCH(kernel, static_cast<unsigned>(blocks), kThreads, kSharedBytes, stream, with);
  check_launch("attention");
}

// Attention inside windows (attention_windows_sm80.cu).
constexpr int kMostWindowDim = 64;
void attention_windows(const AttentionArguments& with, int batch, cudaStream_t stream);

}  // namespace vitq
