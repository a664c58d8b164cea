// The launcher of the linear ops: a GEMM of either kind; that of mma.sync in several parts is followed by a kernel that
// adds them.

#include <algorithm>
#include <iterator>

#include "gemm_sm80.cuh"
#include "gemm_sm90.cuh"

namespace vitq {

// Adds the parts' sums; a thread finishes a run of 8 rows of one token.
template <Epilogue kKind>
__global__ void __launch_bounds__(128) finish_kernel(const GemmArguments with, const int32_t* partial, int parts) {
  follow_predecessor();
  const int runs = (with.rows + kRun - 1) / kRun;
  const int64_t index = int64_t{blockIdx.x} * 128 + threadIdx.x;
  const int token = static_cast<int>(index / runs), row = static_cast<int>(index % runs) * kRun;
  if (token >= with.tokens) return;
  const bool vector = with.rows % kRun == 0;
  const int64_t part_size = int64_t{with.tokens} * with.rows;
  const int32_t* source = partial + int64_t{token} * with.rows + row;
  int32_t acc[kRun] = {};
  for (int part = 0; part < parts; ++part, source += part_size) {
    if (vector) {
      const uint4 low = *reinterpret_cast<const uint4*>(source), high = *reinterpret_cast<const uint4*>(source + 4);
      const uint32_t sums[kRun] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
      for (int i = 0; i < kRun; ++i) acc[i] += static_cast<int32_t>(sums[i]);
    } else {
#pragma unroll
      for (int i = 0; i < kRun; ++i) acc[i] += row + i < with.rows ? source[i] : 0;
    }
  }
  RunVectors run;
#pragma unroll
  for (int i = 0; i < kRun; ++i) {
    load_vectors<kKind>(with.epilogue, row + i, with.rows, run.multiplier[i], run.bias[i], run.zero[i],
                        run.inv_scale[i]);
  }
  uint32_t word[kRun];
  rescale<kKind>(with.epilogue, run, [&](int) { return with.epilogue.token_scale[token]; }, acc, word);
  store_words<kKind>(with, with.out, word, Place<kKind>(with, token, row), with.rows - row, vector);
}

template <Epilogue kKind>
void launch_finish(const GemmArguments& with, const int32_t* partial, int parts, cudaStream_t stream) {
  const int64_t threads = int64_t{with.tokens} * ((with.rows + kRun - 1) / kRun), blocks = (threads + 127) / 128;
  require(blocks < int64_t{1} << 31, "linear: too many outputs, " + std::to_string(threads * kRun));
  const auto kernel = &finish_kernel<kKind>;
  VITQ_LAUNCH(kernel, static_cast<unsigned>(blocks), 128, 0, stream, with, partial, parts);
  check_launch("linear, sum of the parts");
}

template <>
void launch_gemm<Epilogue::kPartial>(const GemmArguments&, int, bool, int, cudaStream_t);
#define VITQ_DECLARE(kind)                                                    \
  template <>                                                                 \
  void launch_gemm<kind>(const GemmArguments&, int, bool, int, cudaStream_t); \
  template <>                                                                 \
  void launch_wgmma<kind>(const GemmArguments&, int, int, cudaStream_t);
VITQ_DECLARE(Epilogue::kCodes)
VITQ_DECLARE(Epilogue::kGelu)
VITQ_DECLARE(Epilogue::kReal)
#undef VITQ_DECLARE
template <>
void launch_wgmma<Epilogue::kNorm>(const GemmArguments&, int, int, cudaStream_t);

template <Epilogue kKind>
void launch_linear(GemmArguments with, int tile, bool native4, int parts, int32_t* partial, cudaStream_t stream) {
  if (gemm_tile(tile).wgmma) {
    require(!native4, "linear: wgmma has no 4-bit products");
    launch_wgmma<kKind>(with, tile, parts, stream);
  } else if (parts == 1) {
    launch_gemm<kKind>(with, tile, native4, 1, stream);
  } else {
    require(partial != nullptr, "linear: several parts need room for their sums");
    void* out = with.out;
    with.out = partial;
    launch_gemm<Epilogue::kPartial>(with, tile, native4, parts, stream);
    with.out = out;
    launch_finish<kKind>(with, partial, parts, stream);
  }
}

// What a launch with LayerNorm takes for granted.
void check_norm(const GemmArguments& with, int tile, bool native4, int parts) {
  require(gemm_tile(tile).wgmma && !native4,
          "linear: a tile with LayerNorm must be one of wgmma, got " + std::to_string(tile));
  require(parts == 1, "linear: parts with LayerNorm must be 1, got " + std::to_string(parts));
  require(with.rows % kRun == 0 && with.rows <= kMostNormRows,
          "linear: rows with LayerNorm must be a multiple of 8 up to " + std::to_string(kMostNormRows) + ", got " +
              std::to_string(with.rows));
  const EpilogueArguments& e = with.epilogue;
  const void* pointers[] = {with.out, e.multiplier, e.bias_q, e.residual, e.gain, e.offset, e.codes};
  const bool usable = std::all_of(std::begin(pointers), std::end(pointers),
                                  [](const void* pointer) { return pointer != nullptr && is_aligned(pointer); });
  require(usable,
          "linear: out, multiplier, bias_q, residual, gain, offset and codes with LayerNorm must be given and begin at "
          "multiples of 16 bytes");
  require(2 <= e.bits && e.bits <= 8, "linear: bits must be in 2..8, got " + std::to_string(e.bits));
  require(0 <= e.real_dtype && e.real_dtype <= 2,
          "linear: real_dtype must be in 0..2, got " + std::to_string(e.real_dtype));
}

void linear(const int8_t* a, int64_t a_stride, LinearWeight weight, int tokens, int rows, int columns,
            EpilogueArguments epilogue, int kind, int tile, bool native4, int parts, int32_t* partial, void* out,
            cudaStream_t stream) {
  require(rows > 0 && columns > 0 && columns % 16 == 0 && a_stride % 16 == 0 && a_stride >= columns &&
              a_stride < int64_t{1} << 31,
          "linear: columns and a_stride must be positive multiples of 16, got " + std::to_string(columns) + " and " +
              std::to_string(a_stride));
  require(weight.steps * kStepColumns >= columns && weight.group_count * kGroupRows >= rows,
          "linear: the weight is smaller than its rows and columns");
  require(reinterpret_cast<uintptr_t>(weight.chunks) % 16 == 0,
          "linear: the weight must begin at a multiple of 16 bytes");
  require(1 <= parts && parts <= weight.steps,
          "linear: parts must be in 1.." + std::to_string(weight.steps) + ", got " + std::to_string(parts));
  require(!native4 || weight.widest <= 4, "linear: 4-bit products need weights of at most 4 bits");
  if (tokens == 0) return;
  const GemmArguments with{a, a_stride, weight, tokens, rows, columns, out, epilogue};
  switch (static_cast<Epilogue>(kind)) {
#define VITQ_KIND(name) \
  case Epilogue::name:  \
    return launch_linear<Epilogue::name>(with, tile, native4, parts, partial, stream);
    VITQ_KIND(kCodes)
    VITQ_KIND(kGelu)
    VITQ_KIND(kReal)
#undef VITQ_KIND
    case Epilogue::kNorm:
      check_norm(with, tile, native4, parts);
      return launch_wgmma<Epilogue::kNorm>(with, tile, 1, stream);
    default:
      require(false, "linear: kind must be 0, 1, 2 or 4, got " + std::to_string(kind));
  }
}

namespace {

#define VITQ_TILE_ROW(index, row_warps, token_warps, fragments, stages, blocks) \
  case index:                                                                   \
    return on_mma(Tile<row_warps, token_warps, fragments, stages, blocks>());
#define VITQ_WGMMA_ROW(index, tokens, stages, cluster) \
  case index:                                          \
    return on_wgmma(WgmmaTile<tokens, stages, cluster>());

// Calls the function of its kind with a tile.
template <class OnMma, class OnWgmma>
auto visit_tile(int index, const OnMma& on_mma, const OnWgmma& on_wgmma) {
  switch (index) {
    VITQ_GEMM_TILES(VITQ_TILE_ROW)
    VITQ_WGMMA_TILES(VITQ_WGMMA_ROW)
    default:
      throw std::invalid_argument("vitq_kernels._cuda: linear: no tile " + std::to_string(index));
  }
}

}  // namespace

GemmTile gemm_tile(int index) {
  return visit_tile(
      index,
      [](auto tile) {
        using T = decltype(tile);
        return GemmTile{T::kRows, T::kTokens, T::kThreads, T::kStages, T::kBlocks, false, 1};
      },
      [](auto tile) {
        using T = decltype(tile);
        return GemmTile{T::kRows, T::kTokens, T::kThreads, T::kStages, 1, true, T::kCluster};
      });
}

int gemm_shared_bytes(int index, int widest, bool staged, Epilogue kind) {
  return visit_tile(
      index, [&](auto tile) { return shared_bytes<decltype(tile)>(widest, staged, staged_element(kind)); },
      [&](auto tile) { return wgmma_shared_bytes<decltype(tile)>(widest); });
}

}  // namespace vitq
