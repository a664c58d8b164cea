// Whole rows in registers: LayerNorm straight to codes (S3), with the residual before it or a token's scale after it,
// and codes with a scale a token without a norm (S5).
//
// Computes    y = x (+ residual, rounded to x's dtype);  n = (y - mean) * rstd * gain[k] + offset[k] (or y);
//             code = clamp(rint(n)), or S5 of n with a scale a token.
// Layouts     x, residual, y [rows, cols] row-major; gain, offset float32 [cols]; codes int8 [rows, cols].
// Work split  A warp a row up to 2048 columns, sums by shuffles alone; 256 threads a row beyond, sums through shared
//             memory. A thread holds kRuns runs of 8 columns. One pass over memory.
// Requires    At most 16384 columns. 16-byte accesses where cols is a multiple of 8 and the pointers are aligned.
// Exactness   y and S5's codes of x exact; LayerNorm's codes bounded: float32, the mean subtracted twice.
// Source      reference.layernorm, add_layernorm, layernorm_per_token, quantize_per_token.

#include "launch.cuh"
#include "launchers.h"
#include "rows.cuh"

namespace vitq {
namespace {

constexpr int kWarpsOfBlock = 4;  // of one-warp rows
constexpr int kBlockRow = 256;    // threads of a long row
constexpr int kMostRuns = 8;      // a thread's: 64 registers of the row
constexpr int kMostColumns = kBlockRow * kMostRuns * kRunOfRow;

struct RowArguments {
  const void* x;
  const void* residual;  // or null
  void* y;
  const float* gain;  // null: no norm
  const float* offset;
  int8_t* codes;
  float* scale;  // [rows]; null: codes of a static scale
  int64_t rows;
  int cols;
  float eps;
  int bits;
  Real dtype;
  bool vector;
};

template <int kThreads, int kRuns>
__global__ void __launch_bounds__(kThreads == 32 ? 32 * kWarpsOfBlock : kThreads) row_kernel(const RowArguments with) {
  constexpr int kRowsOfBlock = kThreads == 32 ? kWarpsOfBlock : 1;
  const int64_t row = int64_t{blockIdx.x} * kRowsOfBlock + (kThreads == 32 ? threadIdx.x / 32 : 0);
  if (row >= with.rows) return;  // whole warps; a long row's block has one
  const int thread = kThreads == 32 ? lane_index() : threadIdx.x;
  float* shared = reinterpret_cast<float*>(shared_memory());  // kThreads / 32 floats a reduction
  const auto column = [&](int run) { return (thread + run * kThreads) * kRunOfRow; };
  const int64_t start = row * with.cols;

  float value[kRuns][kRunOfRow];
  float totals[kRunOfRow] = {};  // 8 sums side by side: an eighth of the chain, and of its rounding
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    const int at = column(r), count = with.cols - at;
    const bool vector = with.vector && count > 0;
    load_reals(with.x, start + at, count, with.dtype, vector, value[r]);
    if (with.residual != nullptr) {
      float added[kRunOfRow];
      load_reals(with.residual, start + at, count, with.dtype, vector, added);
#pragma unroll
      for (int i = 0; i < kRunOfRow; ++i) value[r][i] = round_to(value[r][i] + added[i], with.dtype);
      store_reals(with.y, start + at, count, with.dtype, vector, value[r]);
    }
#pragma unroll
    for (int i = 0; i < kRunOfRow; ++i) totals[i] += value[r][i];
  }

  if (with.gain != nullptr) {
    // The first mean is off by its rounding, up to half an ulp of x: as large as the deviations in a row that is nearly
    // constant. `rest`, the mean of what it leaves, takes that away.
    const float columns = static_cast<float>(with.cols);
    const float mean = reduce<Sum, kThreads>(sum_of(totals), shared) / columns;
    float squares[kRunOfRow] = {};
#pragma unroll
    for (int i = 0; i < kRunOfRow; ++i) totals[i] = 0.0f;
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
#pragma unroll
      for (int i = 0; i < kRunOfRow; ++i) {
        value[r][i] = column(r) + i < with.cols ? value[r][i] - mean : 0.0f;
        totals[i] += value[r][i];
        squares[i] = fmaf(value[r][i], value[r][i], squares[i]);
      }
    }
    const float rest = reduce<Sum, kThreads>(sum_of(totals), shared + kThreads / 32) / columns;
    const float square = reduce<Sum, kThreads>(sum_of(squares), shared + 2 * (kThreads / 32)) / columns;
    const float variance = fmaxf(square - rest * rest, 0.0f) + with.eps;
    float rstd = 1.0f / sqrtf(variance);
    // One step of Newton takes back what the root and the division rounded: a scale per token shows the last bit.
    const float ratio = variance * rstd;
    const float excess = fmaf(ratio, rstd, -1.0f) + fmaf(variance, rstd, -ratio) * rstd;
    rstd = fmaf(rstd, -0.5f * excess, rstd);
    const float shift = -rest * rstd;
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      const int at = column(r), count = with.cols - at;
      float gain[kRunOfRow], offset[kRunOfRow];
      load_reals(with.gain, at, count, Real::kFloat32, with.vector && count > 0, gain);
      load_reals(with.offset, at, count, Real::kFloat32, with.vector && count > 0, offset);
#pragma unroll
      for (int i = 0; i < kRunOfRow; ++i) value[r][i] = fmaf(fmaf(value[r][i], rstd, shift), gain[i], offset[i]);
    }
  }

  float inverse = 1.0f;
  CodeRange range = code_range(with.bits);
  if (with.scale != nullptr) {
    float absmax = 0.0f;
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
#pragma unroll
      for (int i = 0; i < kRunOfRow; ++i) {
        if (column(r) + i < with.cols) absmax = fmaxf(absmax, fabsf(value[r][i]));
      }
    }
    const TokenScale found = token_scale(reduce<Largest, kThreads>(absmax, shared + 3 * (kThreads / 32)));
    if (thread == 0) with.scale[row] = found.scale;
    inverse = found.inverse;
    range.low += 1.0f;  // symmetric
  }
  // Clamped before it is shifted where nothing is multiplied: an offset beyond 2^22 would not round to an integer.
  const float low = range.low - kRoundToInteger, high = range.high - kRoundToInteger;
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
    const int at = column(r), count = with.cols - at;
    if (count <= 0) continue;
    uint32_t word[kRunOfRow];
