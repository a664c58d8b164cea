// Linear layers on packed weights for Hopper (sm_90a): wgmma with the weights in registers, TMA, persistent blocks.
//
// Computes    acc[t, n] = sum_k a[t, k] * w[n, k], then an epilogue of epilogue.cuh. Arguments, layouts and exactness
//             are those of gemm_sm80.cuh; the weights' layout is the same.
// Roles       The operands are swapped: a group of 64 weight rows is the M operand, unpacked from shared memory into
//             registers, tokens are the N operand. A worker warpgroup computes one group times all tokens of the tile.
//             One thread of the last warpgroup loads; it runs ahead, into the next tile while the workers store. A
//             warp's 16 rows are a quarter of the group, of its own width: where there are several, each warp asks at
//             each step.
// Pipeline    kStages stages of 128 columns, each with a barrier "full" (the bytes are there) and "empty" (all warps
//             have left). Tokens come as a box of a tensor map, swizzled, with zeros beyond the matrix; a group's step
//             is one bulk copy.
// Way out     Through shared memory (gemm_store.cuh): a thread has two rows of many tokens. Where K is cut into parts,
//             through that of all blocks of a cluster (gemm_sm90_parts.cuh).
// Source      PTX ISA 9.7.15 (wgmma), 9.7.13.15 (mbarrier), 9.7.9.25 (bulk copies); ../shared/docs/kernels.md 3.1 to
//             3.3.
#pragma once

#include <algorithm>

#include "gemm_sm90_norm.cuh"
#include "gemm_sm90_parts.cuh"
#include "launch.cuh"
#include "tensor_map.cuh"

namespace vitq {

// Which tiles come in which turn of a cluster; rows first, so that clusters beside each other share tokens in L2. A
// cluster is the blocks that share tokens times the parts of K; with several parts it has one turn. Where it holds all
// rows there is one tile of rows, and a cluster a tile of tokens (grid.y).
struct TileOrder {
  int row_tiles, token_tiles;
  int part_bits;  // parts are a power of two, so that nothing divides by them

  template <class T>
  static __host__ __device__ TileOrder of(const GemmArguments& with, int parts) {
    constexpr int kRows = T::kRows * T::kCluster;
    return {(with.rows + kRows - 1) / kRows, (with.tokens + T::kTokens - 1) / T::kTokens,
            parts / 2};  // of 1, 2 and 4 the logarithm
  }
  __host__ __device__ int count() const { return row_tiles * token_tiles; }
  __device__ bool in_parts() const { return part_bits > 0; }
};

// Whether a block has others beside it in its cluster.
template <class T>
__device__ __forceinline__ bool in_cluster(const TileOrder& order) {
  return T::kCluster > 1 || T::kWholeRows || order.in_parts();
}

// What a block does in the cluster.
template <class T>
struct Member {
  int rank, part;

  __device__ __forceinline__ explicit Member(const TileOrder& order) : rank(0), part(0) {
    if (in_cluster<T>(order)) rank = static_cast<int>(cluster_rank());
    if (!T::kWholeRows) part = rank / T::kCluster;
  }
  // Among those that share.
  __device__ int place() const { return rank % T::kCluster; }
  __device__ unsigned first_sharer() const { return static_cast<unsigned>(rank / T::kCluster * T::kCluster); }
  __device__ unsigned sharers() const { return ((1u << T::kCluster) - 1) << first_sharer(); }
};

template <class T>
struct TilePlace {
  int row, token;        // where the block's tile begins, in tiles
  int slice, end_slice;  // of K, a stage each

  __device__ TilePlace(const TileOrder& order, const Member<T>& member, int tile, int steps) {
    const int slices = (steps + kStepsOfStage - 1) / kStepsOfStage;
    row = T::kWholeRows ? member.rank : tile % order.row_tiles * T::kCluster + member.place();
    token = tile / order.row_tiles;
    slice = slices * member.part >> order.part_bits;
    end_slice = slices * (member.part + 1) >> order.part_bits;
  }
};

// A place in the ring of stages. Addresses are computed from the block's first byte each time: they would take
// registers.
template <class T>
struct Ring {
  int widest;
  int stage = 0;
  unsigned parity = 0;

