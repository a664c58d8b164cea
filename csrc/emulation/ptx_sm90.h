// The functions of ptx_sm90.cuh on a CPU, each computed from its definition in the PTX ISA.
#pragma once

#include <array>
#include <stdexcept>

#include "emulation/ptx.h"

#define VITQ_TENSOR_MAP const vitq::TensorMap
// A launch of blocks in clusters.
#define VITQ_LAUNCH_CLUSTERS(kernel, cluster, grid, threads, shared_bytes, stream, ...) \
  (static_cast<void>(stream),                                                           \
   vitq::emulation::launch(grid, threads, shared_bytes, [=] { kernel(__VA_ARGS__); }, cluster))
#define VITQ_WAIT(barrier, parity) vitq::emulation::mbarrier_wait(__LINE__, barrier, parity)
#define VITQ_CLUSTER_BARRIER() vitq::emulation::cluster_barrier(__LINE__)
#define VITQ_NAMED_BARRIER(number, threads) vitq::emulation::named_barrier(__LINE__, number, threads)

namespace vitq {

struct TensorMap {
  const unsigned char* data;
  std::array<int, 4> sizes;        // of the innermost dimension first
  std::array<int64_t, 3> strides;  // of all but the innermost
  int box_columns, box_rows;
};

inline void mbarrier_init(uint64_t* barrier, unsigned arrivals) { emulation::mbarrier_init(barrier, arrivals); }
inline void fence_mbarrier_init() {}
inline void delay_until(uint64_t* barrier, unsigned parity) { emulation::mbarrier_wait(-1, barrier, parity); }
inline void mbarrier_expect(uint64_t* barrier, unsigned bytes) { emulation::mbarrier_arrive(barrier, bytes); }
inline void mbarrier_arrive(uint64_t* barrier) { emulation::mbarrier_arrive(barrier, 0); }
inline void mbarrier_arrive_at(uint64_t* barrier, unsigned rank) {
  emulation::mbarrier_arrive(emulation::place_in_block(barrier, rank), 0);
}
inline unsigned cluster_rank() { return emulation::cluster_rank(); }

using ClusterPointer = const unsigned char*;
inline ClusterPointer place_in_block(const void* shared, unsigned rank) {
  return static_cast<ClusterPointer>(emulation::place_in_block(const_cast<void*>(shared), rank));
}
inline uint2 load_there(ClusterPointer there, int further) {
  uint2 words;
  emulation::read_of_cluster(&words, there + further, sizeof words);
  return words;
}

namespace emulation {

constexpr unsigned char kUnderWay = 0xCE;

// Byte `at` of shared memory, from the block's first on, in the swizzle of lines of so many bytes.
inline size_t swizzled(size_t at, int line) {
  const size_t chunks = static_cast<size_t>(line) / 16;
  return at ^ (at >> 7 & (chunks - 1)) << 4;
}

// A box of a map into the blocks of a mask, at the same place in each, completed at the same barrier of each. `source`
// is its first matrix; zeros beyond it, and everywhere if it is null.
inline void copy_box_into(void* shared, const TensorMap& map, const unsigned char* source, int column, int row,
                          uint64_t* barrier, unsigned blocks) {
  const auto first = static_cast<size_t>(static_cast<unsigned char*>(shared) - shared_memory_of_block());
  const size_t bytes = static_cast<size_t>(map.box_columns) * static_cast<size_t>(map.box_rows);
  if (first % (8 * static_cast<size_t>(map.box_columns)) != 0) {
    throw std::runtime_error("emulation: a swizzled box lies at a multiple of 8 of its lines");
  }
  for (unsigned rank = 0; blocks >> rank != 0; ++rank) {
    if (!(blocks >> rank & 1)) continue;
    auto* target = static_cast<unsigned char*>(place_in_block(shared, rank));
    unsigned char* base = target - first;
    std::memset(target, kUnderWay, bytes);
    copy_behind_barrier(place_in_block(barrier, rank), static_cast<unsigned>(bytes), [=] {
      for (int r = 0; r < map.box_rows; ++r) {
        for (int c = 0; c < map.box_columns; ++c) {
          const bool inside = source != nullptr && row + r < map.sizes[1] && column + c < map.sizes[0];
          const size_t at = first + static_cast<size_t>(r * map.box_columns + c);
          const size_t place = faults().no_swizzle ? at : swizzled(at, map.box_columns);
          base[place] = inside ? source[(row + r) * map.strides[0] + column + c] : 0;
        }
      }
    });
  }
}

}  // namespace emulation

inline void copy_bulk(void* shared, const void* global, unsigned bytes, uint64_t* barrier) {
  emulation::check_shared(shared, 16, "cp.async.bulk");
  if (bytes % 16 != 0 || reinterpret_cast<uintptr_t>(global) % 16 != 0) {
    throw std::runtime_error("emulation: cp.async.bulk takes whole chunks of 16 bytes");
  }
  std::memset(shared, emulation::kUnderWay, bytes);
  emulation::copy_behind_barrier(barrier, bytes, [=] { std::memcpy(shared, global, bytes); });
}

inline void copy_box(void* shared, const TensorMap& map, int column, int row, uint64_t* barrier, unsigned blocks) {
  emulation::copy_box_into(shared, map, map.data, column, row, barrier, blocks);
}
inline void copy_box(void* shared, const TensorMap& map, int column, int row, uint64_t* barrier) {
  copy_box(shared, map, column, row, barrier, 1u << emulation::cluster_rank());
}
inline void copy_head_box(void* shared, const TensorMap& map, int column, int position, int head, int image,
                          uint64_t* barrier) {
  const bool inside = head < map.sizes[2] && image < map.sizes[3];
  const unsigned char* source = inside ? map.data + head * map.strides[1] + image * map.strides[2] : nullptr;
  emulation::copy_box_into(shared, map, source, column, position, barrier, 1u << emulation::cluster_rank());
}

inline void store_for_wgmma(void* shared, uint32_t word) { emulation::store_for_async_proxy(shared, word); }
inline void fence_async_proxy() { emulation::fence_async_proxy(); }

inline void prefetch_map(const TensorMap&) {}

template <int kRegisters>
void give_registers() {}
template <int kRegisters>
void take_registers() {}

// The first byte, from the block's first on.
template <int kLine>
struct MatrixDescriptor {
  size_t first;
};
template <int kLine = 128>
MatrixDescriptor<kLine> matrix_descriptor(const void* shared) {
  const auto first = static_cast<const unsigned char*>(shared) - emulation::shared_memory_of_block();
  return {static_cast<size_t>(first)};
}
template <int kLine>
MatrixDescriptor<kLine> columns_further(MatrixDescriptor<kLine> descriptor, int columns) {
  return {descriptor.first + static_cast<size_t>(columns)};
}

inline void wgmma_fence() { emulation::wgmma_fence(); }
inline void wgmma_commit() { emulation::wgmma_commit(); }
template <int kPending>
void wgmma_wait() {
  emulation::wgmma_wait(kPending);
}

template <int kCount, typename Word>
void hold(Word (&)[kCount]) {}

namespace emulation {

struct WgmmaOperands {
  int32_t* d;
  const uint32_t* a;
  size_t b;  // the descriptor's first byte
};

template <int kColumns, int kLine, bool kSignedA>
void execute_wgmma(const std::array<WgmmaOperands, 128>& all, const unsigned char* shared) {
  std::array<int, 32> b;
  for (int column = 0; column < kColumns; ++column) {
    for (int k = 0; k < 32; ++k) {
      const size_t at = all[0].b + static_cast<size_t>(column * kLine + k);
      b[k] = static_cast<int8_t>(shared[swizzled(at, kLine)]);
    }
    for (int row = 0; row < 64; ++row) {
      const int warp = row / 16, within = row % 16;
      int32_t sum = 0;
      for (int k = 0; k < 32; ++k) {
        const WgmmaOperands& lane = all[32 * warp + 4 * (within % 8) + k / 4 % 4];
        sum += element<8, kSignedA>(lane.a[within / 8 + 2 * (k / 16)], k % 4) * b[k];
      }
      const WgmmaOperands& lane = all[32 * warp + 4 * (within % 8) + column % 8 / 2];
      int32_t& d = lane.d[4 * (column / 8) + 2 * (within / 8) + column % 2];
      d = static_cast<int32_t>(static_cast<uint32_t>(d) + static_cast<uint32_t>(sum));
    }
  }
}

template <bool kSignedA, int kCount, int kLine>
void wgmma(int32_t (&d)[kCount], const uint32_t (&a)[4], MatrixDescriptor<kLine> b) {
  check_wgmma_fence();
  WgmmaOperands operands{d, a, b.first};
  collective(
      "wgmma", &operands,
      [](void* const given[]) {
        std::array<WgmmaOperands, 128> all;
        for (int i = 0; i < 128; ++i) all[i] = *static_cast<WgmmaOperands*>(given[i]);
        const unsigned char* shared = shared_memory_of_block();
        issue_wgmma([=] { execute_wgmma<2 * kCount, kLine, kSignedA>(all, shared); });
      },
      128);
}

}  // namespace emulation

template <int kCount, int kLine>
void wgmma_s8(int32_t (&d)[kCount], const uint32_t (&a)[4], MatrixDescriptor<kLine> b) {
  emulation::wgmma<true>(d, a, b);
}
template <int kCount, int kLine>
void wgmma_u8_s8(int32_t (&d)[kCount], const uint32_t (&a)[4], MatrixDescriptor<kLine> b) {
  emulation::wgmma<false>(d, a, b);
}

}  // namespace vitq
