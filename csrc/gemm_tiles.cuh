// The tiles of the linear kernels, their arguments and what they keep in shared memory.
#pragma once

#include "epilogue.cuh"
#include "launchers.h"
#include "weights.cuh"

namespace vitq {

// The tiles of gemm_sm80.cuh as data: index, warps along the rows, warps along the tokens, fragments of 16 tokens a
// warp, stages, blocks an SM that the register budget leaves room for. gemm_tiles() shows them to Python, whose model
// chooses.
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

// Outputs that are reordered pass through shared memory in panels: 32 bytes of each row of the tile, four rows a line
// of 128. Where row r of the tile lies in a panel: its quarter of the line is r ^ r / 8 (mod 4), so that neither four
// lanes that write to rows of four quarters (place_rows of ops/mma_fragments.py sees to it) nor four that read the runs
// of 8 rows at r, r + 8, r + 16 and r + 24 meet in a bank.
constexpr int kPanelBytes = 32;
__host__ __device__ constexpr int staged_offset(unsigned row) {
  return static_cast<int>((row / 4 * 4 + ((row ^ row / 8) & 3)) * kPanelBytes);
}

// Tokens of a row that are read back together: four codes a word, or two words.
__host__ __device__ constexpr int staged_tokens(int element) { return element == 1 ? 4 : 2; }

// What a pass of gemm_sm80.cuh stages: of each lane all its tokens (codes) or four (words), of all warps at once.
// `token_of` says which token of the pass begins a pack of staged_tokens: of a pack of codes two, and kJump further
// two.
template <class T, int kElement>
struct Staging {
  static constexpr int kRows = T::kRows, kOfPack = staged_tokens(kElement);
  static constexpr int kOfLane = 2 * T::kTokenFragments;
  static constexpr int kAtOnce = kElement == 1 ? kOfLane : 4;
  static constexpr int kLaneBytes = kAtOnce * kElement;  // of a row
  static constexpr int kPacks = 8 * T::kTokenWarps * kAtOnce / kOfPack;
  static constexpr int kPacksOfPanel = kPanelBytes / (kOfPack * kElement);
  static constexpr int kPanel = kPanelBytes * T::kRows;
  static constexpr int kBytes = kPacks / kPacksOfPanel * kPanel;
  static constexpr int kJump = 0;
  static __host__ __device__ constexpr int token_of(int pack) {
    return kOfPack * pack / kAtOnce * kOfLane + kOfPack * pack % kAtOnce;
  }
};

// Bytes of a stage and of the whole shared memory of a block: vectors, then stages or, after them, staged outputs.
template <class T>
__host__ __device__ constexpr int stage_bytes(int widest) {
  return T::kTokenBytes + T::kRowWarps * kQuarters * widest * kChunkBytes;
}
template <class T>
__host__ __device__ constexpr int shared_bytes(int widest, bool is_staged, int element) {
  const int staged = !is_staged ? 0 : element == 1 ? Staging<T, 1>::kBytes : Staging<T, 4>::kBytes;
  const int stages = T::kStages * stage_bytes<T>(widest);
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