  __device__ void advance() {
    if (++stage == T::kStages) stage = 0, parity ^= 1;
  }
  __device__ uint64_t* full() const { return reinterpret_cast<uint64_t*>(shared_memory()) + stage; }
  __device__ uint64_t* empty() const { return full() + T::kStages; }
  __device__ unsigned char* tokens() const {
    return shared_memory() + kBarrierBytes + stage * wgmma_stage_bytes<T>(widest);
  }
  __device__ unsigned char* chunks(int worker) const {
    return tokens() + T::kTokenBytes + worker * kStepsOfStage * kQuarters * widest * kChunkBytes;
  }
};

// The turns of this block's cluster.
template <class T>
__device__ __forceinline__ int first_turn(const TileOrder& order) {
  return T::kWholeRows ? static_cast<int>(blockIdx.y) : static_cast<int>(blockIdx.x) / T::kCluster >> order.part_bits;
}
template <class T>
__device__ __forceinline__ int turns(const TileOrder& order) {
  return T::kWholeRows ? static_cast<int>(gridDim.y) : static_cast<int>(gridDim.x) / T::kCluster >> order.part_bits;
}

// The groups that a block's workers multiply, as the loading thread sees them: chunks of a step, and the first one.
template <class T>
struct Groups {
  int step_chunks[T::kWorkers], first_chunk[T::kWorkers];

  __device__ __forceinline__ Groups(const LinearWeight& weight, int row_tile) {
#pragma unroll
    for (int worker = 0; worker < T::kWorkers; ++worker) {
      const int group = row_tile * T::kWorkers + worker;
      const bool present = group < weight.group_count;
      step_chunks[worker] = present ? Widths{static_cast<uint32_t>(weight.groups[2 * group])}.chunks() : 0;
      first_chunk[worker] = present ? weight.groups[2 * group + 1] : 0;
    }
  }

