#include "gemm_sm90.cuh"

namespace vitq {

VITQ_DEFINE_WGMMA_LAUNCH(Epilogue::kNorm)

}  // namespace vitq
