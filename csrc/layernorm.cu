// Whole rows: LayerNorm straight to codes (S3), with the residual before it or a token's scale after it, and codes with
// a scale a token without a norm (S5).
//
// Computes    y = x (+ residual, rounded to x's dtype);  n = (y - mean) * rstd * gain[k] + offset[k] (or y);
//             code = clamp(rint(n)), or S5 of n with a scale a token.
// Layouts     x, residual, y [rows, cols] row-major; gain, offset float32 [cols]; codes int8 [rows, cols].
// Work split  A warp a row up to 2048 columns, sums by shuffles alone; 256 threads a row beyond, sums through shared
//             memory. A thread takes every 32nd (256th) run of 8 columns, and holds them in registers: one pass over
//             memory, all of its loads under way together. Rows that a register kernel does not take are read again
//             in each pass, by the same threads in the same order: the same bits.
// Requires    Nothing. In registers, with 16-byte accesses: rows of up to 8192 columns, a multiple of 8, in memory that
//             is 16-byte aligned.
// Exactness   y and S5's codes of x exact; LayerNorm's codes bounded: float32, the mean subtracted twice.
// Source      reference.layernorm, add_layernorm, layernorm_per_token, quantize_per_token.

#include "launch.cuh"
#include "launchers.h"
#include "norm.cuh"
#include "rows.cuh"

namespace vitq {
namespace {

constexpr int kWarpsOfBlock = 4;                          // of one-warp rows
constexpr int kBlockRow = 256;                            // threads of a long row
constexpr int kWarpColumns = 8 * 32 * kRunOfRow;          // 64 registers of a thread hold them
constexpr int kBlockColumns = 4 * kBlockRow * kRunOfRow;  // 32 registers

struct RowArguments {
  const char* name;
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
};

template <int kThreads>
constexpr int kRowsOfBlock = kThreads == 32 ? kWarpsOfBlock : 1;
template <int kThreads>
constexpr int kThreadsOfBlock = kThreads * kRowsOfBlock<kThreads>;

// 0 leaves the registers to ptxas. It aims at 96 for 6 runs, and spilled one of them; 4 blocks leave it 128.
template <int kThreads, int kRuns>
constexpr int kBlocksOfSm = kThreads == 32 && kRuns == 6 ? 4 : 0;

template <int kThreads>
__device__ __forceinline__ int64_t row_of_thread() {
  return int64_t{blockIdx.x} * kRowsOfBlock<kThreads> + (kThreads == 32 ? threadIdx.x / 32 : 0);
}

__device__ __forceinline__ CodeRange token_range() { return {kRoundToInteger - 127.0f, kRoundToInteger + 127.0f}; }

// A row of more than kRuns - 1 and at most kRuns runs a thread, in registers.
template <int kThreads, int kRuns>
__global__ void __launch_bounds__(kThreadsOfBlock<kThreads>, kBlocksOfSm<kThreads, kRuns>)
    row_kernel(const RowArguments with) {
  follow_predecessor();
  const int64_t row = row_of_thread<kThreads>();
  if (row >= with.rows) return;  // whole warps; a long row's block has one
  const int thread = kThreads == 32 ? lane_index() : threadIdx.x;
  float* shared = reinterpret_cast<float*>(shared_memory());  // kThreads / 32 floats a number
  const auto column = [&](int run) { return (thread + run * kThreads) * kRunOfRow; };
  const auto inside = [&](int run) { return run < kRuns - 1 || column(run) < with.cols; };
  const int64_t start = row * with.cols;

  float value[kRuns][kRunOfRow];
  with_constant(with.dtype, [&](auto dtype) {
    constexpr Real kDtype = decltype(dtype)::value;
    const auto load = [&](const void* base, int r) {
      return inside(r) ? load_words<kDtype>(base, start + column(r)) : Words<kDtype>{};
    };
    Words<kDtype> x[kRuns];
#pragma unroll
    for (int r = 0; r < kRuns; ++r) x[r] = load(with.x, r);
    if (with.residual != nullptr) {
      Words<kDtype> residual[kRuns];
#pragma unroll
      for (int r = 0; r < kRuns; ++r) residual[r] = load(with.residual, r);
#pragma unroll
      for (int r = 0; r < kRuns; ++r) {
        float added[kRunOfRow];
        reals_of(x[r], value[r]);
        reals_of(residual[r], added);
#pragma unroll
        for (int i = 0; i < kRunOfRow; ++i) value[r][i] += added[i];
        x[r] = words_of<kDtype>(value[r]);
        if (inside(r)) store_words(with.y, start + column(r), x[r]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRuns; ++r) reals_of(x[r], value[r]);
  });

  if (with.gain != nullptr) {
    const float columns = static_cast<float>(with.cols);
    // 8 sums side by side: an eighth of the chain, and of its rounding.
    float totals[kRunOfRow] = {}, squares[kRunOfRow] = {};
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
#pragma unroll
      for (int i = 0; i < kRunOfRow; ++i) totals[i] += value[r][i];
    }
    float total[1] = {sum_of(totals)};
    reduce<Sum, kThreads>(total, shared);
    const float mean = total[0] / columns;
#pragma unroll
    for (int i = 0; i < kRunOfRow; ++i) totals[i] = 0.0f;
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
#pragma unroll
      for (int i = 0; i < kRunOfRow; ++i) {
        value[r][i] = inside(r) ? value[r][i] - mean : 0.0f;
        totals[i] += value[r][i];
        squares[i] = fmaf(value[r][i], value[r][i], squares[i]);
      }
    }
    float moments[2] = {sum_of(totals), sum_of(squares)};
    reduce<Sum, kThreads>(moments, shared + kThreads / 32);
    const Norm norm = norm_of(moments[0] / columns, moments[1] / columns, with.eps);
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      if (!inside(r)) continue;  // its zeros stay
      float gain[kRunOfRow], offset[kRunOfRow];
      reals_of(load_words<Real::kFloat32>(with.gain, column(r)), gain);
      reals_of(load_words<Real::kFloat32>(with.offset, column(r)), offset);
#pragma unroll
      for (int i = 0; i < kRunOfRow; ++i) value[r][i] = normalised(value[r][i], norm, gain[i], offset[i]);
    }
  }