  // Announces all bytes of a stage and asks for the weights'.
  __device__ __forceinline__ void load(const LinearWeight& weight, const Ring<T>& ring, int slice) const {
    // Of an odd last step's second half the tokens are zeros, the weights what lay there.
    const int step = slice * kStepsOfStage, steps = weight.steps - step < kStepsOfStage ? 1 : kStepsOfStage;
    int chunks = 0;
#pragma unroll
    for (int worker = 0; worker < T::kWorkers; ++worker) chunks += step_chunks[worker];
    mbarrier_expect(ring.full(), static_cast<unsigned>(T::kTokenBytes + steps * chunks * kChunkBytes));
#pragma unroll
    for (int worker = 0; worker < T::kWorkers; ++worker) {
      if (step_chunks[worker] == 0) continue;
      const int64_t first = first_chunk[worker] + int64_t{step} * step_chunks[worker];
      copy_bulk(ring.chunks(worker), weight.chunks + first * kChunkBytes,
                static_cast<unsigned>(steps * step_chunks[worker] * kChunkBytes), ring.full());
    }
  }
};

// The loading thread: every stage of every tile of this block. Weights that are settled fill the first stages while the
// kernel in front ends; tokens are its outputs.
template <class T>
__device__ __forceinline__ void load_tiles(const GemmArguments& with, const TensorMap& map, const TileOrder& order) {
  const LinearWeight& weight = with.weight;
  const Member<T> member(order);
  Ring<T> ring{weight.widest};
  int begun = 0;  // slices of the first tile whose weights have been asked for
  if (weight.settled) {
    const TilePlace<T> place(order, member, first_turn<T>(order), weight.steps);
    const Groups<T> groups(weight, place.row);
#pragma unroll 1
    for (Ring<T> ahead = ring; begun < T::kStages && place.slice + begun < place.end_slice; ++begun, ahead.advance()) {
      groups.load(weight, ahead, place.slice + begun);
    }
  }
  follow_predecessor();
  for (int tile = first_turn<T>(order); tile < order.count(); tile += turns<T>(order)) {
    const TilePlace<T> place(order, member, tile, weight.steps);
    const Groups<T> groups(weight, place.row);
#pragma unroll 1
    for (int slice = place.slice; slice < place.end_slice; ++slice) {
      if (begun > 0) {
        --begun;
      } else {
        VITQ_WAIT(ring.empty(), ring.parity ^ 1);  // the first round finds the phase before the first complete
        groups.load(weight, ring, slice);
      }
      const int column = slice * kTokenLine, token = place.token * T::kTokens;
      if constexpr (T::kCluster > 1) {  // each block brings its share to all
        constexpr int kShare = T::kTokens / T::kCluster;
        const int its = member.place() * kShare;
        copy_box(ring.tokens() + its * kTokenLine, map, column, token + its, ring.full(), member.sharers());
      } else {
        copy_box(ring.tokens(), map, column, token, ring.full());
      }
      ring.advance();
    }
  }
}

// One step of a warp's quarter, unpacked for the two products of 32 columns. bits: where kBits is kMixed.
template <int kBits>
__device__ __forceinline__ void unpack_step(const unsigned char* chunks, int bits, uint32_t (&a)[2][4]) {
  QuarterRegisters<false> b;
  if constexpr (kBits == Widths::kMixed) {
    unpack_quarter<false>(bits, chunks, b);
  } else {
    unpack_quarter<kBits, false>(chunks, b);
  }
#pragma unroll
  for (int i = 0; i < 4; ++i) a[0][i] = b[i % 2 * 4 + i / 2], a[1][i] = b[i % 2 * 4 + i / 2 + 2];
}

// All slices of a worker whose group has kBits, or kMixed; 0: it has no group, and only leaves the stages. The second
// step of a slice is unpacked while the first one's products run; across slices the other worker keeps the tensor cores
// busy.
template <int kBits, class T>
__device__ __forceinline__ void multiply_group(int32_t (&acc)[T::kTokens / 2], Ring<T>& ring, int slices,
                                               unsigned first_sharer, Widths widths) {
  const unsigned warp = static_cast<unsigned>(warp_index());
  constexpr bool kMixed = kBits == Widths::kMixed;
  const int quarter = static_cast<int>(warp % 4), bits = widths.of(quarter);
  const int step_bytes = (kMixed ? widths.chunks() : kQuarters * kBits) * kChunkBytes;
  const int at = (kMixed ? widths.chunks_before(quarter) : quarter * kBits) * kChunkBytes;
  for (; slices > 0; --slices) {
    VITQ_WAIT(ring.full(), ring.parity);
    if constexpr (kBits != 0) {
      const unsigned char* chunks = ring.chunks(warp / 4) + at;
      const MatrixDescriptor<128> tokens = matrix_descriptor(ring.tokens());
      uint32_t a[kStepsOfStage][2][4];
#pragma unroll
      for (int step = 0; step < kStepsOfStage; ++step) {
        unpack_step<kBits>(chunks + step * step_bytes, bits, a[step]);
        // Written before the fence: the accumulators' zeros, what the last wait gave back, the unpacked weights.
        if (step == 0) hold(acc);
        hold(a[step][0]), hold(a[step][1]);
        wgmma_fence();
        wgmma_s8(acc, a[step][0], columns_further(tokens, step * kStepColumns));
        wgmma_s8(acc, a[step][1], columns_further(tokens, step * kStepColumns + 32));
        wgmma_commit();
      }
      wgmma_wait<0>();
      hold(acc);
    }
    sync_warp();
    if constexpr (T::kCluster > 1) {  // what the other blocks bring lands here too
      if (lane_index() < T::kCluster) mbarrier_arrive_at(ring.empty(), first_sharer + lane_index());
    } else {
      if (lane_index() == 0) mbarrier_arrive(ring.empty());
    }
    ring.advance();
  }
}

// A row of this thread: what its outputs need, and where they are staged.
struct WorkerRow {
  RunVectors vectors;  // the same for all of a run
  bool is_aligned;     // they take the weights' alignment, which is still in the sums (align_vectors)
  int offset;
};

template <Epilogue kKind>
__device__ __forceinline__ WorkerRow worker_row(const GemmArguments& with, int first_row, int at, int shift) {
  const int row = model_row(with, first_row + at);
  WorkerRow found;
  found.offset = staged_offset(row - first_row);
  float multiplier, zero, inv_scale;
  int32_t bias;
  load_vectors<kKind>(with.epilogue, row, with.rows, multiplier, bias, zero, inv_scale);
  found.is_aligned = align_vectors<kKind>(with.epilogue, with.columns, shift, multiplier, bias);
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    found.vectors.multiplier[i] = multiplier, found.vectors.bias[i] = bias;
    found.vectors.zero[i] = zero, found.vectors.inv_scale[i] = inv_scale;
  }
  return found;
}

