// The tensor map of a matrix of codes, and how many SMs there are: what a launch on Hopper asks of the driver.
#pragma once

#ifndef VITQ_EMULATION
#include <cudaTypedefs.h>
#endif

#include "launch.cuh"
#include "ptx_sm90.cuh"

namespace vitq {

// a int8 [rows, columns], rows `stride` bytes apart, 16-byte aligned, in boxes of box_columns (128) x box_rows.
#ifdef VITQ_EMULATION
inline TensorMap token_map(const int8_t* a, int columns, int rows, int64_t stride, int box_columns, int box_rows) {
  return {reinterpret_cast<const unsigned char*>(a), stride, columns, rows, box_columns, box_rows};
}

// Few, so that a block takes several tiles.
inline int sm_count() { return 3; }
#else
// The driver's function, found at run time: the extension does not link libcuda, so that it loads without a driver.
inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto found = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult status{};
#if CUDART_VERSION < 12050
    check(cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &function, cudaEnableDefault, &status), "tensor maps");
#else
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status),
          "tensor maps");
#endif
    require(status == cudaDriverEntryPointSuccess, "the driver has no tensor maps");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
  }();
  return found;
}

inline TensorMap token_map(const int8_t* a, int columns, int rows, int64_t stride, int box_columns, int box_rows) {
  TensorMap map;
  const cuuint64_t sizes[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[1] = {static_cast<cuuint64_t>(stride)};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t every[2] = {1, 1};
  const CUresult result =
      tensor_map_encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, 2, const_cast<int8_t*>(a), sizes, strides, box, every,
                           CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                           CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  require(result == CUDA_SUCCESS, "cuTensorMapEncodeTiled returned " + std::to_string(result));
  return map;
}

inline int sm_count() {
  int device = 0, count = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}
#endif

}  // namespace vitq
