#include "gemm_sm90.cuh"

namespace vitq {

VITQ_DEFINE_WGMMA(Epilogue::kPartial)

}  // namespace vitq
