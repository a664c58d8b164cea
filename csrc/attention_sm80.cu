// Log2-quantized softmax attention of whole images, and the launcher of both forms. Kernel: attention_sm80.cuh.

#include "attention_sm80.cuh"

namespace vitq {
namespace {

constexpr int kMostKeys = 4096;  // o fits int32

template <int kSteps, int kTiles>
__global__ void __launch_bounds__(kThreads) attention_kernel(const AttentionArguments with) {
  follow_predecessor();
  Attention<kSteps, kTiles, false>(with).run();
}

template <int kSteps>
void launch_dim(const AttentionArguments& with, int batch, cudaStream_t stream) {
  with_tiles(with.sequence, [&](auto tiles) {
    constexpr int kTiles = decltype(tiles)::value;
    launch_attention<Attention<kSteps, kTiles, false>::kSharedBytes>(&attention_kernel<kSteps, kTiles>, with, batch,
                                                                     stream);
  });
}

}  // namespace

void attention(AttentionOperand q, AttentionOperand k, AttentionOperand v, const float* kappa, const uint8_t* levels,
               int level_count, const float* multiplier, const int32_t* zero_point, AttentionBias bias_q,
               const float* inv_tau, AttentionWindows windows, int8_t* out, int batch, int heads, int sequence, int dim,
               int padded_dim, int bits, cudaStream_t stream) {
  require(0 < dim && dim <= padded_dim && padded_dim <= 128 && padded_dim % 16 == 0,
          "attention: dim must be in 1..padded_dim, which is a multiple of 16 up to 128, got " + std::to_string(dim) +
              " and " + std::to_string(padded_dim));
  require(sequence <= kMostKeys, "attention: sequence must be at most 4096, got " + std::to_string(sequence));
  require(0 < level_count && level_count <= kTableBytes,
          "attention: level_count must be in 1..256, got " + std::to_string(level_count));
  for (const AttentionOperand& operand : {q, k, v}) {
    require((reinterpret_cast<uintptr_t>(operand.data) | operand.batch | operand.head | operand.position) % 16 == 0,
            "attention: q, k and v must be aligned to 16 bytes");
  }
  require(windows.tokens == nullptr || padded_dim <= kMostWindowDim,
          "attention: inside windows padded_dim must be at most 64, got " + std::to_string(padded_dim));
  if (batch == 0 || heads == 0 || sequence == 0) return;
  const AttentionArguments with{q,       k,       v,   kappa, levels,   level_count, multiplier, zero_point, bias_q,
                                inv_tau, windows, out, heads, sequence, dim,         padded_dim, bits};
  if (windows.tokens != nullptr) return attention_windows(with, batch, stream);
  switch ((padded_dim + 31) / 32) {
    case 1:
      return launch_dim<1>(with, batch, stream);
    case 2:
      return launch_dim<2>(with, batch, stream);
    case 3:
      return launch_dim<3>(with, batch, stream);
    case 4:
      return launch_dim<4>(with, batch, stream);
  }
}

}  // namespace vitq
