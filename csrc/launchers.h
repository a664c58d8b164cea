// The launchers, torch-free: raw pointers to memory of the current device, sizes, and the stream to run on. They check
// what a wrong call could break and the launch itself, allocate nothing, and are what bindings.cpp shows to Python;
// shapes and dtypes were checked there (vitq_kernels/ops). The numbers are those of vitq_kernels/ops/reference.py.
#pragma once

#include <cstdint>

#ifdef VITQ_EMULATION
#include "emulation/execution.h"
#else
#include <cuda_runtime.h>
#endif

namespace vitq {

// dtype: 0 float32, 1 float16, 2 bfloat16 (Real of semantics.cuh).

// x [rows, cols] to codes int8 [rows, cols]; inv_scale float32 [cols], zero_point int32 [cols].
void quantize(const void* x, int dtype, const float* inv_scale, const int32_t* zero_point, int8_t* codes, int64_t rows,
              int cols, int bits, cudaStream_t stream);

// image [batch, channels, height, width], contiguous, to codes of its patches, int8 [batch, height / patch_height,
// width / patch_width, channels * patch_height * patch_width]; inv_scale, zero_point of that last size.
void quantize_patches(const void* image, int dtype, const float* inv_scale, const int32_t* zero_point, int8_t* codes,
                      int batch, int channels, int height, int width, int patch_height, int patch_width, int bits,
                      cudaStream_t stream);

// x [rows, cols] to codes int8 [rows, cols] and scale float32 [rows].
void quantize_per_token(const void* x, int dtype, int8_t* codes, float* scale, int64_t rows, int cols,
                        cudaStream_t stream);

// x [rows, cols] (+ residual, written to y in x's dtype, where residual is not null) to codes int8 [rows, cols]; gain,
// offset float32 [cols]. Where scale float32 [rows] is not null, codes and scales of a token; then bits is 8.
void layernorm(const void* x, int dtype, const void* residual, void* y, const float* gain, const float* offset,
               int8_t* codes, float* scale, int64_t rows, int cols, float eps, int bits, cudaStream_t stream);

// q, k, v int8 [batch, heads, sequence, padded_dim] by strides in bytes of batch, head and position (channels
// contiguous, zero from dim on; all multiples of 16) to codes int8 [batch, sequence, heads * dim], contiguous. kappa
// float32 [heads], levels uint8 [heads, level_count], multiplier float32 [heads, dim], zero_point int32 [heads, dim];
// bias_q int32 by strides in elements of batch, head, query and key (0 where it broadcasts), or null; inv_tau float32
// [heads], or null. With windows a sequence is one of them, the tokens of an image are count * sequence, and the batch
// of bias_q is the patterns.
struct AttentionOperand {
  const int8_t* data;
  int64_t batch, head, position;
};
struct AttentionBias {
  const int32_t* data;
  int64_t batch, head, query, key;
};
struct AttentionWindows {
  const int32_t* tokens;   // [count, sequence], the token at each place; null: a sequence is an image
  const int32_t* pattern;  // [count], the bias that a window takes; null: the first
  int count;
};
void attention(AttentionOperand q, AttentionOperand k, AttentionOperand v, const float* kappa, const uint8_t* levels,
               int level_count, const float* multiplier, const int32_t* zero_point, AttentionBias bias_q,
               const float* inv_tau, AttentionWindows windows, int8_t* out, int batch, int heads, int sequence, int dim,
               int padded_dim, int bits, cudaStream_t stream);

// The same on wgmma (attention_sm90.cu, for sm_90a alone), without bias and inv_tau, for the dims and lengths that it
// takes; multiplier and zero_point lie at multiples of 16 bytes.
bool attention_sm90_takes(int sequence, int dim);
void attention_sm90(AttentionOperand q, AttentionOperand k, AttentionOperand v, const float* kappa,
                    const uint8_t* levels, int level_count, const float* multiplier, const int32_t* zero_point,
                    int8_t* out, int batch, int heads, int sequence, int dim, int bits, cudaStream_t stream);

// What follows the sum of a linear layer.
enum class Epilogue : int {
  kCodes = 0,    // codes of a static scale
  kGelu = 1,     // GELU, then codes or levels
  kReal = 2,     // real units; with a residual; with a scale a token
  kPartial = 3,  // the sum itself, where it is one part of several
  kNorm = 4,     // real units with a residual, and codes of their rows' LayerNorm; on wgmma alone
};

// What the epilogues read: vectors over the N rows unless another size is given; null where unused.
struct EpilogueArguments {
  const float* multiplier;
  const int32_t* bias_q;      // kReal with token_scale: the bits of float32, or null
  const int32_t* zero_point;  // codes
  const float* inv_scale;     // kGelu
  const float* thresholds;    // [level_count - 1], ascending
  const int8_t* levels;       // [level_count]; null: codes
  const void* residual;       // [residual_rows, N] in the output's dtype: token t adds row t % residual_rows
  const float* token_scale;   // [tokens]
  int level_count, residual_rows;
  int bits;                    // of the codes
  bool tanh_form;              // of GELU
  int real_dtype;              // of the output, as Real
  const float *gain, *offset;  // kNorm
  float eps;
  int8_t* codes;  // [tokens, N]
};

// A weight in the layout of vitq_kernels/ops/mma_fragments.py.
struct LinearWeight {
  const uint8_t* chunks;
  const int32_t* groups;  // [group_count, 2]: bits of the four quarters, a byte each, and the offset in chunks
  const int32_t* order;   // [64 * group_count]: model row of each stored row, of the same 64; null: the same
  int group_count, steps, widest;
  bool settled;  // what wrote chunks and groups had completed before the kernel in front of this one began
};

// One row of the table of tiles.
struct GemmTile {
  int rows, tokens, threads, stages, blocks;
  bool wgmma;   // for sm_90a alone
  int cluster;  // blocks that share tokens
};
constexpr int kGemmTiles = 10;
GemmTile gemm_tile(int index);
// Bytes of shared memory of a block; staged: its outputs are (is_staged of gemm_tiles.cuh).
int gemm_shared_bytes(int index, int widest, bool staged, Epilogue kind);

// How many clusters of so many blocks of wgmma the current device runs at once; 0 where it has none, or does not say.
int clusters_at_once(int blocks);

// a int8 [tokens, columns], rows `a_stride` bytes apart, both multiples of 16 and zero beyond K, to out [tokens, rows].
// parts > 1: of K. On wgmma, where they are 2 or 4, one kernel adds them; else partial int32 [parts, tokens, rows]
// receives their sums, which a second one adds. native4: a holds codes of 4 bits, the weight no rows above 4, and the
// GPU is an sm_80, 86 or 89. kNorm: a tile of wgmma of at most kMostNormTokens (more outputs do not fit the registers),
// one part, rows a multiple of 8 and at most kMostNormRows (a cluster has up to 8 blocks), multiplier, bias_q and
// residual given, and these, out, gain, offset and codes at multiples of 16 bytes.
constexpr int kMostNormTokens = 192, kMostNormRows = 1024;
constexpr int kMostNormTiles = 65535;  // of tokens: grid.y
void linear(const int8_t* a, int64_t a_stride, LinearWeight weight, int tokens, int rows, int columns,
            EpilogueArguments epilogue, int kind, int tile, bool native4, int parts, int32_t* partial, void* out,
            cudaStream_t stream);

}  // namespace vitq
