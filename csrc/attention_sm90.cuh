// What a block of attention_sm90.cu keeps in shared memory, and which tiles of which heads it works on.
#pragma once

#include <algorithm>

#include "launchers.h"
#include "ptx_sm90.cuh"

namespace vitq::hopper_attention {

// Two workers: one's codes need the ALUs about as long as the other's products, loads and stores take. A third one
// would leave each 152 registers, and ptxas takes no product of 208 columns then (C7602).
constexpr int kWarpgroup = 128, kWorkers = 2, kWorkerThreads = kWarpgroup * kWorkers;
constexpr int kThreads = kWorkerThreads + kWarpgroup;
constexpr int kWorkerRegisters = 216, kLoaderRegisters = 72;  // of 168 at the start: 2 * 216 + 72 = 3 * 168

constexpr int kQueries = 64;     // of a tile
constexpr int kValueKeys = 128;  // of a slab of transposed values: the bytes that the swizzle spans
constexpr int kValueStep = 32;   // keys of a product
constexpr int kBarrierBytes = 1024;
constexpr int kTableBytes = 1024;  // 256 levels; stages lie at multiples of 1024
constexpr int kSharedBytes = 227 << 10;
constexpr int kMostStages = 2;

// kKeys: of a product. kWhole: all of a row's; then a row's scores stay in registers. kLeast: keys that there are in
// any case.
template <int kDim_, int kKeys_, bool kWhole_, int kLeast_ = 1>
struct Shape {
  static constexpr int kDim = kDim_, kKeys = kKeys_, kLeast = kLeast_;
  static constexpr bool kWhole = kWhole_;
  static constexpr int kSteps = (kDim + 31) / 32, kWidth = 32 * kSteps;  // of the first product
  static constexpr int kLine = kWidth % 128 == 0 ? 128 : kWidth % 64 == 0 ? 64 : 32;
  static constexpr int kSlabBytes = kKeys * kLine, kTileBytes = kKeys * kWidth;
  static constexpr int kValueSteps = (kKeys + kValueStep - 1) / kValueStep;  // of the second product, of a tile
  static constexpr int kValueSlabs = (kKeys + kValueKeys - 1) / kValueKeys;
  static constexpr int kValueSlabBytes = kDim * kValueKeys, kValueBytes = kValueSlabs * kValueSlabBytes;

  static __host__ __device__ constexpr int tiles(int sequence) { return kWhole ? 1 : (sequence + kKeys - 1) / kKeys; }
  // Of all tiles; the values behind them lie at a multiple of 1024, as their swizzle wants.
  static __host__ __device__ constexpr int key_bytes(int sequence) {
    return (tiles(sequence) * kTileBytes + 1023) / 1024 * 1024;
  }
  static __host__ __device__ constexpr int stage_bytes(int sequence) {
    return kTableBytes + key_bytes(sequence) + tiles(sequence) * kValueBytes;
  }
  static int stages(int sequence) {
    return std::min(kMostStages, (kSharedBytes - kBarrierBytes) / stage_bytes(sequence));
  }
};

// What the kernel works on; a head is cut into items_of_head items.
struct Arguments {
  AttentionOperand q, v;
  const float* kappa;
  const uint8_t* levels;
  int level_count;
  const float* multiplier;
  const int32_t* zero_point;
  int8_t* out;
  int heads, sequence, bits;
  int items, items_of_head, stages;
};

// The tiles of queries of an item.
struct Item {
  int head, image, first, end;

  __device__ Item(const Arguments& with, int item) {
    const int tiles = (with.sequence + kQueries - 1) / kQueries, share = item % with.items_of_head;
    head = item / with.items_of_head % with.heads, image = item / with.items_of_head / with.heads;
    first = tiles * share / with.items_of_head, end = tiles * (share + 1) / with.items_of_head;
  }
};

// A place in the ring of stages.
template <class S>
struct Ring {
  const Arguments& with;
  int stage = 0;
  unsigned parity = 0;

  __device__ void advance() {
    if (++stage == with.stages) stage = 0, parity ^= 1;
  }
  __device__ uint64_t* keys_full() const { return reinterpret_cast<uint64_t*>(shared_memory()) + stage; }
  __device__ uint64_t* values_full() const { return keys_full() + kMostStages; }
  __device__ uint64_t* empty() const { return keys_full() + 2 * kMostStages; }
  __device__ unsigned char* table() const {
    return shared_memory() + kBarrierBytes + stage * S::stage_bytes(with.sequence);
  }
  __device__ unsigned char* keys(int tile) const { return table() + kTableBytes + tile * S::kTileBytes; }
  __device__ unsigned char* values(int tile) const {
    return keys(0) + S::key_bytes(with.sequence) + tile * S::kValueBytes;
  }
};

// Which tile of which item.
struct Turn {
  int item, tile;

  // So many tiles further; the items of this block follow one another.
  __device__ void skip(const Arguments& with, int tiles) {
    tile += tiles;
    while (item < with.items) {
      const Item here(with, item);
      if (tile < here.end) return;
      tile -= here.end;
      item += gridDim.x;
      if (item < with.items) tile += Item(with, item).first;
    }
  }
};

}  // namespace vitq::hopper_attention