#pragma unroll
    for (int i = 0; i < kRunOfRow; ++i) {
      const float x = value[r][i];
      word[i] = with.scale != nullptr ? requantise(x, inverse, kRoundToInteger, range)
                                      : float_bits(fminf(fmaxf(x, low), high) + kRoundToInteger);
    }
    store_codes(with.codes + start + at, count, with.vector, word);
  }
}

template <int kThreads, int kRuns>
void launch(const RowArguments& with, cudaStream_t stream) {
  constexpr int kRowsOfBlock = kThreads == 32 ? kWarpsOfBlock : 1;
  const int64_t blocks = (with.rows + kRowsOfBlock - 1) / kRowsOfBlock;
  require(blocks < int64_t{1} << 31, "layernorm: too many rows, " + std::to_string(with.rows));
  const auto kernel = &row_kernel<kThreads, kRuns>;
  const size_t shared = kThreads == 32 ? 0 : 4 * (kThreads / 32) * sizeof(float);
  VITQ_LAUNCH(kernel, static_cast<unsigned>(blocks), kThreads == 32 ? 32 * kWarpsOfBlock : kThreads, shared, stream,
              with);
  check_launch("layernorm");
}

void launch_rows(RowArguments with, cudaStream_t stream) {
  require(0 < with.cols && with.cols <= kMostColumns,
          "layernorm: cols must be in 1.." + std::to_string(kMostColumns) + ", got " + std::to_string(with.cols));
  require(2 <= with.bits && with.bits <= 8, "layernorm: bits must be in 2..8, got " + std::to_string(with.bits));
  if (with.rows == 0) return;
  with.vector = with.cols % kRunOfRow == 0 && is_aligned(with.x) && is_aligned(with.residual) && is_aligned(with.y) &&
                is_aligned(with.gain) && is_aligned(with.offset) && is_aligned(with.codes);
  const int runs = (with.cols + kRunOfRow - 1) / kRunOfRow;
  const int of_warp = (runs + 31) / 32, of_block = (runs + kBlockRow - 1) / kBlockRow;
  switch (of_warp) {
    case 1:
      return launch<32, 1>(with, stream);
    case 2:
      return launch<32, 2>(with, stream);
    case 3:
      return launch<32, 3>(with, stream);
    case 4:
      return launch<32, 4>(with, stream);
    case 5:
      return launch<32, 5>(with, stream);
    case 6:
      return launch<32, 6>(with, stream);
    case 7:
    case 8:
      return launch<32, 8>(with, stream);
  }
  if (of_block <= 2) return launch<kBlockRow, 2>(with, stream);
  if (of_block <= 4) return launch<kBlockRow, 4>(with, stream);
  return launch<kBlockRow, 8>(with, stream);
}

}  // namespace

void layernorm(const void* x, int dtype, const void* residual, void* y, const float* gain, const float* offset,
               int8_t* codes, float* scale, int64_t rows, int cols, float eps, int bits, cudaStream_t stream) {
  require(gain != nullptr && offset != nullptr, "layernorm: gain and offset must not be null");
  launch_rows({x, residual, y, gain, offset, codes, scale, rows, cols, eps, bits, static_cast<Real>(dtype), false},
              stream);
}

void quantize_per_token(const void* x, int dtype, int8_t* codes, float* scale, int64_t rows, int cols,
                        cudaStream_t stream) {
  launch_rows(
      {x, nullptr, nullptr, nullptr, nullptr, codes, scale, rows, cols, 0.0f, 8, static_cast<Real>(dtype), false},
      stream);
}

}  // namespace vitq
