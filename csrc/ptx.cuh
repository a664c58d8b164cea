// One instruction per function: everything the kernels need that C++ does not say. PTX ISA 9.0 sections are cited.
//
// In the emulation (VITQ_EMULATION) the same functions come from emulation/ptx.h, computed from the same definitions;
// so a kernel's source is one text in both builds, and no other file holds assembly.
#pragma once

#include <cstddef>
#include <cstdint>

#ifdef VITQ_EMULATION
#include "emulation/ptx.h"
#else

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

namespace vitq {

__device__ __forceinline__ unsigned lane_index() { return threadIdx.x & 31; }

// The same in all lanes, and known to be: what depends on it stays free of divergence.
__device__ __forceinline__ int warp_index() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x / 32), 0); }

// 9.7.13.14 griddepcontrol, of Hopper and later: until every kernel in front of this one has completed and what it
// wrote is visible; then the next kernel's blocks may start, and wait here in their turn. Nothing that another kernel
// writes may be read before, and nothing written that another reads (launch.cuh). Because the next kernel is let in
// only after the wait, what it finds before its own is complete, but for what this kernel writes.
__device__ __forceinline__ void follow_predecessor() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait; griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// 9.7.13.1 barrier.sync: all warps of the block, whose memory accesses before it are then visible. What __syncthreads()
// compiles to, but warps may meet it in different places of the code: those of a tile decode different widths.
#define VITQ_BARRIER() asm volatile("barrier.sync.aligned 0;" ::: "memory")

__device__ __forceinline__ void sync_warp() { __syncwarp(); }

// Keeps the compiler from computing a word again behind this place to spare a register.
__device__ __forceinline__ void hold(int& word) { asm volatile("" : "+r"(word)); }

// The block's dynamic shared memory, aligned for every access.
__device__ __forceinline__ unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char vitq_shared[];
  return vitq_shared;
}

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}

// 9.7.9.25.3.1 cp.async: 16 bytes, through L2 alone; the bytes from `valid` on are zeros and are not read.
__device__ __forceinline__ void copy_async_16(void* shared, const void* global, unsigned valid = 16) {
  asm volatile("cp.async.cg.shared.global.L2::128B [%0], [%1], 16, %2;" ::"r"(shared_address(shared)), "l"(global),
               "r"(valid)
               : "memory");
}

// 9.7.9.25.3.2 cp.async.commit_group: the copies since the last one form a group.
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// 9.7.9.25.3.3 cp.async.wait_group: until at most kPending of this thread's latest groups are under way.
template <int kPending>
__device__ __forceinline__ void wait_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// 9.7.14.5.15 ldmatrix: four matrices of 8 rows of 16 bytes; lane i gives the address of row i % 8 of matrix i / 8 and
// gets, of matrix j in fragment[j], bytes 4 (i % 4) .. + 3 of row i / 4.
__device__ __forceinline__ void load_matrices(uint32_t (&fragment)[4], const void* shared_row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(fragment[0]), "=r"(fragment[1]), "=r"(fragment[2]), "=r"(fragment[3])
               : "r"(shared_address(shared_row))
               : "memory");
}

// 9.7.14.5.14 mma: d += a * b. a is 16 x 32 of 8 bits (lane i: rows i / 4 and + 8, columns 4 (i % 4) .. + 3 and + 16),
// b 32 x 8 (rows 4 (i % 4) .. + 3 and + 16, column i / 4), d 16 x 8 (rows as a, columns 2 (i % 4) and + 1).
__device__ __forceinline__ void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same with unsigned a.
__device__ __forceinline__ void mma_u8_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// The same on 4 bits: a 16 x 64, b 64 x 8, columns and rows 8 (i % 4) .. + 7 and + 32, the first in the lowest bits.
// One instruction on sm_80, 86 and 89; later GPUs emulate it in hundreds (kernels.md 0.2) and must not be given it.
__device__ __forceinline__ void mma_s4(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm("mma.sync.aligned.m16n8k64.row.col.s32.s4.s4.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// 9.7.9.6 shfl.sync.bfly: the value of the lane whose index differs in `mask`.
template <typename T>
__device__ __forceinline__ T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(0xffffffffu, value, mask);
}

// 9.7.9.7 prmt: four bytes of {b, a}, byte i chosen by bits 4i .. 4i + 2 of the selector; bit 4i + 3 spreads its sign.
__device__ __forceinline__ uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

// 9.7.1.24 dp4a: c plus the products of the four bytes, all unsigned.
__device__ __forceinline__ uint32_t dot_u8(uint32_t a, uint32_t b, uint32_t c) { return __dp4a(a, b, c); }

// a / b within 2 ulp, where a bounded op needs no more: a tenth of the instructions of the exact one.
__device__ __forceinline__ float divide_approximately(float a, float b) { return __fdividef(a, b); }

// 9.7.3.21 ex2.approx.ftz: 2^x within 2 ulp; 0 and infinity beyond the exponents.
__device__ __forceinline__ float exp2_approximately(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The bits of a float and back; conversions round to nearest even.
__device__ __forceinline__ uint32_t float_bits(float x) { return __float_as_uint(x); }
__device__ __forceinline__ float bits_float(uint32_t x) { return __uint_as_float(x); }
__device__ __forceinline__ uint64_t double_bits(double x) { return static_cast<uint64_t>(__double_as_longlong(x)); }
__device__ __forceinline__ double bits_double(uint64_t x) { return __longlong_as_double(static_cast<long long>(x)); }
__device__ __forceinline__ float int_to_float(int32_t x) { return __int2float_rn(x); }
__device__ __forceinline__ float half_to_float(uint16_t x) { return __half2float(__ushort_as_half(x)); }
__device__ __forceinline__ uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
__device__ __forceinline__ float bfloat16_to_float(uint16_t x) { return __uint_as_float(uint32_t{x} << 16); }
__device__ __forceinline__ uint16_t float_to_bfloat16(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }

}  // namespace vitq

#endif  // VITQ_EMULATION
