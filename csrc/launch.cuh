// How a launcher starts a kernel: checked, in as much shared memory as it asks for. The same text in both builds.
#pragma once

#include <stdexcept>
#include <string>

#include "ptx.cuh"

namespace vitq {

inline void require(bool holds, const std::string& message) {
  if (!holds) throw std::invalid_argument("vitq_kernels._cuda: " + message);
}

#ifdef VITQ_EMULATION
template <typename Kernel>
void allow_shared_memory(Kernel*, size_t, const char*) {}
inline void check_launch(const char*) {}
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
#endif

}  // namespace vitq
