// The instructions of Hopper (sm_90a), one per function, as ptx.cuh has those of all GPUs. PTX ISA 9.0 sections.
// In the emulation the same functions come from emulation/ptx_sm90.h.
#pragma once

#include "ptx.cuh"

#ifdef VITQ_EMULATION
#include "emulation/ptx_sm90.h"
#else

#include <cuda.h>

#include "ptx_wgmma.cuh"

namespace vitq {

// A matrix of bytes in global memory, as the copies of boxes see it; made by token_map (tensor_map.cuh).
using TensorMap = CUtensorMap;
#define VITQ_TENSOR_MAP const __grid_constant__ vitq::TensorMap

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

// 9.7.9.23 mapa: the same place in the shared memory of a block of the cluster; 9.7.9.8 ld: eight bytes of it, further
// on.
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

// 9.7.9.25.5.2 cp.async.bulk.tensor: the map's box whose first byte is `column` of `row`; zeros beyond the matrix,
// which count as bytes too. Rows lie in lines of 128 bytes whose 16-byte chunks are swizzled: chunk c of line l at c ^
// l % 8.
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

// The map's box of one head of one image (head_map of tensor_map.cuh): from `column` of `position` on. Lines are as
// long as the box is wide, 32, 64 or 128 bytes, and swizzled by their address: bit 4 (and 5, and 6) with bit 7 (and 8,
// 9).
__device__ __forceinline__ void copy_head_box(void* shared, const TensorMap& map, int column, int position, int head,
                                              int image, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6];" ::"r"(shared_address(shared)),
      "l"(&map), "r"(column), "r"(position), "r"(head), "r"(image), "r"(shared_address(barrier))
      : "memory");
}

// 9.7.9.15 prefetch: the map itself, which the first copy would wait for.
__device__ __forceinline__ void prefetch_map(const TensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
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

// A word that wgmma will read: it reads through the async proxy, which sees a thread's ordinary writes only behind this
// fence of the thread (9.7.13.4 fence.proxy.async); an mbarrier then tells the readers.
__device__ __forceinline__ void store_for_wgmma(void* shared, uint32_t word) { *static_cast<uint32_t*>(shared) = word; }
__device__ __forceinline__ void fence_async_proxy() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

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

}  // namespace vitq

#endif  // VITQ_EMULATION