// A tile's way out: each worker rescales its accumulators, stages them where the rows belong and stores them, so that
// one's way out lies under the other's products.
template <Epilogue kKind, class T>
__device__ __forceinline__ void store_tile(const GemmArguments& with, int32_t (&acc)[T::kTokens / 2],
                                           const TilePlace<T>& place, int shift) {
  constexpr int kElement = staged_element(kKind);
  using S = WgmmaStaging<T, kElement>;
  const unsigned lane = lane_index(), warp = static_cast<unsigned>(warp_index()), worker = warp / 4;
  const int first_row = place.row * T::kRows + static_cast<int>(worker) * kGroupRows;
  const int first_token = place.token * T::kTokens;
  unsigned char* staged = Ring<T>{with.weight.widest, T::kStages}.tokens() + worker * wgmma_staged_bytes<T>();
  const int at = row_of_worker();
  const WorkerRow rows[2] = {worker_row<kKind>(with, first_row, at, shift),
                             worker_row<kKind>(with, first_row, at + 2, shift)};
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (rows[h].is_aligned) continue;
#pragma unroll
    for (int i = 2 * h; i < T::kTokens / 2; i += 4) acc[i] >>= shift, acc[i + 1] >>= shift;
  }
  const bool whole = is_whole(with, first_row + kGroupRows, first_token + T::kTokens);
  unsigned char* of_lane = staged + lane % 4 * 8;
#pragma unroll
  for (int pass = 0; pass < T::kTokens; pass += S::kTokens) {
    VITQ_NAMED_BARRIER(1 + static_cast<int>(worker), kWarpgroup);  // what was staged before has been read
#pragma unroll
    for (int token = pass; token < pass + S::kTokens; token += 32) {
      const auto scale_of = [&](int i) {
        const int its_token = first_token + token + i / 2 * 8 + static_cast<int>(lane % 4 * 2) + i % 2;
        return its_token < with.tokens ? with.epilogue.token_scale[its_token] : 0.0f;
      };
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        int32_t sums[kRun];
        uint32_t word[kRun];
#pragma unroll
        for (int i = 0; i < kRun; ++i) sums[i] = acc[4 * (token / 8 + i / 2) + 2 * h + i % 2];
        rescale<kKind>(with.epilogue, rows[h].vectors, scale_of, sums, word);
        unsigned char* target = of_lane + rows[h].offset;
        if constexpr (kElement == 1) {
          *reinterpret_cast<uint2*>(target + (token - pass) / 32 * S::kPanel) = {
              pack_bytes(word[0], word[1], word[2], word[3]), pack_bytes(word[4], word[5], word[6], word[7])};
        } else {
#pragma unroll
          for (int i = 0; i < kRun; i += 2) {
            *reinterpret_cast<uint2*>(target + ((token - pass) / 8 + i / 2) * S::kPanel) = {word[i], word[i + 1]};
          }
        }
      }
    }
    VITQ_NAMED_BARRIER(1 + static_cast<int>(worker), kWarpgroup);  // the staged tokens are complete
    store_from_shared<kKind, S>(with, with.out, staged, first_row, first_token + pass, whole, warp % 4, 4);
  }
}

// The way out of a tile whose K is cut into parts.
template <Epilogue kKind, class T>
__device__ __forceinline__ void share_tile(const GemmArguments& with, int32_t (&acc)[T::kTokens / 2],
                                           const Member<T>& member, const TilePlace<T>& place, int part_bits,
                                           int shift) {
  const int first_row = place.row * T::kRows;
  stage_sums<T>(with, acc, first_row, shift);
  const int row = first_row + first_of_run<T>();
  RunVectors vectors;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {  // meanwhile
    load_vectors<kKind>(with.epilogue, row + i, with.rows, vectors.multiplier[i], vectors.bias[i], vectors.zero[i],
                        vectors.inv_scale[i]);
  }
  cluster_has_staged();
  finish_share<kKind, T>(with, vectors, row, place.token * T::kTokens, member.part, part_bits,
                         static_cast<unsigned>(member.place()));
}

