// Codes of real activations and of images, with a static scale a channel.
//
// Computes    code = clamp(rint(x * inv_scale[k] + zero_point[k])), S1.
// Layouts     x [rows, cols]; or an image [B, C, H, W], whose patches are rows of C * ph * pw columns in the order of a
//             convolution's weight; codes int8 [rows, cols].
// Work split  A thread takes 8 columns, whose vectors it loads once, of kRowsOfThread rows; a warp 256 columns, a block
//             4 warps on neighbouring rows.
// Requires    Nothing. 16-byte loads where 8 columns are neighbours in memory and aligned.
// Exactness   Exact.
// Source      reference.quantize, reference.quantize_patches.

#include "launch.cuh"
#include "launchers.h"
#include "rows.cuh"

namespace vitq {
namespace {

constexpr int kWarps = 4, kRowsOfThread = 4, kRowsOfBlock = kWarps * kRowsOfThread;
constexpr int kColumnsOfBlock = 32 * kRunOfRow;

// Where rows and columns lie: of a matrix, or of the patches of an image.
struct Matrix {
  int cols;
  __device__ __forceinline__ int64_t row(int64_t r) const { return r * cols; }
  __device__ __forceinline__ int64_t column(int c) const { return c; }
};
struct Patches {
  int channels, height, width, patch_height, patch_width;
  __device__ __forceinline__ int64_t row(int64_t r) const {
    const int across = width / patch_width, down = height / patch_height;
    const int64_t line = r / across;
    const int64_t image = line / down;
    return (image * channels * height + line % down * patch_height) * width + r % across * patch_width;
  }
  __device__ __forceinline__ int64_t column(int c) const {
    const int area = patch_height * patch_width;
    return (int64_t{c / area} * height + c % area / patch_width) * width + c % patch_width;
  }
};

template <class Source>
__global__ void __launch_bounds__(32 * kWarps)
    quantize_kernel(const void* x, Real dtype, const float* inv_scale, const int32_t* zero_point, int8_t* codes,
                    int64_t rows, int cols, int bits, Source source, bool vector_in, bool vector_out) {
  const int column = (blockIdx.y * 32 + lane_index()) * kRunOfRow, count = cols - column;
  if (count <= 0) return;
  float scale[kRunOfRow], zero[kRunOfRow];
  int64_t offset[kRunOfRow];
#pragma unroll
  for (int i = 0; i < kRunOfRow; ++i) {
    const int k = i < count ? column + i : column;
    scale[i] = inv_scale[k], zero[i] = kRoundToInteger + static_cast<float>(zero_point[k]),
    offset[i] = source.column(k);
  }
  const CodeRange range = code_range(bits);
  const int64_t first = int64_t{blockIdx.x} * kRowsOfBlock + threadIdx.x / 32;
#pragma unroll
  for (int r = 0; r < kRowsOfThread; ++r) {
    const int64_t row = first + r * kWarps;
    if (row >= rows) return;
    const int64_t start = source.row(row);
    float value[kRunOfRow];
    if (vector_in) {
      load_reals(x, start + offset[0], count, dtype, true, value);
    } else {
#pragma unroll
      for (int i = 0; i < kRunOfRow; ++i) {
        const int64_t at = start + offset[i];
        value[i] = dtype == Real::kFloat32 ? static_cast<const float*>(x)[at]
                                           : real_from_16(static_cast<const uint16_t*>(x)[at], dtype);
      }
    }
    uint32_t word[kRunOfRow];
#pragma unroll
    for (int i = 0; i < kRunOfRow; ++i) word[i] = requantise(value[i], scale[i], zero[i], range);
    store_codes(codes + row * cols + column, count, vector_out, word);
  }
}

template <class Source>
void launch(const char* name, const void* x, int dtype, const float* inv_scale, const int32_t* zero_point,
            int8_t* codes, int64_t rows, int cols, int bits, const Source& source, bool vector_in,
            cudaStream_t stream) {
  require(cols > 0, std::string(name) + ": columns must be positive, got " + std::to_string(cols));
  require(2 <= bits && bits <= 8, std::string(name) + ": bits must be in 2..8, got " + std::to_string(bits));
  if (rows == 0) return;
  const int64_t blocks = (rows + kRowsOfBlock - 1) / kRowsOfBlock;
  const int across = (cols + kColumnsOfBlock - 1) / kColumnsOfBlock;
  require(blocks < int64_t{1} << 31 && across < 65536, std::string(name) + ": too many rows or columns");
  const bool vector_out = cols % kRunOfRow == 0 && is_aligned(codes);
  const auto kernel = &quantize_kernel<Source>;
  VITQ_LAUNCH(kernel, dim3(static_cast<unsigned>(blocks), across), 32 * kWarps, 0, stream, x, static_cast<Real>(dtype),
              inv_scale, zero_point, codes, rows, cols, bits, source, vector_in, vector_out);
  check_launch(name);
}

}  // namespace

void quantize(const void* x, int dtype, const float* inv_scale, const int32_t* zero_point, int8_t* codes, int64_t rows,
              int cols, int bits, cudaStream_t stream) {
  const bool vector_in = cols % kRunOfRow == 0 && is_aligned(x);
  launch("quantize", x, dtype, inv_scale, zero_point, codes, rows, cols, bits, Matrix{cols}, vector_in, stream);
}

void quantize_patches(const void* image, int dtype, const float* inv_scale, const int32_t* zero_point, int8_t* codes,
                      int batch, int channels, int height, int width, int patch_height, int patch_width, int bits,
                      cudaStream_t stream) {
  require(0 < patch_height && patch_height <= height && 0 < patch_width && patch_width <= width,
          "quantize_patches: a patch must fit the image");
  const bool vector_in = patch_width % kRunOfRow == 0 && width % kRunOfRow == 0 && is_aligned(image);
  const int64_t rows = int64_t{batch} * (height / patch_height) * (width / patch_width);
  launch("quantize_patches", image, dtype, inv_scale, zero_point, codes, rows, channels * patch_height * patch_width,
         bits, Patches{channels, height, width, patch_height, patch_width}, vector_in, stream);
}

}  // namespace vitq
