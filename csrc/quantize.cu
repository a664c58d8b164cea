// Codes of real activations and of images, with a static scale a channel.
//
// Computes    code = clamp(rint(x * inv_scale[k] + zero_point[k])), S1.
// Layouts     x [rows, cols]; or an image [B, C, H, W], whose patches are rows of C * ph * pw columns in the order of a
//             convolution's weight; codes int8 [rows, cols].
// Work split  A thread takes the same columns of 4 consecutive rows, whose scales it loads once: 8 neighbours with
//             16-byte loads, else every 32nd of 128. A warp then has 256 or 128 columns; a block is 4 warps, 16 rows.
//             Rows are patches side by side: what a warp leaves of an image's line in L1, its next row takes.
// Requires    Fewer than 2^31 patches. 16-byte loads where 8 columns are neighbours in memory and all is aligned.
// Exactness   Exact.
// Source      reference.quantize, reference.quantize_patches.

#include "launch.cuh"
#include "launchers.h"
#include "rows.cuh"

namespace vitq {
namespace {

constexpr int kWarps = 4, kRowsOfThread = 4, kRowsOfBlock = kWarps * kRowsOfThread;
constexpr int kSingles = 4;  // columns of a thread where they are no neighbours

// Where rows and columns lie: of a matrix, or of the patches of an image.
struct Matrix {
  int cols;
  struct Row {
    int64_t start, step;
    __device__ __forceinline__ void advance() { start += step; }
  };
  __device__ __forceinline__ Row row(int64_t r) const { return {r * cols, cols}; }
  __device__ __forceinline__ int64_t column(int c) const { return c; }
};
struct Patches {
  int channels, height, width, patch_height, patch_width, down, across;
  // Divided once a thread, in 32 bits, then stepped: a division of 64 bits is a call.
  struct Row {
    int64_t start, line_step, image_step;  // steps from the last patch of a line, of an image, to the first of the next
    int x, y, across, down, patch_width;
    __device__ __forceinline__ void advance() {
      start += patch_width;
      if (++x < across) return;
      x = 0, start += line_step;
      if (++y < down) return;
      y = 0, start += image_step;
    }
  };
  __device__ __forceinline__ Row row(int64_t r) const {
    const unsigned patch = static_cast<unsigned>(r), line = patch / across, image = line / down;
    const int x = patch - line * across, y = line - image * down;
    const int64_t strip = int64_t{patch_height} * width, plane = int64_t{channels} * height * width;
    const int64_t start = image * plane + y * strip + int64_t{x} * patch_width;
    return {start, strip - int64_t{across} * patch_width, plane - down * strip, x, y, across, down, patch_width};
  }
  __device__ __forceinline__ int64_t column(int c) const {
    const int line = c / patch_width, channel = line / patch_height;
    return (int64_t{channel} * height + (line - channel * patch_height)) * width + (c - line * patch_width);
  }
};

struct QuantizeArguments {
  const void* x;
  const float* inv_scale;
  const int32_t* zero_point;
  int8_t* codes;
  int64_t rows;
  int cols, bits;
  Real dtype;
};

// 8 neighbouring columns of a thread.
template <class Source>
__global__ void __launch_bounds__(32 * kWarps) quantize_kernel(const QuantizeArguments with, const Source source) {
  follow_predecessor();
  const int column = (blockIdx.y * 32 + lane_index()) * kRunOfRow;
  const int64_t first = int64_t{blockIdx.x} * kRowsOfBlock + threadIdx.x / 32 * kRowsOfThread;
  if (column >= with.cols || first >= with.rows) return;
  const int64_t offset = source.column(column);
  float scale[kRunOfRow], zero[kRunOfRow];
  reals_of(load_words<Real::kFloat32>(with.inv_scale, column), scale);
  reals_of(load_words<Real::kFloat32>(with.zero_point, column), zero);
#pragma unroll
  for (int i = 0; i < kRunOfRow; ++i) {
    zero[i] = kRoundToInteger + int_to_float(static_cast<int32_t>(float_bits(zero[i])));
  }
  const CodeRange range = code_range(with.bits);
  with_constant(with.dtype, [&](auto dtype) {
    constexpr Real kDtype = decltype(dtype)::value;
    Words<kDtype> x[kRowsOfThread];
    auto row = source.row(first);
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r, row.advance()) {
      if (first + r < with.rows) x[r] = load_words<kDtype>(with.x, row.start + offset);
    }
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) {
      if (first + r >= with.rows) continue;
      float value[kRunOfRow];
      reals_of(x[r], value);
      uint32_t word[kRunOfRow];
#pragma unroll
      for (int i = 0; i < kRunOfRow; ++i) word[i] = requantise(value[i], scale[i], zero[i], range);
      store_codes(with.codes + (first + r) * with.cols + column, word);
    }
  });
}

