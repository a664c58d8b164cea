// Linear layers on packed weights for sm_80 and later: int8 (or native 4-bit) tensor-core products, cp.async pipeline.
//
// Computes    acc[t, n] = sum_k a[t, k] * w[n, k], then an epilogue of epilogue.cuh.
// Layouts     a int8 [tokens, K], rows at multiples of 16 bytes; weights as weights.cuh says, groups of 64 rows, each
//             quarter of its own width; out [tokens, N] row-major, in the model's row order.
// Work split  A block computes a tile of row_warps * 64 rows times token_warps * kTokenFragments * 16 tokens; a warp 64
//             rows (one group) times its tokens. Tokens are the M operand of the mma, weights the N operand. Blocks run
//             over the tiles of rows first, which share the tokens in L2. grid.z: parts of K, whose sums
//             linear.cu adds.
// Pipeline    kStages steps of 64 columns in shared memory, copied by cp.async, one barrier a step. Tokens lie in lines
//             of 128 bytes, two tokens a line, the 16-byte chunk c of line l at chunk c ^ (l % 4): ldmatrix and the
//             copies are free of bank conflicts. Weights lie as in global memory, a quarter's planes one behind the
//             other.
// Row order   A lane ends with 16 consecutive stored rows of consecutive tokens: 16-byte stores of codes, no exchange.
//             Where quarters of several widths reorder the rows of groups, outputs pass through shared memory.
// Widths      A warp whose group has one width runs the loop of that width, else one that asks at each quarter; all in
//             step through the barriers: a tile takes as long as its widest group.
// Exactness   int32 sums are exact: |a * w * 2^(8 - bits)| <= 2^14, K < 2^17.
// Source      design.md S2; vitq_kernels/ops/reference.py; fragment layouts: PTX ISA 9.7.14.5.
#pragma once

#include "gemm_sm80_store.cuh"
#include "launch.cuh"

namespace vitq {

// Where the 16 bytes `chunk` (0..3) of a token lie in a stage.
__device__ __forceinline__ int token_offset(int token, int chunk) {
  const int line = token / 2;
  return line * 128 + token % 2 * 64 + (chunk ^ (line & 3)) * 16;
}

// A thread's part of the pipeline: where its copies come from and go to, one step after another.
template <class T>
struct Pipeline {
  unsigned char* stages;
  int stage_size, last_step, step, column;  // step, column: of the next load
  int read_stage, write_stage;              // bytes from `stages`
  int token_target, group_target;           // bytes from the stage
  const int8_t* token_source;               // 16 bytes of the first of its tokens
  int token_stride;
  const uint8_t* group_source;  // 16 bytes of its warp's group
  int step_chunks;              // of its group
  int tokens_left, columns, token_warp;

  __device__ __forceinline__ Pipeline(const GemmArguments& with, unsigned char* shared, int first_step, int end_step,
                                      int first_token, int row_warp, int its_token_warp, Widths widths, int first_chunk)
      : stages(shared),
        stage_size(stage_bytes<T>(with.weight.widest)),
        last_step(end_step),
        step(first_step),
        column(first_step * kStepColumns + threadIdx.x % 4 * 16),
        read_stage(0),
        write_stage(0),
        token_target(token_offset(threadIdx.x / 4, threadIdx.x % 4)),
        group_target(T::kTokenBytes + row_warp * kQuarters * with.weight.widest * kChunkBytes + lane_index() * 16),
        token_source(with.a + (first_token + token_at<T>(threadIdx.x / 4)) * with.a_stride + column),
        token_stride(static_cast<int>(with.a_stride)),
        group_source(with.weight.chunks + (first_chunk + int64_t{first_step} * widths.chunks()) * kChunkBytes +
                     lane_index() * 16),
        step_chunks(widths.chunks()),
        tokens_left(with.tokens - first_token - token_at<T>(threadIdx.x / 4)),
        columns(with.columns),
        token_warp(its_token_warp) {}

  static constexpr int kTokensAtOnce = T::kThreads / 4;
  static_assert(kTokensAtOnce % 8 == 0, "the swizzle repeats every 8 tokens");
  static_assert(T::kWarpTokens % kTokensAtOnce == 0, "a thread's tokens are apart by the same in every tile");

  // Starts the copies of the next step, a group of cp.async; an empty one beyond the last step keeps the count.
  template <int kBits>
  __device__ __forceinline__ void load() {
    if (step < last_step) {
      unsigned char* target = stages + write_stage;
#pragma unroll
      for (int i = 0; i < T::kTokens; i += kTokensAtOnce) {
        // token_at(i + threadIdx.x / 4) less that of i = 0.
        constexpr int kWarpTokens = T::kWarpTokens;
        const int further = i / kWarpTokens * kWarpTokens + i % kWarpTokens / 8;
        // Where nothing is read the address is not used.
        const bool inside = further < tokens_left && column < columns;
        copy_async_16(target + token_target + i * kStepColumns, token_source + int64_t{further} * token_stride,
                      inside ? 16 : 0);
      }
      constexpr int kMost = kBits == Widths::kMixed ? 8 : kBits, kCopied = 512;  // bytes that a warp copies at a time
#pragma unroll
      for (int c = 0; c < kMost; c += T::kTokenWarps) {
        const int offset = (c + token_warp) * kCopied;
        const bool inside = kBits == Widths::kMixed
                                ? offset + static_cast<int>(lane_index()) * 16 < step_chunks * kChunkBytes
                                : c + T::kTokenWarps <= kBits || c + token_warp < kBits;
        if (inside) copy_async_16(target + group_target + offset, group_source + offset);
      }
      token_source += kStepColumns, column += kStepColumns, ++step;
      group_source += (kBits == Widths::kMixed ? step_chunks : kQuarters * kBits) * kChunkBytes;
      write_stage = next(write_stage);
    }
    commit_copies();
  }

