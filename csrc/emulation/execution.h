// The CUDA execution model on a CPU: what a kernel's source needs to compile with a host compiler, and what runs it.
//
// Every thread of a block is a fiber; blocks run one after another, those of a cluster together. A warp instruction
// (mma, ldmatrix, a shuffle) is computed once all 32 lanes have arrived at it; lanes that never arrive are an error.
// The schedule is adversarial: a warp, chosen at random, runs ahead until it must wait for a barrier, its lanes in
// random order; a missing __syncthreads() then reads what another warp has not written yet. Round-robin scheduling lets
// it pass. What is asynchronous arrives at any time the hardware may choose, drawn at random: copies behind an mbarrier
// between their start and the moment when nothing else can run, a wgmma between its issue and the wait that covers it.
// Shared memory starts as garbage and is allocated to the byte, so that AddressSanitizer sees what leaves it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)

struct uint2 {
  unsigned x, y;
} __attribute__((aligned(8)));
struct uint4 {
  unsigned x, y, z, w;
} __attribute__((aligned(16)));
struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
using cudaStream_t = void*;

namespace vitq::emulation {

constexpr int kWarp = 32;

struct Indices {
  dim3 thread, block, block_size, grid_size;
};

// Of the running thread.
const Indices& indices();
unsigned lane();
unsigned char* shared_memory_of_block();
// Throws unless [address, address + bytes) lies in the block's shared memory, at a multiple of `bytes`.
void check_shared(const void* address, size_t bytes, const char* instruction);

// Runs `kernel` for every thread of the grid, `cluster` consecutive blocks together; throws std::runtime_error on
// divergence, deadlock and bad addresses.
void launch(dim3 grid, unsigned threads, size_t shared_bytes, const std::function<void()>& kernel,
            unsigned cluster = 1);

// __syncthreads(); `line` names the place for plant().
void barrier(int line);

// A barrier of `threads` threads of the block, one of 16; `line` as above.
void named_barrier(int line, int number, unsigned threads);
// The barrier of all threads of a cluster.
void cluster_barrier(int line);
unsigned cluster_rank();  // of the running thread's block
// The same place in the shared memory of another block of the cluster.
void* place_in_block(void* shared, unsigned rank);
// Reads shared memory of any block of the cluster that still runs.
void read_of_cluster(void* to, const void* from, size_t bytes);

// A warp instruction: `execute` runs once, with the operands that each lane gave. Of `width` threads: of a warpgroup.
using Execute = void (*)(void* const operands[]);
void collective(const char* name, void* operands, Execute execute, unsigned width = kWarp);

// mbarrier: arrivals and bytes that a phase waits for; they lie in its 8 bytes of shared memory.
void mbarrier_init(void* barrier, unsigned arrivals);
void mbarrier_arrive(void* barrier, unsigned expected_bytes);
// Until the phase of this parity is complete; `line` names the place for plant(), -1: the numbers do not depend on it.
void mbarrier_wait(int line, void* barrier, unsigned parity);

// A copy that completes its bytes at an mbarrier, of any block of the cluster: `copy` runs when it arrives, the target
// is garbage until then.
void copy_behind_barrier(void* barrier, unsigned bytes, std::function<void()> copy);

// A word for a reader of the async proxy, to whom it is garbage until the thread's next fence.
void store_for_async_proxy(void* shared, uint32_t word);
void fence_async_proxy();

// wgmma of the running thread's warpgroup: `execute` computes it, now or at a wait that covers its group. Called once
// for all 128 threads, by the collective that gathered their operands.
void issue_wgmma(std::function<void()> execute);
void wgmma_fence();
void check_wgmma_fence();  // throws where registers may have been written since the last fence
void wgmma_commit();
void wgmma_wait(unsigned pending_groups);

// cp.async: the destination is garbage from here on, and gets the source's bytes at the wait that covers the group.
void copy_async(void* shared, const void* global, unsigned bytes, unsigned valid);
void commit_copies();
void wait_copies(unsigned pending_groups);

// Programmatic dependent launch: memory of the kernel in front, which completes as late as it can. Until then, in every
// cluster that runs, it is garbage; a write to it before then is an error. Empty: everything in front has completed.
struct Range {
  unsigned char* data;
  size_t bytes;
};
void withhold(std::vector<Range> ranges);
void follow_predecessor();

// Faults for the tests of the emulation itself: each makes correct source behave as source with that mistake would.
struct Faults {
  int skipped_barrier = 0;        // line of a barrier, or of a wait for an mbarrier, that is not there
  unsigned extra_pending = 0;     // cp.async.wait_group waits for so many groups fewer
  bool unbounded_copies = false;  // cp.async copies beyond the bound that it was given
  bool swapped_fragment = false;  // mma gets its second and third A register exchanged
  bool no_fence = false;          // wgmma.fence is not there
  bool no_proxy_fence = false;    // fence.proxy.async is not there
  bool no_swizzle = false;        // bulk tensor copies lay rows out one after another
  bool wrong_parity = false;      // waits for an mbarrier ask for the other phase
  bool no_following = false;      // griddepcontrol.wait is not there
};
Faults& faults();
// Lines of the barriers and waits that the last launches met, ascending; reset by reading.
size_t take_barrier_lines(int* lines, size_t capacity);
// Of the schedule; launches that follow draw from it.
void set_seed(uint64_t seed);

}  // namespace vitq::emulation

#define threadIdx (vitq::emulation::indices().thread)
#define blockIdx (vitq::emulation::indices().block)
#define blockDim (vitq::emulation::indices().block_size)
#define gridDim (vitq::emulation::indices().grid_size)