// A worker warp: every tile of this block.
template <Epilogue kKind, class T>
__device__ __forceinline__ void multiply_tiles(const GemmArguments& with, const TileOrder& order) {
  follow_predecessor();
  const Member<T> member(order);
  Ring<T> ring{with.weight.widest};
  // The second worker begins when the last stage has been filled, which while the pipeline fills is that many slices
  // later: from then on one's way out and the other's products take turns.
  if (!T::kWholeRows && warp_index() >= 4 && !order.in_parts() &&
      TilePlace<T>(order, member, 0, with.weight.steps).end_slice >= T::kStages) {
    delay_until(ring.full() + T::kStages - 1, 0);
  }
  for (int tile = first_turn<T>(order); tile < order.count(); tile += turns<T>(order)) {
    TilePlace<T> place(order, member, tile, with.weight.steps);
    // Else the compiler computes both again behind the products, a division of 20 instructions, to spare two registers.
    hold(place.row);
    hold(place.token);
    const int group = place.row * T::kWorkers + warp_index() / 4, slices = place.end_slice - place.slice;
    const Widths widths{group < with.weight.group_count ? static_cast<uint32_t>(with.weight.groups[2 * group]) : 0};
    int32_t acc[T::kTokens / 2] = {};
#define VITQ_WIDTH(width)                                                       \
  case width:                                                                   \
    multiply_group<width, T>(acc, ring, slices, member.first_sharer(), widths); \
    break;
    switch (widths.only()) {
      VITQ_WIDTH(Widths::kMixed)
      VITQ_WIDTH(2)
      VITQ_WIDTH(3)
      VITQ_WIDTH(4)
      VITQ_WIDTH(5)
      VITQ_WIDTH(6)
      VITQ_WIDTH(7)
      VITQ_WIDTH(8)
      default:
        multiply_group<0, T>(acc, ring, slices, member.first_sharer(), widths);
    }
#undef VITQ_WIDTH
    const int shift = 8 - widths.of(static_cast<int>(static_cast<unsigned>(warp_index()) % 4));
    if constexpr (T::kWholeRows) {
      norm_tile<T>(with, acc, place.row * T::kRows, place.token * T::kTokens, shift);
    } else if (order.in_parts()) {
      share_tile<kKind, T>(with, acc, member, place, order.part_bits, shift);
    } else {
      store_tile<kKind, T>(with, acc, place, shift);
    }
  }
}

// No block ends while others still arrive at its barriers, or read its sums.
template <class T>
__device__ __forceinline__ void leave_cluster(const TileOrder& order) {
  if (in_cluster<T>(order)) VITQ_CLUSTER_BARRIER();
}

template <Epilogue kKind, class T>
__global__ void __launch_bounds__(T::kThreads, 1)
    wgmma_kernel(const GemmArguments with, VITQ_TENSOR_MAP map, const TileOrder order) {
#if defined(VITQ_EMULATION) || defined(__CUDA_ARCH_FEAT_SM90_ALL)
  if (threadIdx.x == 0) {
    prefetch_map(map);
    for (Ring<T> ring{with.weight.widest}; ring.stage < T::kStages; ++ring.stage) {
      mbarrier_init(ring.full(), 1);
      mbarrier_init(ring.empty(), T::kCluster * T::kWorkerThreads / 32);
    }
    fence_mbarrier_init();
  }
  // The barriers are initialised, in all blocks that arrive at them.
  if (in_cluster<T>(order)) {
    VITQ_CLUSTER_BARRIER();
  } else {
    VITQ_BARRIER();
  }
  if (threadIdx.x >= T::kWorkerThreads) {
    give_registers<T::kLoaderRegisters>();
    if (threadIdx.x == T::kWorkerThreads) load_tiles<T>(with, map, order);
    if (T::kWholeRows || order.in_parts()) cluster_has_staged();
    leave_cluster<T>(order);
    return;
  }
  take_registers<T::kWorkerRegisters>();
  multiply_tiles<kKind, T>(with, order);
  leave_cluster<T>(order);
#else
  __trap();  // no wgmma before and after Hopper, nor in a build without sm_90a; ops/cuda does not ask for it there
#endif
}

