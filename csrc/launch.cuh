// How a launcher starts a kernel: checked, in as much shared memory as it asks for. The same text in both builds.
//
// On Hopper a kernel's blocks start while those of the kernel in front end (programmatic dependent launch); so every
// kernel calls follow_predecessor() (ptx.cuh) before it touches memory that any other kernel writes.
// tests/test_cuda_pdl.py holds them to it. After a kernel that is not ours, which lets nobody in early, it is an
// ordinary launch.
#pragma once

#include <stdexcept>
#include <string>

#include "early_starts.h"
#include "ptx.cuh"

namespace vitq {

inline void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument("vitq_kernels._cuda: " + message);
}

#ifdef VITQ_EMULATION
template <typename Kernel>
void allow_shared_memory(Kernel*, size_t, const char*) {}
inline void check_launch(const char*) {}
template <typename Kernel>
int count_clusters(Kernel*, int, int, size_t) {
  return 1;  // one after another
}
#else
inline void check(cudaError_t error, const char* kernel) {
  if (error != cudaSuccess) {
    throw std::runtime_error("vitq_kernels._cuda: " + std::string(kernel) + ": " + cudaGetErrorString(error));
  }
}

// Above 48 KiB a kernel must be told; no stream operation, so allowed while a graph is captured.
template <typename Kernel>
void allow_shared_memory(Kernel* kernel, size_t bytes, const char* name) {
  if (bytes <= 48 << 10) return;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)), name);
}

inline void check_launch(const char* kernel) { check(cudaGetLastError(), kernel); }

// Whether the current device runs code that has the wait: that of sm_90a, on the one GPU that takes it. Others run PTX
// of an older architecture, from which it was left out. A driver before 12.3 cannot capture such launches in a graph.
inline bool has_early_starts() {
#ifdef VITQ_HAS_SM90A
  static const bool known_to_driver = [] {
    int version = 0;
    return cudaDriverGetVersion(&version) == cudaSuccess && version >= 12030;
  }();
  int device = 0, major = 0, minor = 0;
  return known_to_driver && cudaGetDevice(&device) == cudaSuccess &&
         cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) == cudaSuccess &&
         cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) == cudaSuccess && major == 9 &&
         minor == 0;
#else
  return false;
#endif
}

// Launches blocks in clusters of `cluster`.
template <class... Parameters, class... Arguments>
void launch_kernel(void (*kernel)(Parameters...), unsigned cluster, dim3 grid, unsigned threads, size_t shared_bytes,
                   cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute attributes[2]{};
  cudaLaunchConfig_t how{};
  how.gridDim = grid, how.blockDim = dim3(threads), how.dynamicSmemBytes = shared_bytes, how.stream = stream;
  how.attrs = attributes;
  if (cluster > 1) {
    attributes[how.numAttrs].id = cudaLaunchAttributeClusterDimension;
    attributes[how.numAttrs++].val.clusterDim = {cluster, 1, 1};
  }
  if (early_starts && has_early_starts()) {
    attributes[how.numAttrs].id = cudaLaunchAttributeProgrammaticStreamSerialization;
    attributes[how.numAttrs++].val.programmaticStreamSerializationAllowed = 1;
  }
  cudaLaunchKernelEx(&how, kernel, arguments...);  // an error is the last one too: check_launch
}

// How many clusters of so many blocks run at once; 0 where the device has none, or does not say.
template <typename Kernel>
int count_clusters(Kernel* kernel, int blocks, int threads, size_t shared_bytes) {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(blocks), 1, 1};
  cudaLaunchConfig_t how{};
  how.gridDim = dim3(blocks), how.blockDim = dim3(threads), how.dynamicSmemBytes = shared_bytes;
  how.attrs = &attribute, how.numAttrs = 1;
  int found = 0;
  const bool known = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                          static_cast<int>(shared_bytes)) == cudaSuccess &&
                     cudaOccupancyMaxActiveClusters(&found, kernel, &how) == cudaSuccess;
  if (!known) cudaGetLastError();  // nothing was launched: the next launch must not be blamed
  return known ? found : 0;
}

// A launch is written once for both builds.
#define VITQ_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  vitq::launch_kernel(kernel, 1, grid, threads, shared_bytes, stream, __VA_ARGS__)
#define VITQ_LAUNCH_CLUSTERS(kernel, cluster, grid, threads, shared_bytes, stream, ...) \
  vitq::launch_kernel(kernel, cluster, grid, threads, shared_bytes, stream, __VA_ARGS__)
#endif

}  // namespace vitq
