// The tiles of the linear kernels, their arguments and what they keep in shared memory.
#pragma once

#include "epilogue.cuh"
#include "launchers.h"
#include "weights.cuh"

namespace vitq {

// Tiles as data: index, warps along the rows, warps along the tokens, fragments of 16 tokens a warp, stages, blocks an
// SM that the register budget leaves room for. gemm_tiles() shows them to Python, whose model chooses.
#define VITQ_GEMM_TILES(X) \
  X(0, 4, 2, 4, 3, 1)      \
  X(1, 2, 2, 4, 3, 2)      \
  X(2, 4, 1, 4, 3, 2)      \
  X(3, 2, 2, 2, 4, 3)      \
  X(4, 4, 1, 2, 4, 3)      \
  X(5, 1, 2, 2, 4, 6)

template <int kRowWarps_, int kTokenWarps_, int kTokenFragments_, int kStages_, int kBlocks_>
struct Tile {
  static constexpr int kRowWarps = kRowWarps_, kTokenWarps = kTokenWarps_, kTokenFragments = kTokenFragments_;
  static constexpr int kStages = kStages_, kBlocks = kBlocks_;
  static constexpr int kThreads = 32 * kRowWarps * kTokenWarps;
  static constexpr int kRows = kGroupRows * kRowWarps;
  static constexpr int kWarpTokens = 16 * kTokenFragments;
  static constexpr int kTokens = kWarpTokens * kTokenWarps;
  static constexpr int kTokenBytes = kTokens * kStepColumns;  // of a stage
};

constexpr int kVectors = 4;  // of epilogue.cuh, a word a row, in shared memory

struct GemmArguments {
  const int8_t* a;
  int64_t a_stride;
  LinearWeight weight;
  int tokens, rows, columns;
  void* out;  // kPartial: int32 [parts, tokens, rows]
  EpilogueArguments epilogue;
};

// Element bytes in the staging of reordered outputs: codes, or words (float32, int32).
__host__ __device__ constexpr int staged_element(Epilogue kind) {
  return kind == Epilogue::kCodes || kind == Epilogue::kGelu ? 1 : 4;
}

// Outputs that are reordered pass through shared memory row by row, 32 tokens of a row at a time. An odd number of
// words a row where elements are bytes, four words more where they are words: what reads it back has no bank conflict.
constexpr int kStagedTokens = 32;
__host__ __device__ constexpr int staged_stride(int element) {
  return kStagedTokens * element + (element == 1 ? 4 : 16);
}

// Bytes of a stage and of the whole shared memory of a block: vectors, then stages or, after them, staged outputs.
template <class T>
__host__ __device__ constexpr int stage_bytes(int widest) {
  return T::kTokenBytes + T::kRowWarps * widest * kChunkBytes;
}
template <class T>
__host__ __device__ constexpr int shared_bytes(int widest, bool is_staged, int element) {
  const int stages = T::kStages * stage_bytes<T>(widest), staged = is_staged ? T::kRows * staged_stride(element) : 0;
  return (kVectors + 1) * 4 * T::kRows + (stages > staged ? stages : staged);
}

// Fragment row `place` (0 .. kTokens - 1, as shared memory and the mma have them) holds this token of the tile: a
// lane's rows g, g + 8, g + 16, ... of its warp are consecutive tokens.
template <class T>
__device__ __forceinline__ int token_at(int place) {
  constexpr int kOfLane = 2 * T::kTokenFragments;
  const int in_warp = place % T::kWarpTokens;
  return place - in_warp + in_warp % 8 * kOfLane + in_warp / 8;
}

// Whether the outputs pass through shared memory: rows in another order than the model's, or an odd number of them.
__host__ __device__ inline bool is_staged(const GemmArguments& with) {
  return with.weight.order != nullptr || with.rows % (2 * kRun) != 0;
}

template <int kTokenFragments>
using Accumulators = int32_t[kTokenFragments][kFragmentsOfGroup][4];

}  // namespace vitq
