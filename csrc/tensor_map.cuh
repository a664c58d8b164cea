// Tensor maps of codes, and how many SMs there are: what a launch on Hopper asks of the driver.
#pragma once

#ifndef VITQ_EMULATION
#include <cudaTypedefs.h>
#endif

#include <algorithm>
#include <array>

#include "launch.cuh"
#include "launchers.h"
#include "ptx_sm90.cuh"

namespace vitq {

// Of int8 [..., sizes[1], sizes[0]] with `strides` bytes from one to the next of each dimension but the last
// (strides[0] is of sizes[1]), all multiples of 16 as the first byte's address, in boxes of box_columns (32, 64, 128) x
// box_rows.
template <size_t kRank>
using TensorSizes = std::array<int, kRank>;
template <size_t kRank>
using TensorStrides = std::array<int64_t, kRank - 1>;
#ifdef VITQ_EMULATION
template <size_t kRank>
TensorMap tensor_map(const int8_t* data, const TensorSizes<kRank>& sizes, const TensorStrides<kRank>& strides,
                     int box_columns, int box_rows) {
  TensorMap map{reinterpret_cast<const unsigned char*>(data), {1, 1, 1, 1}, {}, box_columns, box_rows};
  std::copy(sizes.begin(), sizes.end(), map.sizes.begin());
  std::copy(strides.begin(), strides.end(), map.strides.begin());
  return map;
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

template <size_t kRank>
TensorMap tensor_map(const int8_t* data, const TensorSizes<kRank>& sizes, const TensorStrides<kRank>& strides,
                     int box_columns, int box_rows) {
  cuuint64_t whole[kRank], apart[kRank - 1];
  cuuint32_t box[kRank], every[kRank];
  std::copy(sizes.begin(), sizes.end(), whole);
  std::copy(strides.begin(), strides.end(), apart);
  std::fill_n(box, kRank, 1), std::fill_n(every, kRank, 1);
  box[0] = static_cast<cuuint32_t>(box_columns), box[1] = static_cast<cuuint32_t>(box_rows);
  const CUtensorMapSwizzle swizzle = box_columns == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                                     : box_columns == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                                                         : CU_TENSOR_MAP_SWIZZLE_32B;
  TensorMap map;
  const CUresult result = tensor_map_encoder()(&map, CU_TENSOR_MAP_DATA_TYPE_UINT8, kRank, const_cast<int8_t*>(data),
                                               whole, apart, box, every, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
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

// a int8 [rows, columns], rows `stride` bytes apart.
inline TensorMap token_map(const int8_t* a, int columns, int rows, int64_t stride, int box_columns, int box_rows) {
  return tensor_map<2>(a, {columns, rows}, {stride}, box_columns, box_rows);
}

// Codes of all heads of all images, int8 [batch, heads, sequence, dim].
inline TensorMap head_map(const AttentionOperand& codes, int dim, int sequence, int heads, int batch, int box_columns,
                          int box_rows) {
  return tensor_map<4>(codes.data, {dim, sequence, heads, batch}, {codes.position, codes.head, codes.batch},
                       box_columns, box_rows);
}

}  // namespace vitq
