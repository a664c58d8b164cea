// Log2-quantized softmax attention in integers (S4) for sm_80 and later: two tensor-core products, codes in between in
// registers.
//
// Computes    acc = q k^T (+ bias); code = min(rint(f32(max - acc) * kappa), levels - 1); Z and o are sums of levels
//             and of levels times v; out = requantise(o, multiplier / Z). With inv_tau, codes of the normalised
//             probability.
// Layouts     q, k, v int8 by strides, dim contiguous, 16-byte aligned; out int8 [batch, sequence, heads * dim].
// Work split  A block has 4 warps of 16 queries of one head; they share tiles of 64 keys and values in shared memory. A
//             warp without queries only copies.
// Passes      Up to 256 keys all scores of a warp's rows stay in registers: one pass over k, one over v. Beyond, a pass
//             for the maximum, one for Z where it is normalised, and one for codes and v.
// Key order   Row 8 f + n of a tile in shared memory is key 16 (f / 2) + 4 (n / 2) + 2 (f % 2) + n % 2: so a lane's
//             scores are of 4 consecutive keys, whose levels are the very register that the second product asks for.
// Values      v is transposed on its way into shared memory, 4 x 4 bytes at a time; its columns are ordered so that a
//             lane ends with dim / 4 consecutive ones.
// Exactness   Exact. |acc| <= 2^21 + 2^29, o <= 4096 * 255 * 128 < 2^31.
// Source      design.md S4, kernels.md 3.4; reference.attention; fragment layouts: PTX ISA 9.7.14.5.

#include "attention.cuh"
#include "launch.cuh"
#include "launchers.h"

namespace vitq {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kQueries = 16 * kWarps;
constexpr int kKeys = 64;            // of a tile
constexpr int kPairs = kKeys / 16;   // of fragments of 8 keys
constexpr int kMostKeys = 4096;      // o fits int32
constexpr int kMasked = -(1 << 30);  // below every score, and no distance from it overflows
constexpr int kTableBytes = 256;

struct Arguments {
  AttentionOperand q, k, v;
  const float* kappa;
  const uint8_t* levels;
  int level_count;
  const float* multiplier;
  const int32_t* zero_point;
  AttentionBias bias;
  const float* inv_tau;  // or null
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

// kSteps: of 32 channels. kTiles: of 64 keys whose scores stay in registers; 0: none do.
template <int kSteps, int kTiles>
struct Attention {
  static constexpr int kRowBytes = 32 * kSteps, kKeyBytes = kKeys * kRowBytes;
  static constexpr int kValueFragments = 4 * kSteps, kValueBytes = kRowBytes * kKeys;
  static constexpr int kSharedBytes = 2 * kKeyBytes + kValueBytes + kTableBytes;
  static constexpr int kValueUnits = (kRowBytes / 8 * (kKeys / 4) + kThreads - 1) / kThreads;  // a thread's, of a tile

  const Arguments& with;
  const int8_t *keys, *values;  // of this head
  unsigned char* shared;
  int head, image, first_query;  // first_query: of the warp
  bool active;                   // the warp has queries
  int stage = 0;                 // that the next tile of keys is in
  uint32_t query[kSteps][4];
  Levels levels;

  __device__ __forceinline__ explicit Attention(const Arguments& arguments) : with(arguments) {
    const int blocks = (with.sequence + kQueries - 1) / kQueries;
    const int which = blockIdx.x / blocks;
    head = which % with.heads, image = which / with.heads;
    first_query = blockIdx.x % blocks * kQueries + warp_index() * 16;
    active = first_query < with.sequence;
    keys = with.k.data + image * with.k.batch + head * with.k.head;
    values = with.v.data + image * with.v.batch + head * with.v.head;
    shared = shared_memory();
    load_levels();
    load_query();
  }