  const auto store = [&](const auto& code_of) {
#pragma unroll
    for (int r = 0; r < kRuns; ++r) {
      if (!inside(r)) continue;
      uint32_t word[kRunOfRow];
#pragma unroll
      for (int i = 0; i < kRunOfRow; ++i) word[i] = code_of(value[r][i]);
      store_codes(with.codes + start + column(r), word);
    }
  };
  if (with.scale == nullptr) {
    const CodeRange range = code_range(with.bits);
    store([&](float x) { return static_code(x, range); });
    return;
  }
  float absmax[1] = {};
#pragma unroll
  for (int r = 0; r < kRuns; ++r) {
#pragma unroll
    for (int i = 0; i < kRunOfRow; ++i) absmax[0] = fmaxf(absmax[0], fabsf(value[r][i]));
  }
  reduce<Largest, kThreads>(absmax, shared + 3 * (kThreads / 32));
  const TokenScale found = token_scale(absmax[0]);
  if (thread == 0) with.scale[row] = found.scale;
  store([&](float x) { return requantise(x, found.inverse, kRoundToInteger, token_range()); });
}

// Any row, element by element, read again in each pass.
template <int kThreads>
__global__ void __launch_bounds__(kThreadsOfBlock<kThreads>) any_row_kernel(const RowArguments with) {
  follow_predecessor();
  const int64_t row = row_of_thread<kThreads>();
  if (row >= with.rows) return;
  const int thread = kThreads == 32 ? lane_index() : threadIdx.x;
  float* shared = reinterpret_cast<float*>(shared_memory());
  const int64_t start = row * with.cols;

  with_constant(with.dtype, [&](auto dtype) {
    constexpr Real kDtype = decltype(dtype)::value;
    // The thread's elements k, each with its place i in its run.
    const auto each = [&](const auto& body) {
      for (int64_t k = thread * kRunOfRow; k < with.cols; k += kThreads * kRunOfRow) {
#pragma unroll
        for (int i = 0; i < kRunOfRow; ++i) {
          if (k + i < with.cols) body(k + i, i);
        }
      }
    };
    const void* source = with.residual == nullptr ? with.x : with.y;
    if (with.residual != nullptr) {
      each([&](int64_t k, int) {
        store_real<kDtype>(with.y, start + k,
                           load_real<kDtype>(with.x, start + k) + load_real<kDtype>(with.residual, start + k));
      });
    }

    float mean = 0.0f;
    Norm norm = {};
    if (with.gain != nullptr) {
      const float columns = static_cast<float>(with.cols);
      float totals[kRunOfRow] = {}, squares[kRunOfRow] = {};
      each([&](int64_t k, int i) { totals[i] += load_real<kDtype>(source, start + k); });
      float total[1] = {sum_of(totals)};
      reduce<Sum, kThreads>(total, shared);
      mean = total[0] / columns;
#pragma unroll
      for (int i = 0; i < kRunOfRow; ++i) totals[i] = 0.0f;
      each([&](int64_t k, int i) {
        const float centred = load_real<kDtype>(source, start + k) - mean;
        totals[i] += centred;
        squares[i] = fmaf(centred, centred, squares[i]);
      });
      float moments[2] = {sum_of(totals), sum_of(squares)};
      reduce<Sum, kThreads>(moments, shared + kThreads / 32);
      norm = norm_of(moments[0] / columns, moments[1] / columns, with.eps);
    }
    const auto number = [&](int64_t k) {
      const float x = load_real<kDtype>(source, start + k);
      return with.gain == nullptr ? x : normalised(x - mean, norm, with.gain[k], with.offset[k]);
    };

    if (with.scale == nullptr) {
      const CodeRange range = code_range(with.bits);
      each([&](int64_t k, int) { with.codes[start + k] = static_cast<int8_t>(static_code(number(k), range)); });
      return;
    }
    float absmax[1] = {};
    each([&](int64_t k, int) { absmax[0] = fmaxf(absmax[0], fabsf(number(k))); });
    reduce<Largest, kThreads>(absmax, shared + 3 * (kThreads / 32));
    const TokenScale found = token_scale(absmax[0]);
    if (thread == 0) with.scale[row] = found.scale;
    each([&](int64_t k, int) {
      const uint32_t code = requantise(number(k), found.inverse, kRoundToInteger, token_range());
      with.codes[start + k] = static_cast<int8_t>(code);
    });
  });
}

template <int kThreads>
void launch(void (*kernel)(RowArguments), const RowArguments& with, cudaStream_t stream) {
  const int64_t blocks = (with.rows + kRowsOfBlock<kThreads> - 1) / kRowsOfBlock<kThreads>;
  require(blocks < int64_t{1} << 31, std::string(with.name) + ": too many rows, got " + std::to_string(with.rows));
  const size_t shared = kThreads == 32 ? 0 : 4 * (kThreads / 32) * sizeof(float);
  VITQ_LAUNCH(kernel, static_cast<unsigned>(blocks), kThreadsOfBlock<kThreads>, shared, stream, with);
  check_launch(with.name);
}

void launch_rows(const RowArguments& with, cudaStream_t stream) {
  const std::string name = with.name;
  require(0 < with.cols, name + ": cols must be positive, got " + std::to_string(with.cols));
  require(2 <= with.bits && with.bits <= 8, name + ": bits must be in 2..8, got " + std::to_string(with.bits));
  const int dtype = static_cast<int>(with.dtype);
  require(0 <= dtype && dtype <= 2, name + ": dtype must be in 0..2, got " + std::to_string(dtype));
  if (with.rows == 0) return;
  const bool held = with.cols <= kBlockColumns && with.cols % kRunOfRow == 0 && is_aligned(with.x) &&
                    is_aligned(with.residual) && is_aligned(with.y) && is_aligned(with.gain) &&
                    is_aligned(with.offset) && is_aligned(with.codes);
  if (with.cols <= kWarpColumns) {
    if (!held) return launch<32>(any_row_kernel<32>, with, stream);
    switch ((with.cols / kRunOfRow + 31) / 32) {
      case 1:
        return launch<32>(row_kernel<32, 1>, with, stream);
      case 2:
        return launch<32>(row_kernel<32, 2>, with, stream);
      case 3:
        return launch<32>(row_kernel<32, 3>, with, stream);
      case 4:
        return launch<32>(row_kernel<32, 4>, with, stream);
      case 5:
        return launch<32>(row_kernel<32, 5>, with, stream);
      case 6:
        return launch<32>(row_kernel<32, 6>, with, stream);
      case 7:
        return launch<32>(row_kernel<32, 7>, with, stream);
      default:
        return launch<32>(row_kernel<32, 8>, with, stream);
    }
  }
  if (!held) return launch<kBlockRow>(any_row_kernel<kBlockRow>, with, stream);
  switch ((with.cols / kRunOfRow + kBlockRow - 1) / kBlockRow) {
    case 2:
      return launch<kBlockRow>(row_kernel<kBlockRow, 2>, with, stream);
    case 3:
      return launch<kBlockRow>(row_kernel<kBlockRow, 3>, with, stream);
    default:
      return launch<kBlockRow>(row_kernel<kBlockRow, 4>, with, stream);
  }
}

}  // namespace

void layernorm(const void* x, int dtype, const void* residual, void* y, const float* gain, const float* offset,
               int8_t* codes, float* scale, int64_t rows, int cols, float eps, int bits, cudaStream_t stream) {
  require(gain != nullptr && offset != nullptr, "layernorm: gain and offset must not be null");
  require((residual == nullptr) == (y == nullptr), "layernorm: residual and y must both be null or neither");
  launch_rows(
      {"layernorm", x, residual, y, gain, offset, codes, scale, rows, cols, eps, bits, static_cast<Real>(dtype)},
      stream);
}

void quantize_per_token(const void* x, int dtype, int8_t* codes, float* scale, int64_t rows, int cols,
                        cudaStream_t stream) {
  require(rows == 0 || scale != nullptr, "quantize_per_token: scale must not be null");
  launch_rows({"quantize_per_token", x, nullptr, nullptr, nullptr, nullptr, codes, scale, rows, cols, 0.0f, 8,
               static_cast<Real>(dtype)},
              stream);
}

}  // namespace vitq