  __device__ __forceinline__ int next(int stage) const {
    return stage == (T::kStages - 1) * stage_size ? 0 : stage + stage_size;
  }
};

// One step of a warp: its tokens times its group.
// of_lane: where the lane's first matrix row begins in the tokens.
template <int kBits, bool kNative4, int kTokenFragments>
__device__ __forceinline__ void multiply_step(Accumulators<kTokenFragments>& acc, const unsigned char* tokens,
                                              int of_lane, const unsigned char* chunks, Widths widths) {
  uint32_t a[kTokenFragments][2][4];
#pragma unroll
  for (int m = 0; m < kTokenFragments; ++m) {
    constexpr int kFragmentBytes = 16 * kStepColumns, kTwoChunks = 32;  // token_offset of 16 tokens, 2 chunks further
    load_matrices(a[m][0], tokens + of_lane + m * kFragmentBytes);
    load_matrices(a[m][1], tokens + (of_lane ^ kTwoChunks) + m * kFragmentBytes);
  }
  if constexpr (kNative4) {
    // Codes of 4 bits in bytes to nibbles, paired as the weights': the first register of an mma of bytes in the upper.
#pragma unroll
    for (int m = 0; m < kTokenFragments; ++m) {
      uint32_t packed[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint32_t upper = a[m][i / 2][i % 2] << 4, lower = a[m][i / 2][i % 2 + 2];
        packed[i] = lower ^ ((upper ^ lower) & 0xf0f0f0f0u);  // one LOP3
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) a[m][0][i] = packed[i];
    }
  }
#pragma unroll
  for (int quarter = 0; quarter < kQuarters; ++quarter) {
    QuarterRegisters<kNative4> b;
    if constexpr (kBits == Widths::kMixed) {
      unpack_quarter<kNative4>(widths.of(quarter), chunks, b);
      chunks += widths.of(quarter) * kChunkBytes;
    } else {
      unpack_quarter<kBits, kNative4>(chunks + quarter * kBits * kChunkBytes, b);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int j = 2 * quarter + i;
      if constexpr (kNative4) {
#pragma unroll
        for (int m = 0; m < kTokenFragments; ++m) mma_s4(acc[m][j], a[m][0], b[2 * i], b[2 * i + 1]);
      } else {
#pragma unroll
        for (int m = 0; m < kTokenFragments; ++m) mma_s8(acc[m][j], a[m][0], b[4 * i], b[4 * i + 1]);
#pragma unroll
        for (int m = 0; m < kTokenFragments; ++m) mma_s8(acc[m][j], a[m][1], b[4 * i + 2], b[4 * i + 3]);
      }
    }
  }
}

// All steps of a warp whose group has kBits, or kMixed; 0: it has no group, and only copies tokens.
template <int kBits, bool kNative4, class T>
__device__ __forceinline__ void multiply(Accumulators<T::kTokenFragments>& acc, Pipeline<T> pipeline, int row_warp,
                                         int widest, Widths widths) {
  const int steps = pipeline.last_step - pipeline.step;
  const int tokens = pipeline.token_warp * T::kWarpTokens * kStepColumns;
  const int chunks = T::kTokenBytes + row_warp * kQuarters * widest * kChunkBytes;
  int of_lane = token_offset(static_cast<int>(lane_index() % 16), static_cast<int>(lane_index() / 16));
  // Else the loop that asks for widths computes them again at each step: 20 instructions.
  hold(of_lane);
  hold(pipeline.token_target);
  hold(pipeline.group_target);
  hold(pipeline.tokens_left);
#pragma unroll
  for (int s = 0; s < T::kStages - 1; ++s) pipeline.template load<kBits>();
  for (int i = 0; i < steps; ++i) {
    wait_copies<T::kStages - 2>();
    VITQ_BARRIER();  // the step's bytes are there; and all warps have left the stage that is loaded now
    pipeline.template load<kBits>();
    if constexpr (kBits != 0) {
      const unsigned char* stage = pipeline.stages + pipeline.read_stage;
      multiply_step<kBits, kNative4, T::kTokenFragments>(acc, stage + tokens, of_lane, stage + chunks, widths);
    }
    pipeline.read_stage = pipeline.next(pipeline.read_stage);
  }
}

template <Epilogue kKind, bool kNative4, class T>
__global__ void __launch_bounds__(T::kThreads, T::kBlocks) gemm_kernel(const GemmArguments with) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  if constexpr (kNative4) {
    __trap();  // no 4-bit mma from Hopper on; ops/cuda/linear.py does not ask for it
    return;
  }
#endif
  follow_predecessor();
  const int row_tiles = (with.rows + T::kRows - 1) / T::kRows;
  const int first_row = blockIdx.x % row_tiles * T::kRows, first_token = blockIdx.x / row_tiles * T::kTokens;
  const int warp = warp_index(), row_warp = warp / T::kTokenWarps, token_warp = warp % T::kTokenWarps;
  const int group = first_row / kGroupRows + row_warp;
  int32_t* vectors = reinterpret_cast<int32_t*>(shared_memory());
  unsigned char* stages = shared_memory() + (kVectors + 1) * 4 * T::kRows;
  stage_vectors<kKind, T>(with, first_row, vectors);