  __device__ __forceinline__ void load_levels() {
    unsigned char* table = shared + 2 * kKeyBytes + kValueBytes;
    const uint8_t* source = with.levels + head * with.level_count;
    for (int i = threadIdx.x; i < kTableBytes; i += kThreads) table[i] = i < with.level_count ? source[i] : 0;
    levels.table = table, levels.count = with.level_count;
    VITQ_BARRIER();  // the table is complete
#pragma unroll
    for (int i = 0; i < 4; ++i) levels.words[i] = reinterpret_cast<const uint32_t*>(table)[i];
  }

  // The warp's 16 queries as A fragments, straight from memory; zeros where there are none.
  __device__ __forceinline__ void load_query() {
    const int8_t* base = with.q.data + image * with.q.batch + head * with.q.head;
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int row = first_query + lane_index() / 4 + i % 2 * 8, at = 32 * s + i / 2 * 16 + lane_index() % 4 * 4;
        const bool inside = row < with.sequence && at < with.padded_dim;
        query[s][i] = inside ? *reinterpret_cast<const uint32_t*>(base + row * with.q.position + at) : 0;
      }
    }
  }

  // Starts the copy of a tile of keys into a stage.
  __device__ __forceinline__ void load_keys(int tile, int into) const {
    constexpr int kChunks = kRowBytes / 16;
    for (int i = threadIdx.x; i < kKeys * kChunks; i += kThreads) {
      const int place = i / kChunks, chunk = i % kChunks, n = place % 8, f = place / 8;
      const int key = tile * kKeys + f / 2 * 16 + n / 2 * 4 + f % 2 * 2 + n % 2;
      const bool inside = key < with.sequence && chunk * 16 < with.padded_dim;
      copy_async_16(shared + into * kKeyBytes + swizzled<kRowBytes>(place, chunk),
                    inside ? keys + key * with.k.position + chunk * 16 : keys, inside ? 16 : 0);
    }
    commit_copies();
  }

