// The tiles of the linear kernels on wgmma (gemm_sm90.cuh) and what they keep in shared memory.
#pragma once

#include "gemm_tiles.cuh"
#include "ptx_sm90.cuh"

namespace vitq {

// Tiles as data, numbered on from VITQ_GEMM_TILES: index, tokens, stages, and the blocks, one below the other, that
// share tokens. These are a cluster; where K is cut into parts, those of all parts are.
#define VITQ_WGMMA_TILES(X) \
  X(6, 256, 4, 2)           \
  X(7, 192, 4, 2)           \
  X(8, 128, 4, 2)           \
  X(9, 64, 4, 1)

constexpr int kWarpgroup = 128;   // threads
constexpr int kStepsOfStage = 2;  // of 64 columns: the 128 bytes that the swizzle spans
constexpr int kTokenLine = kStepsOfStage * kStepColumns;

template <int kTokens_, int kStages_, int kCluster_>
struct WgmmaTile {
  static constexpr int kWorkers = 2;  // warpgroups that multiply, 64 rows each
  static constexpr int kTokens = kTokens_, kStages = kStages_, kCluster = kCluster_;
  static constexpr int kRows = kGroupRows * kWorkers;
  // Of K, a power of two: the largest cluster then has 8 blocks, which every GPU with clusters holds.
  static constexpr int kMostParts = 4;
  // One thread of the last warpgroup loads. A sub-partition of the SM has a quarter of the registers and a warp of each
  // warpgroup, so a kernel starts with 65536 / threads each; the loading warpgroup gives most of its own to the workers
  // (setmaxnreg: 2 * 224 + 56 = 504 of 3 * 168).
  static constexpr int kThreads = kWarpgroup * (kWorkers + 1);
  static constexpr int kLoaderRegisters = 56, kWorkerRegisters = 224;
  static constexpr int kWorkerThreads = kWarpgroup * kWorkers;
  static constexpr int kTokenBytes = kTokens * kTokenLine;  // of a stage
  static constexpr bool kWholeRows = false;
};

// The same where a cluster holds all rows of the layer for its tokens, one tile, and then ends.
template <class T>
struct AllRows : T {
  static constexpr bool kWholeRows = true;
};

// What a pass of a worker stages (Staging of gemm_tiles.cuh): all tokens (codes), or 64 (words). A thread ends with two
// rows of tokens 8 i + 2 t and + 1 (t: lane % 4). Codes: of 32 tokens its eight lie in two adjacent words.
template <class T, int kElement>
struct WgmmaStaging {
  static constexpr int kRows = kGroupRows, kOfPack = staged_tokens(kElement);
  static constexpr int kTokens = kElement == 1 ? T::kTokens : 64;  // of a pass
  static constexpr int kPacks = kTokens / kOfPack;
  static constexpr int kPacksOfPanel = kPanelBytes / (kOfPack * kElement);
  static constexpr int kPanel = kPanelBytes * kRows;
  static constexpr int kBytes = kPacks / kPacksOfPanel * kPanel;
  static constexpr int kJump = kElement == 1 ? 6 : 0;
  static __host__ __device__ constexpr int token_of(int pack) {
    return kElement == 1 ? pack / 8 * 32 + pack % 2 * 16 + pack % 8 / 2 * 2 : kOfPack * pack;
  }
};

// Shared memory: the barriers, the stages (the tokens' box, then each worker's chunks), each worker's staged outputs.
constexpr int kBarrierBytes = 1024;  // swizzled boxes lie at multiples of it
template <class T>
__host__ __device__ constexpr int wgmma_stage_bytes(int widest) {
  return T::kTokenBytes + T::kWorkers * kStepsOfStage * kQuarters * widest * kChunkBytes;
}
template <class T>
__host__ __device__ constexpr int wgmma_staged_bytes() {  // of a worker
  return WgmmaStaging<T, 1>::kBytes > WgmmaStaging<T, 4>::kBytes ? WgmmaStaging<T, 1>::kBytes
                                                                 : WgmmaStaging<T, 4>::kBytes;
}
template <class T>
__host__ __device__ constexpr int wgmma_shared_bytes(int widest) {
  return kBarrierBytes + T::kStages * wgmma_stage_bytes<T>(widest) + T::kWorkers * wgmma_staged_bytes<T>();
}

}  // namespace vitq
