// The instructions of Hopper (sm_90a), one per function, as ptx.cuh has those of all GPUs. PTX ISA 9.0 sections.
// In the emulation the same functions come from emulation/ptx_sm90.h.
#pragma once

#include "ptx.cuh"

#ifdef VITQ_EMULATION
#include "emulation/ptx_sm90.h"
#else

#include <cuda.h>

namespace vitq {

// A matrix of bytes in global memory, as the copies of boxes see it; made by token_map (tensor_map.cuh).
using TensorMap = CUtensorMap;
#define VITQ_TENSOR_MAP const __grid_constant__ vitq::TensorMap

// A launch of blocks in clusters.
template <class... Parameters, class... Arguments>
void launch_clusters(void (*kernel)(Parameters...), unsigned cluster, dim3 grid, unsigned threads, size_t shared_bytes,
                     cudaStream_t stream, const Arguments&... arguments) {
  cudaLaunchAttribute size{};
  size.id = cudaLaunchAttributeClusterDimension;
  size.val.clusterDim = {cluster, 1, 1};
  cudaLaunchConfig_t how{};
  how.gridDim = grid, how.blockDim = dim3(threads), how.dynamicSmemBytes = shared_bytes, how.stream = stream;
  how.attrs = &size, how.numAttrs = 1;
  cudaLaunchKernelEx(&how, kernel, arguments...);  // an error is the last one too: check_launch
}
#define VITQ_LAUNCH_CLUSTERS(kernel, cluster, grid, threads, shared_bytes, stream, ...) \
  vitq::launch_clusters(kernel, cluster, grid, threads, shared_bytes, stream, __VA_ARGS__)

// 9.7.13.15 mbarrier: a phase is complete when all arrivals have come and all bytes that they announced.
__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}

// 9.7.13.4 fence: initialised barriers are visible to the copies, which are of the async proxy.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

// Announces the bytes of this phase and arrives.
__device__ __forceinline__ void mbarrier_expect(uint64_t* barrier, unsigned bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}

// Until the phase of this parity is complete; the first phase has parity 0.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  asm volatile("{.reg .pred p; again: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra again;}" ::"r"(
                   shared_address(barrier)),
               "r"(parity)
               : "memory");
}
#define VITQ_WAIT(barrier, parity) vitq::mbarrier_wait(barrier, parity)
// The same where nothing but time depends on it.
__device__ __forceinline__ void delay_until(uint64_t* barrier, unsigned parity) { mbarrier_wait(barrier, parity); }

// Which block of its cluster this one is.
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

// 9.7.13.3 barrier.cluster: all threads of the cluster, whose memory accesses before it are then visible.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release; barrier.cluster.wait.acquire;" ::: "memory");
}
#define VITQ_CLUSTER_BARRIER() vitq::cluster_barrier()

// 9.7.9.23 mapa: the same place in the shared memory of a block of the cluster; 9.7.9.8 ld: eight bytes of it, further on.
using ClusterPointer = uint32_t;
__device__ __forceinline__ ClusterPointer place_in_block(const void* shared, unsigned rank) {
  ClusterPointer there;
  asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(shared_address(shared)), "r"(rank));
  return there;
}
__device__ __forceinline__ uint2 load_there(ClusterPointer there, int further) {
  uint2 words;
  asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];"
               : "=r"(words.x), "=r"(words.y)
               : "r"(there + static_cast<uint32_t>(further))
               : "memory");
  return words;
}

// Arrives at the same barrier of another block of the cluster, or of this one.
__device__ __forceinline__ void mbarrier_arrive_at(uint64_t* barrier, unsigned rank) {
  asm volatile(
      "{.reg .b32 there; mapa.shared::cluster.u32 there, %0, %1; "
      "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [there];}" ::"r"(shared_address(barrier)),
      "r"(rank)
      : "memory");
}

// 9.7.13.1 barrier.sync of `threads` threads of the block. The number, 1 or 2, stands in the instruction: one in a
// register would reserve all 16.
__device__ __forceinline__ void named_barrier(int number, int threads) {
  if (number == 1) {
    asm volatile("barrier.sync.aligned 1, %0;" ::"r"(threads) : "memory");
  } else {
    asm volatile("barrier.sync.aligned 2, %0;" ::"r"(threads) : "memory");
  }
}
#define VITQ_NAMED_BARRIER(number, threads) vitq::named_barrier(number, threads)