  // Waits for the tile of keys that was loaded last, and starts the next one, if there is one.
  __device__ __forceinline__ void next_keys(int following) {
    wait_copies<0>();
    VITQ_BARRIER();  // the tile is there; and all warps have left what is overwritten from here on
    if (following >= 0) load_keys(following, stage ^ 1);
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
      if (with.bias.data != nullptr) add_bias(key, acc[2 * p], acc[2 * p + 1]);
      if (first_key + 16 > with.sequence) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (key + i % 2 >= with.sequence) acc[2 * p][i] = kMasked;
          if (key + 2 + i % 2 >= with.sequence) acc[2 * p + 1][i] = kMasked;
        }
      }
    }
  }

  __device__ __forceinline__ void add_bias(int key, int32_t (&first)[4], int32_t (&second)[4]) const {
    const AttentionBias& bias = with.bias;
    const int32_t* base = bias.data + image * bias.batch + head * bias.head;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int row = first_query + lane_index() / 4 + i / 2 * 8;
      if (row >= with.sequence) continue;
      const int32_t* line = base + row * bias.query;
      if (key + i % 2 < with.sequence) first[i] += line[(key + i % 2) * bias.key];
      if (key + 2 + i % 2 < with.sequence) second[i] += line[(key + 2 + i % 2) * bias.key];
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

  // A number of both of the lane's rows, over the 4 lanes that share them.
  template <class Operation>
  static __device__ __forceinline__ void over_row(int32_t (&x)[2], const Operation& operation) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      x[r] = operation(x[r], shuffle_xor(x[r], 1));
      x[r] = operation(x[r], shuffle_xor(x[r], 2));
    }
  }
  static __device__ __forceinline__ void largest_of_row(int32_t (&x)[2]) {
    over_row(x, [](int32_t a, int32_t b) { return a > b ? a : b; });
  }
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

  // A thread's share of a tile of values: 4 keys of 8 channels a unit.
  __device__ __forceinline__ void load_values(int tile, uint2 (&raw)[kValueUnits][4]) const {
#pragma unroll
    for (int u = 0; u < kValueUnits; ++u) {
      const int unit = threadIdx.x + u * kThreads, channel = unit / (kKeys / 4) * 8;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int key = tile * kKeys + unit % (kKeys / 4) * 4 + i;
        raw[u][i] = {0, 0};
        if (key < with.sequence && channel < with.padded_dim) {
          raw[u][i] = *reinterpret_cast<const uint2*>(values + key * with.v.position + channel);
        }
      }
    }
  }

  // Row of the transposed values that holds a channel: fragment j, column 2 t + c for channel (dim / 4) t + 2 j + c.
  __device__ __forceinline__ int value_row(int channel) const {
    const int of_lane = with.padded_dim / 4, rest = channel % of_lane;
    return rest / 2 * 8 + channel / of_lane * 2 + rest % 2;
  }

  __device__ __forceinline__ void store_values(const uint2 (&raw)[kValueUnits][4]) const {
    unsigned char* target = shared + 2 * kKeyBytes;
#pragma unroll
    for (int u = 0; u < kValueUnits; ++u) {
      const int unit = threadIdx.x + u * kThreads, quad = unit % (kKeys / 4), channel = unit / (kKeys / 4) * 8;
      if (channel >= with.padded_dim) continue;
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const uint32_t pair = c % 4 | (c % 4 + 4) << 4;
        const auto word = [&](int i) { return c < 4 ? raw[u][i].x : raw[u][i].y; };
        const uint32_t column =
            permute_bytes(permute_bytes(word(0), word(1), pair), permute_bytes(word(2), word(3), pair), 0x5410);
        *reinterpret_cast<uint32_t*>(target + swizzled<kKeys>(value_row(channel + c), quad / 4) + quad % 4 * 4) =
            column;
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

  __device__ __forceinline__ void store(const int32_t (&o)[kValueFragments][4], const int32_t (&total)[2]) const {
    const int of_lane = with.padded_dim / 4, channel = lane_index() % 4 * of_lane;
    const float* multiplier = with.multiplier + head * with.dim;
    const int32_t* zero_point = with.zero_point + head * with.dim;
    const CodeRange range = code_range(with.bits);
    const float inverse[2] = {1.0f / int_to_float(total[0]), 1.0f / int_to_float(total[1])};
    int8_t* line[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const int64_t row = first_query + static_cast<int>(lane_index()) / 4 + 8 * r;
      line[r] = with.out + (image * int64_t{with.sequence} + row) * with.heads * with.dim + head * with.dim;
    }
    const bool rows[2] = {first_query + lane_index() / 4 < static_cast<unsigned>(with.sequence),
                          first_query + lane_index() / 4 + 8 < static_cast<unsigned>(with.sequence)};
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
      if (!rows[r]) continue;
#pragma unroll
      for (int jj = 0; jj < kValueFragments / 2; ++jj) {
        const int at = channel + 4 * jj;
        if (4 * jj >= of_lane) continue;
        if (wide) {
          if (jj % 4 == 0 && kValueFragments >= 8) {
            *reinterpret_cast<uint4*>(line[r] + at) = {packed[r][jj], packed[r][jj + 1], packed[r][jj + 2],
                                                       packed[r][jj + 3]};
          }
        } else if (with.dim % 4 == 0) {
          if (at < with.dim) *reinterpret_cast<uint32_t*>(line[r] + at) = packed[r][jj];
        } else {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            if (at + i < with.dim) line[r][at + i] = static_cast<int8_t>(packed[r][jj] >> 8 * i);
          }
        }
      }
    }
  }

  __device__ __forceinline__ void plain_coding(Coding (&coding)[2]) const {
    const float last = static_cast<float>(with.level_count - 1);
    coding[0] = coding[1] = {with.kappa[head], 0.0f, last, false};
  }

  // Codes of the normalised probability from here on; what divides the output is the largest level then.
  __device__ __forceinline__ void normalise(Coding (&coding)[2], int32_t (&total)[2]) const {
    const int32_t largest = static_cast<int32_t>(levels.words[0] & 255);
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      coding[r].offset = attention_offset(total[r], largest, with.inv_tau[head]);
      coding[r].normalised = true;
      total[r] = largest;
    }
  }

  // The second product with a tile. `levels_of_tile` gives its levels, and in doing so brings all warps past the values
  // of the tile before.
  template <class LevelsOfTile>
  __device__ __forceinline__ void weigh(int tile, int32_t (&o)[kValueFragments][4],
                                        const LevelsOfTile& levels_of_tile) {
    uint2 raw[kValueUnits][4];
    load_values(tile, raw);
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
    load_keys(0, stage);
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
    if (active) store(o, total);
  }
};

