#include "gemm_sm90.cuh"

namespace vitq {

VITQ_DEFINE_WGMMA_LAUNCH(Epilogue::kNorm)

int clusters_at_once(int blocks) {
  using T = AllRows<WgmmaTile<64, 4, 1>>;  // an SM to itself, as every tile
  return count_clusters(&wgmma_kernel<Epilogue::kNorm, T>, blocks, T::kThreads, wgmma_shared_bytes<T>(8));
}

}  // namespace vitq