  const bool present = group < with.weight.group_count;
  const Widths widths{present ? static_cast<uint32_t>(with.weight.groups[2 * group]) : 0};
  const int first_chunk = present ? with.weight.groups[2 * group + 1] : 0;
  const int64_t steps = with.weight.steps, parts = gridDim.z, part = blockIdx.z;
  const Pipeline<T> pipeline(with, stages, static_cast<int>(steps * part / parts),
                             static_cast<int>(steps * (part + 1) / parts), first_token, row_warp, token_warp, widths,
                             first_chunk);
  Accumulators<T::kTokenFragments> acc = {};
#define VITQ_WIDTH(width)                                                           \
  case width:                                                                       \
    multiply<width, kNative4>(acc, pipeline, row_warp, with.weight.widest, widths); \
    break;
  const int bits = widths.only();
  switch (bits) {
    VITQ_WIDTH(Widths::kMixed)
    VITQ_WIDTH(0)
    VITQ_WIDTH(2)
    VITQ_WIDTH(3)
    VITQ_WIDTH(4)
    default:
      if constexpr (!kNative4) {
        switch (bits) {
          VITQ_WIDTH(5)
          VITQ_WIDTH(6)
          VITQ_WIDTH(7)
          VITQ_WIDTH(8)
        }
      }
  }
#undef VITQ_WIDTH
  const int lane = lane_index(), at = row_warp * kGroupRows + lane % 4 * 2 * kRun;
  const int its_token = first_token + token_warp * T::kWarpTokens + lane / 4 * 2 * T::kTokenFragments;
  const bool staged = is_staged(with);
  void* to = output_of<kKind>(with, blockIdx.z);
  Outputs<kKind, T> out;
  finish<kKind, kNative4, T>(with, acc, vectors, at, its_token, widths, staged, out);
  if (staged) {
    store_through_shared<kKind, T>(with, out, vectors + kVectors * T::kRows + at, stages, first_row, first_token, to);
  } else {
    store_direct<kKind, T>(with, out, first_row + at, its_token, to);
  }
}

// Launches the kernel of a tile; one translation unit for each kind of epilogue keeps the build parallel.
template <Epilogue kKind, bool kNative4, class T>
void launch_tile(const GemmArguments& with, int parts, cudaStream_t stream) {
  const int bytes = shared_bytes<T>(with.weight.widest, is_staged(with), staged_element(kKind));
  const int64_t blocks = int64_t{(with.rows + T::kRows - 1) / T::kRows} * ((with.tokens + T::kTokens - 1) / T::kTokens);
  require(blocks < int64_t{1} << 31, "linear: too many tiles, " + std::to_string(blocks));
  const dim3 grid(static_cast<unsigned>(blocks), 1, static_cast<unsigned>(parts));
  const auto kernel = &gemm_kernel<kKind, kNative4, T>;
  allow_shared_memory(kernel, bytes, "linear");
  VITQ_LAUNCH(kernel, grid, T::kThreads, bytes, stream, with);
  check_launch("linear");
}

template <Epilogue kKind>
void launch_gemm(const GemmArguments& with, int tile, bool native4, int parts, cudaStream_t stream);

#define VITQ_GEMM_CASE(index, row_warps, token_warps, fragments, stages, blocks)                               \
  case index:                                                                                                  \
    if (native4) {                                                                                             \
      launch_tile<kKind, true, Tile<row_warps, token_warps, fragments, stages, blocks>>(with, parts, stream);  \
    } else {                                                                                                   \
      launch_tile<kKind, false, Tile<row_warps, token_warps, fragments, stages, blocks>>(with, parts, stream); \
    }                                                                                                          \
    break;

// Defines launch_gemm of one kind.
#define VITQ_DEFINE_GEMM(kind)                                                                                \
  template <>                                                                                                 \
  void launch_gemm<kind>(const GemmArguments& with, int tile, bool native4, int parts, cudaStream_t stream) { \
    constexpr Epilogue kKind = kind;                                                                          \
    switch (tile) {                                                                                           \
      VITQ_GEMM_TILES(VITQ_GEMM_CASE)                                                                         \
      default:                                                                                                \
        require(false, "linear: no tile " + std::to_string(tile));                                            \
    }                                                                                                         \
  }

}  // namespace vitq
