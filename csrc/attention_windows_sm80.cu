// Log2-quantized softmax attention inside windows. Kernel: attention_sm80.cuh.
//
// Work split  A block has 64 places of a window of an image, for one head; heads are innermost: their rows lie side by
//             side in memory, and those of a token share its lines.

#include "attention_sm80.cuh"

namespace vitq {
namespace {

template <int kSteps, int kTiles>
__global__ void __launch_bounds__(kThreads) window_attention_kernel(const AttentionArguments with) {
  follow_predecessor();
  Attention<kSteps, kTiles, true>(with).run();
}

template <int kSteps>
void launch_dim(const AttentionArguments& with, int batch, cudaStream_t stream) {
  with_tiles(with.sequence, [&](auto tiles) {
    constexpr int kTiles = decltype(tiles)::value;
    launch_attention<Attention<kSteps, kTiles, true>::kSharedBytes>(&window_attention_kernel<kSteps, kTiles>, with,
                                                                    int64_t{batch} * with.windows.count, stream);
  });
}

}  // namespace

void attention_windows(const AttentionArguments& with, int batch, cudaStream_t stream) {
  static_assert(kMostWindowDim == 64, "two steps of 32 channels");
  if (with.padded_dim <= 32) return launch_dim<1>(with, batch, stream);
  launch_dim<2>(with, batch, stream);
}

}  // namespace vitq
