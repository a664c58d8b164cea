// Parts of K on Hopper: the blocks of a cluster multiply a part each, and finish a share of the tile's tokens each.
//
// Way out     Every block stages the sums of its part, all of the tile, where its stages lay. After a barrier of the
//             cluster a thread adds a run of 8 rows of two tokens over the blocks, its own first, and finishes them. A
//             second barrier keeps every block there until the others have read. One launch, no memory in between.
// Layout      Panels of 32 bytes of each row, as words are staged (gemm_tiles.cuh): 8 tokens; a warp asks a block for 8
//             whole segments of 32 bytes at a time.
// Exactness   Sums of int32 are exact in any order.
// Source      PTX ISA 9.7.13.3 (barrier.cluster), 9.7.9.8 (ld of another block's shared memory), 9.7.9.23 (mapa).
#pragma once

#include "gemm_sm90_tiles.cuh"
#include "gemm_store.cuh"

namespace vitq {

template <class T>
struct StagedSums {
  static constexpr int kPanelTokens = kPanelBytes / 4;
  static constexpr int kPanel = kPanelBytes * T::kRows;
  static constexpr int kWarps = T::kWorkerThreads / 32;
  static constexpr int kBlocks = T::kRows / 32;  // of rows, one of a warp
  static constexpr int kAtOnce = 16;             // tokens of a warp
  static_assert(T::kTokens / kPanelTokens * kPanel <= wgmma_shared_bytes<T>(2) - kBarrierBytes,
                "the sums fit where stages and staged outputs lie, whatever the widths are");
  static_assert(T::kTokens / T::kMostParts % kAtOnce == 0 && kWarps % kBlocks == 0, "a share is whole for each warp");

  static __device__ __forceinline__ unsigned char* begin() { return shared_memory() + kBarrierBytes; }
};

// The first of a worker thread's two stored rows in its group, the second is 2 further: row lane / 4 of the warp's
// fragment of 16 is of the quarter's first fragment, row + 8 of the second one.
__device__ __forceinline__ int row_of_worker() {
  const unsigned lane = lane_index();
  return static_cast<int>(lane / 8 * 16 + static_cast<unsigned>(warp_index()) % 4 * 4 + lane / 4 % 2);
}

// A worker's sums of the tile whose first row is given, to shared memory, in the model's order and without the
// alignment of their weights.
template <class T>
__device__ __forceinline__ void stage_sums(const GemmArguments& with, int32_t (&acc)[T::kTokens / 2], int first_row,
                                           int shift) {
  using S = StagedSums<T>;
  const int stored = first_row + warp_index() / 4 * kGroupRows + row_of_worker();
  const int row[2] = {model_row(with, stored) - first_row, model_row(with, stored + 2) - first_row};
  if (shift != 0) {
#pragma unroll
    for (int i = 0; i < T::kTokens / 2; ++i) acc[i] >>= shift;
  }
  VITQ_NAMED_BARRIER(1, T::kWorkerThreads);  // all products of the block are complete: its stages may be overwritten
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    unsigned char* target = S::begin() + staged_offset(row[h]) + lane_index() % 4 * 8;
#pragma unroll
    for (int i = 0; i < T::kTokens / S::kPanelTokens; ++i) {
      *reinterpret_cast<uint2*>(target + i * S::kPanel) = {static_cast<uint32_t>(acc[4 * i + 2 * h]),
                                                           static_cast<uint32_t>(acc[4 * i + 2 * h + 1])};
    }
  }
}

// All workers of the cluster have staged what others read: their sums, or the moments of their rows.
__device__ __forceinline__ void cluster_has_staged() { VITQ_CLUSTER_BARRIER(); }

// Where a thread's run begins in the tile's rows.
template <class T>
__device__ __forceinline__ int first_of_run() {
  const unsigned block = static_cast<unsigned>(warp_index()) % StagedSums<T>::kBlocks;
  return static_cast<int>(32 * block + lane_index() / 4 % 4 * kRun);
}

// This block's share of the tile, after the barrier behind which all blocks of the cluster have staged theirs.
// row: the first of the thread's run, whose vectors are given. first_block: of those with the same rows, T::kCluster
// blocks apart in the order of their parts.
template <Epilogue kKind, class T>
__device__ __forceinline__ void finish_share(const GemmArguments& with, const RunVectors& vectors, int row,
                                             int first_token, int part, int part_bits, unsigned first_block) {
  using S = StagedSums<T>;
  const unsigned lane = lane_index(), warp = static_cast<unsigned>(warp_index());
  const unsigned run = lane / 4 % 4;
  const int share = T::kTokens >> part_bits;
  const bool vector = with.rows % kRun == 0;
  for (int token = share * part + S::kAtOnce * static_cast<int>(warp / S::kBlocks); token < share * (part + 1);
       token += S::kAtOnce * S::kWarps / S::kBlocks) {
    const int its = token + static_cast<int>(lane / 16 * 8 + lane % 4 * 2);
    const unsigned char* source =
        S::begin() + its / S::kPanelTokens * S::kPanel + its % S::kPanelTokens * 4 + first_of_run<T>() * kPanelBytes;
    int32_t sums[2][kRun] = {};
#pragma unroll 1
    for (int i = 0; i < 1 << part_bits; ++i) {
      const unsigned other = static_cast<unsigned>((part + i) & ((1 << part_bits) - 1));
      const ClusterPointer there = place_in_block(source, first_block + other * T::kCluster);
#pragma unroll
      for (int r = 0; r < kRun; ++r) {
        const uint2 two = load_there(there, static_cast<int>(r / 4 * 4 + ((r ^ run) & 3)) * kPanelBytes);
        sums[0][r] += static_cast<int32_t>(two.x), sums[1][r] += static_cast<int32_t>(two.y);
      }
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int its_token = first_token + its + i;
      if (its_token >= with.tokens || row >= with.rows) continue;
      uint32_t word[kRun];
      rescale<kKind>(with.epilogue, vectors, [&](int) { return with.epilogue.token_scale[its_token]; }, sums[i], word);
      store_words<kKind>(with, with.out, word, Place<kKind>(with, its_token, row), with.rows - row, vector);
    }
  }
}

}  // namespace vitq