// Every 32nd column: the lanes of a warp are neighbours.
template <class Source>
__global__ void __launch_bounds__(32 * kWarps)
    strided_quantize_kernel(const QuantizeArguments with, const Source source) {
  follow_predecessor();
  const int column = blockIdx.y * (32 * kSingles) + lane_index();
  const int64_t first = int64_t{blockIdx.x} * kRowsOfBlock + threadIdx.x / 32 * kRowsOfThread;
  if (column >= with.cols || first >= with.rows) return;
  const auto inside = [&](int i) { return column + 32 * i < with.cols; };
  float scale[kSingles], zero[kSingles];
  int64_t offset[kSingles];
#pragma unroll
  for (int i = 0; i < kSingles; ++i) {
    const int k = inside(i) ? column + 32 * i : column;
    scale[i] = with.inv_scale[k], zero[i] = kRoundToInteger + int_to_float(with.zero_point[k]);
    offset[i] = source.column(k);
  }
  const CodeRange range = code_range(with.bits);
  with_constant(with.dtype, [&](auto dtype) {
    constexpr Real kDtype = decltype(dtype)::value;
    float x[kRowsOfThread][kSingles];
    auto row = source.row(first);
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r, row.advance()) {
#pragma unroll
      for (int i = 0; i < kSingles; ++i) {
        if (first + r < with.rows) x[r][i] = load_real<kDtype>(with.x, row.start + offset[i]);
      }
    }
#pragma unroll
    for (int r = 0; r < kRowsOfThread; ++r) {
      int8_t* codes = with.codes + (first + r) * with.cols + column;
#pragma unroll
      for (int i = 0; i < kSingles; ++i) {
        if (first + r < with.rows && inside(i)) {
          codes[32 * i] = static_cast<int8_t>(requantise(x[r][i], scale[i], zero[i], range));
        }
      }
    }
  });
}

template <class Source>
void launch(const char* name, const QuantizeArguments& with, const Source& source, bool runs, cudaStream_t stream) {
  const auto refuse_unless = [&](bool holds, const char* what, int64_t got) {
    require(holds, std::string(name) + ": " + what + ", got " + std::to_string(got));
  };
  refuse_unless(0 < with.cols, "cols must be positive", with.cols);
  refuse_unless(2 <= with.bits && with.bits <= 8, "bits must be in 2..8", with.bits);
  const int dtype = static_cast<int>(with.dtype);
  refuse_unless(0 <= dtype && dtype <= 2, "dtype must be in 0..2", dtype);
  if (with.rows == 0) return;
  runs =
      runs && is_aligned(with.x) && is_aligned(with.inv_scale) && is_aligned(with.zero_point) && is_aligned(with.codes);
  const int of_block = 32 * (runs ? kRunOfRow : kSingles);
  const int64_t blocks = (with.rows + kRowsOfBlock - 1) / kRowsOfBlock;
  const int64_t across = (int64_t{with.cols} + of_block - 1) / of_block;
  refuse_unless(blocks < int64_t{1} << 31, "too many rows", with.rows);
  refuse_unless(across < 65536, "too many columns", with.cols);
  const auto kernel = runs ? &quantize_kernel<Source> : &strided_quantize_kernel<Source>;
  VITQ_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks), static_cast<unsigned>(across)), 32 * kWarps, 0, stream, with,
              source);
  check_launch(name);
}

}  // namespace

void quantize(const void* x, int dtype, const float* inv_scale, const int32_t* zero_point, int8_t* codes, int64_t rows,
              int cols, int bits, cudaStream_t stream) {
  launch("quantize", {x, inv_scale, zero_point, codes, rows, cols, bits, static_cast<Real>(dtype)}, Matrix{cols},
         cols % kRunOfRow == 0, stream);
}

void quantize_patches(const void* image, int dtype, const float* inv_scale, const int32_t* zero_point, int8_t* codes,
                      int batch, int channels, int height, int width, int patch_height, int patch_width, int bits,
                      cudaStream_t stream) {
  require(0 < patch_height && patch_height <= height && 0 < patch_width && patch_width <= width,
          "quantize_patches: a patch must fit the image");
  const int down = height / patch_height, across = width / patch_width;
  const int64_t rows = int64_t{batch} * down * across, cols = int64_t{channels} * patch_height * patch_width;
  require(rows < int64_t{1} << 31 && cols < int64_t{1} << 31, "quantize_patches: too many patches, or too large ones");
  launch("quantize_patches",
         {image, inv_scale, zero_point, codes, rows, static_cast<int>(cols), bits, static_cast<Real>(dtype)},
         Patches{channels, height, width, patch_height, patch_width, down, across},
         patch_width % kRunOfRow == 0 && width % kRunOfRow == 0, stream);
}

}  // namespace vitq
