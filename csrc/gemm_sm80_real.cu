#include "gemm_sm80.cuh"

namespace vitq {

VITQ_DEFINE_GEMM(Epilogue::kReal)

}  // namespace vitq