// Launches the kernel of a tile: one block an SM, which takes tiles in turn with its cluster; with several parts, or
// where it holds all rows, a cluster a tile.
template <Epilogue kKind, class T>
void launch_wgmma_tile(const GemmArguments& with, int parts, cudaStream_t stream) {
  const int bytes = wgmma_shared_bytes<T>(with.weight.widest);
  const int slices = (with.weight.steps + kStepsOfStage - 1) / kStepsOfStage;
  const int most_parts = std::min(slices, T::kMostParts);
  require((parts == 1 || parts == 2 || parts == 4) && parts <= most_parts,
          "linear: parts must be 1, 2 or 4 and at most " + std::to_string(most_parts) + " on wgmma, got " +
              std::to_string(parts));
  TileOrder order = TileOrder::of<T>(with, parts);
  const int64_t most = (int64_t{1} << 30) / (T::kCluster * parts);
  require(int64_t{order.row_tiles} * order.token_tiles < most, "linear: too many tiles");
  int cluster = T::kCluster * parts;
  dim3 grid;
  if constexpr (T::kWholeRows) {
    cluster *= order.row_tiles, order.row_tiles = 1;
    require(order.token_tiles <= kMostNormTiles,
            "linear: tokens with LayerNorm must be at most " + std::to_string(kMostNormTiles) + " tiles of " +
                std::to_string(T::kTokens) + ", got " + std::to_string(with.tokens));
    grid = dim3(cluster, order.token_tiles);
  } else {
    const int at_once = parts > 1 ? order.count() : sm_count() / cluster;
    grid = dim3(cluster * std::min(order.count(), at_once));
  }
  const auto kernel = &wgmma_kernel<kKind, T>;
  allow_shared_memory(kernel, bytes, "linear");  // first: a new thread has no context before a call of the runtime
  const TensorMap map =
      token_map(with.a, with.columns, with.tokens, with.a_stride, kTokenLine, T::kTokens / T::kCluster);
  VITQ_LAUNCH_CLUSTERS(kernel, static_cast<unsigned>(cluster), grid, T::kThreads, bytes, stream, with, map, order);
  check_launch("linear");
}

template <Epilogue kKind>
void launch_wgmma(const GemmArguments& with, int tile, int parts, cudaStream_t stream);

// A tile as a kind of epilogue has it.
template <Epilogue kKind, class T>
void launch_wgmma_of_kind(const GemmArguments& with, int parts, cudaStream_t stream) {
  if constexpr (kKind != Epilogue::kNorm) {
    launch_wgmma_tile<kKind, T>(with, parts, stream);
  } else if constexpr (T::kTokens <= kMostNormTokens) {
    launch_wgmma_tile<kKind, AllRows<T>>(with, parts, stream);
  } else {
    require(false, "linear: a tile with LayerNorm must have at most " + std::to_string(kMostNormTokens) +
                       " tokens, got " + std::to_string(T::kTokens));
  }
}

#define VITQ_WGMMA_CASE(index, tokens, stages, cluster) \
  case index:                                           \
    return launch_wgmma_of_kind<kKind, WgmmaTile<tokens, stages, cluster>>(with, parts, stream);

// Defines launch_wgmma of one kind.
#define VITQ_DEFINE_WGMMA_LAUNCH(kind)                                                           \
  template <>                                                                                    \
  void launch_wgmma<kind>(const GemmArguments& with, int tile, int parts, cudaStream_t stream) { \
    constexpr Epilogue kKind = kind;                                                             \
    switch (tile) {                                                                              \
      VITQ_WGMMA_TILES(VITQ_WGMMA_CASE)                                                          \
      default:                                                                                   \
        require(false, "linear: no tile " + std::to_string(tile));                               \
    }                                                                                            \
  }

}  // namespace vitq