template <int kSteps, int kTiles>
__global__ void __launch_bounds__(kThreads) attention_kernel(const Arguments with) {
  follow_predecessor();
  Attention<kSteps, kTiles>(with).run();
}

template <int kSteps, int kTiles>
void launch(const Arguments& with, int batch, cudaStream_t stream) {
  constexpr int kSharedBytes = Attention<kSteps, kTiles>::kSharedBytes;
  const int64_t blocks = int64_t{batch} * with.heads * ((with.sequence + kQueries - 1) / kQueries);
  require(blocks < int64_t{1} << 31, "attention: too many heads and images");
  const auto kernel = &attention_kernel<kSteps, kTiles>;
  VITQ_LAUNCH(kernel, static_cast<unsigned>(blocks), kThreads, kSharedBytes, stream, with);
  check_launch("attention");
}

template <int kSteps>
void launch_dim(const Arguments& with, int batch, cudaStream_t stream) {
  if (with.sequence <= 64) return launch<kSteps, 1>(with, batch, stream);
  if (with.sequence <= 128) return launch<kSteps, 2>(with, batch, stream);
  if (with.sequence <= 256) return launch<kSteps, 4>(with, batch, stream);
  return launch<kSteps, 0>(with, batch, stream);
}

}  // namespace

void attention(AttentionOperand q, AttentionOperand k, AttentionOperand v, const float* kappa, const uint8_t* levels,
               int level_count, const float* multiplier, const int32_t* zero_point, AttentionBias bias_q,
               const float* inv_tau, int8_t* out, int batch, int heads, int sequence, int dim, int padded_dim, int bits,
               cudaStream_t stream) {
  require(0 < dim && dim <= padded_dim && padded_dim <= 128 && padded_dim % 16 == 0,
          "attention: dim must be in 1..padded_dim, which is a multiple of 16 up to 128, got " + std::to_string(dim) +
              " and " + std::to_string(padded_dim));
  require(sequence <= kMostKeys, "attention: sequence must be at most 4096, got " + std::to_string(sequence));
  require(0 < level_count && level_count <= kTableBytes,
          "attention: level_count must be in 1..256, got " + std::to_string(level_count));
  for (const AttentionOperand& operand : {q, k, v}) {
    require((reinterpret_cast<uintptr_t>(operand.data) | operand.batch | operand.head | operand.position) % 16 == 0,
            "attention: q, k and v must be aligned to 16 bytes");
  }
  if (batch == 0 || heads == 0 || sequence == 0) return;
  const Arguments with{q,      k,       v,   kappa, levels,   level_count, multiplier, zero_point,
                       bias_q, inv_tau, out, heads, sequence, dim,         padded_dim, bits};
  switch ((padded_dim + 31) / 32) {
    case 1:
      return launch_dim<1>(with, batch, stream);
    case 2:
      return launch_dim<2>(with, batch, stream);
    case 3:
      return launch_dim<3>(with, batch, stream);
    case 4:
      return launch_dim<4>(with, batch, stream);
  }
}

}  // namespace vitq