// 9.7.9.25.4.1 cp.async.bulk: a multiple of 16 bytes, which complete at the barrier.
__device__ __forceinline__ void copy_bulk(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

// 9.7.9.25.5.2 cp.async.bulk.tensor: the map's box whose first byte is `column` of `row`; zeros beyond the matrix, which
// count as bytes too. Rows lie in lines of 128 bytes whose 16-byte chunks are swizzled: chunk c of line l at c ^ l % 8.
__device__ __forceinline__ void copy_box(void* shared, const TensorMap& map, int column, int row, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(shared_address(shared)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier))
      : "memory");
}

// The same into the blocks of a mask, at the same place in each, completed at the same barrier of each.
__device__ __forceinline__ void copy_box(void* shared, const TensorMap& map, int column, int row, uint64_t* barrier,
                                         unsigned blocks) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(column), "r"(row), "r"(shared_address(barrier)), "h"(static_cast<uint16_t>(blocks))
      : "memory");
}

// 9.7.19.5 setmaxnreg: every warp of a warpgroup gives registers back, or takes them, until each thread has so many.
template <int kRegisters>
__device__ __forceinline__ void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <int kRegisters>
__device__ __forceinline__ void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// 9.7.15.5.1.2.2 The descriptor of a matrix of bytes in lines of 128, swizzled as copy_box does, rows of 8 lines 1024
// bytes apart: its lower word; the upper one is the same for all. The next 32 columns are 32 bytes further.
using MatrixDescriptor = uint32_t;
__device__ __forceinline__ MatrixDescriptor matrix_descriptor(const void* shared) {
  return 1u << 16 | (shared_address(shared) & 0x3ffff) >> 4;
}
__device__ __forceinline__ MatrixDescriptor columns_further(MatrixDescriptor descriptor, int columns) {
  return descriptor + static_cast<uint32_t>(columns >> 4);
}
__device__ __forceinline__ uint64_t whole_descriptor(MatrixDescriptor lower) {
  return uint64_t{1u << 30 | 1024 >> 4} << 32 | lower;
}

// 9.7.15.6 wgmma.fence, commit_group, wait_group. The fence comes between writing registers and their wgmma.
__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int kPending>
__device__ __forceinline__ void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Keeps the compiler from moving what writes or reads these registers across this place: it does not see that a wgmma
// under way still uses them.
template <int kCount, typename Word>
__device__ __forceinline__ void hold(Word (&registers)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+r"(registers[i])::"memory");
}

// 9.7.15.5 wgmma: d += a * b of a warpgroup. a is 64 x 32 of 8 bits, warp w's 16 rows as mma_s8 has them; b kTokens x
// 32 in shared memory; d 64 x kTokens: of a warp's rows lane / 4 and + 8, columns 8 i + 2 (lane % 4) and + 1, at
// d[4 i + 2 h + c].
template <int kTokens>
__device__ __forceinline__ void wgmma_s8(int32_t (&d)[kTokens / 2], const uint32_t (&a)[4], MatrixDescriptor b);

#define VITQ_D8(i)                                                                                            \
  "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), \
      "+r"(d[i + 7])

// clang-format off
template <>
__device__ __forceinline__ void wgmma_s8<64>(int32_t (&d)[32], const uint32_t (&a)[4], MatrixDescriptor b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n64k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
      "}, {%32, %33, %34, %35}, %36, 1;"
      : VITQ_D8(0), VITQ_D8(8), VITQ_D8(16), VITQ_D8(24)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(whole_descriptor(b)));
}

template <>
__device__ __forceinline__ void wgmma_s8<128>(int32_t (&d)[64], const uint32_t (&a)[4], MatrixDescriptor b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, {%64, %65, %66, %67}, %68, 1;"
      : VITQ_D8(0), VITQ_D8(8), VITQ_D8(16), VITQ_D8(24), VITQ_D8(32), VITQ_D8(40), VITQ_D8(48), VITQ_D8(56)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(whole_descriptor(b)));
}

template <>
__device__ __forceinline__ void wgmma_s8<256>(int32_t (&d)[128], const uint32_t (&a)[4], MatrixDescriptor b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n256k32.s32.s8.s8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, "
      "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "
      "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "
      "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111, "
      "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
      "}, {%128, %129, %130, %131}, %132, 1;"
      : VITQ_D8(0), VITQ_D8(8), VITQ_D8(16), VITQ_D8(24), VITQ_D8(32), VITQ_D8(40), VITQ_D8(48), VITQ_D8(56),
        VITQ_D8(64), VITQ_D8(72), VITQ_D8(80), VITQ_D8(88), VITQ_D8(96), VITQ_D8(104), VITQ_D8(112), VITQ_D8(120)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(whole_descriptor(b)));
}
// clang-format on
#undef VITQ_D8

}  // namespace vitq

#endif  // VITQ_EMULATION
