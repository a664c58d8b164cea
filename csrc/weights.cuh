// Packed weights of 2..8 bits, from shared memory to the B registers of an mma. The layout is defined, and made, in
// vitq_kernels/ops/mma_fragments.py; here it is undone.
//
// A group is 64 rows; its step is 64 columns: 32 registers of four bytes a lane, register 4j + 2h' + h holding, of the
// 8 rows of fragment j, the columns 32 h' + 16 h + 4 (lane % 4) .. + 3 (h', h: which mma of the step, which of its two
// registers). The codes are cut into planes of 8, 4, 2 and 1 bits from the top down (7 = 4 + 2 + 1, 6 = 4 + 2,
// 5 = 4 + 1, 3 = 2 + 1); a plane of p bits holds 8 / p registers in a word and is p chunks of 16 bytes a lane. So a
// step of b bits is b chunks of 512 bytes, whatever b is, each read by one conflict-free 16-byte access.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace vitq {

constexpr int kGroupRows = 64;
constexpr int kStepColumns = 64;
constexpr int kChunkBytes = 512;      // 16 bytes a lane
constexpr int kFragmentsOfGroup = 8;  // of 8 rows

__host__ __device__ constexpr bool has_plane(int bits, int plane) {
  return bits == 8 ? plane == 8 : (bits & plane) != 0;
}

// Where the chunks of a plane begin: the planes lie from the widest to the narrowest.
__host__ __device__ constexpr int first_chunk(int bits, int plane) { return plane == 8 ? 0 : bits & ~(2 * plane - 1); }

// Part `kPart` of a word's bytes moved to bits kTarget .. kTarget + kPlane - 1; zero elsewhere. Two instructions, one
// where nothing moves.
template <int kPlane, int kPart, int kTarget>
__device__ __forceinline__ uint32_t part_of(uint32_t word) {
  constexpr int kSource = 8 - kPlane * (kPart + 1);
  constexpr uint32_t kMask = 0x01010101u * (((1u << kPlane) - 1) << kTarget);
  return (kSource >= kTarget ? word >> (kSource - kTarget) : word << (kTarget - kSource)) & kMask;
}

template <int kIndex>
__device__ __forceinline__ uint32_t word_of(const uint4& chunk) {
  return kIndex == 0 ? chunk.x : kIndex == 1 ? chunk.y : kIndex == 2 ? chunk.z : chunk.w;
}

// Register kRegister of a step as bytes, each code left-aligned in its byte: times 2^(8 - kBits). Put together from the
// words of the narrow planes that hold it; only those that the width has are asked for.
template <int kBits, int kRegister, class Four, class Two, class One>
__device__ __forceinline__ uint32_t left_aligned(const Four& four, const Two& two, const One& one) {
  uint32_t result = 0;
  if constexpr (has_plane(kBits, 4)) result |= part_of<4, kRegister % 2, 4>(four());
  constexpr int kTop = has_plane(kBits, 4) ? 2 : 6;  // of the plane of 2 bits
  if constexpr (has_plane(kBits, 2)) result |= part_of<2, kRegister % 4, kTop>(two());
  if constexpr (has_plane(kBits, 1)) result |= part_of<1, kRegister % 8, 8 - kBits>(one());
  return result;
}

// The weights of one step of a group as they lie in shared memory; loads what a fragment needs when it is asked for,
// fragments in ascending order.
template <int kBits>
struct WeightStep {
  const unsigned char* chunks;  // of this lane: chunk c is at + c * kChunkBytes
  uint4 plane8, plane4, plane2, plane1;

  __device__ explicit WeightStep(const unsigned char* chunks_of_lane) : chunks(chunks_of_lane) {}

  template <int kPlane>
  __device__ __forceinline__ uint4 load(int chunk) const {
    return *reinterpret_cast<const uint4*>(chunks + (first_chunk(kBits, kPlane) + chunk) * kChunkBytes);
  }

  template <int kFragment>
  __device__ __forceinline__ void advance() {
    if constexpr (has_plane(kBits, 8)) plane8 = load<8>(kFragment);
    if constexpr (has_plane(kBits, 4) && kFragment % 2 == 0) plane4 = load<4>(kFragment / 2);
    if constexpr (has_plane(kBits, 2) && kFragment % 4 == 0) plane2 = load<2>(kFragment / 4);
    if constexpr (has_plane(kBits, 1) && kFragment == 0) plane1 = load<1>(0);
  }

  // Register kRegister (0..31) of the step as bytes.
  template <int kRegister>
  __device__ __forceinline__ uint32_t bytes() const {
    if constexpr (kBits == 8) return word_of<kRegister % 4>(plane8);
    return left_aligned<kBits, kRegister>([&] { return word_of<kRegister / 2 % 4>(plane4); },
                                          [&] { return word_of<kRegister / 4 % 4>(plane2); },
                                          [&] { return word_of<kRegister / 8>(plane1); });
  }

  // Registers kRegister (even) and the next one as nibbles, the first in the upper ones: times 2^(4 - kBits).
  template <int kRegister>
  __device__ __forceinline__ uint32_t nibbles() const {
    static_assert(kBits <= 4);
    if constexpr (kBits == 4) return word_of<kRegister / 2 % 4>(plane4);
    const uint32_t twos = word_of<kRegister / 4 % 4>(plane2);
    uint32_t result = part_of<2, kRegister % 4, 6>(twos) | part_of<2, kRegister % 4 + 1, 2>(twos);
    if constexpr (kBits == 3) {
      const uint32_t ones = word_of<kRegister / 8>(plane1);
      result |= part_of<1, kRegister % 8, 5>(ones) | part_of<1, kRegister % 8 + 1, 1>(ones);
    }
    return result;
  }
};

// The same step for a warp of a warpgroup, as wgmma takes it: registers 8 warp .. 8 warp + 7, here 0 .. 7. Their words
// lie together in each plane: 8, 4, 2 and 1 of a lane's.
template <int kBits>
struct WarpgroupStep {
  uint4 plane8[2], plane4;
  uint2 plane2;
  uint32_t plane1;

  // chunks: of the step, not of the lane.
  __device__ __forceinline__ WarpgroupStep(const unsigned char* chunks, int warp) {
    const unsigned char* of_lane = chunks + 16 * lane_index();
    const auto at = [&](int plane, int word) {
      return of_lane + (first_chunk(kBits, plane) + word / 4) * kChunkBytes + word % 4 * 4;
    };
    if constexpr (has_plane(kBits, 8)) {
      plane8[0] = *reinterpret_cast<const uint4*>(at(8, 8 * warp));
      plane8[1] = *reinterpret_cast<const uint4*>(at(8, 8 * warp + 4));
    }
    if constexpr (has_plane(kBits, 4)) plane4 = *reinterpret_cast<const uint4*>(at(4, 4 * warp));
    if constexpr (has_plane(kBits, 2)) plane2 = *reinterpret_cast<const uint2*>(at(2, 2 * warp));
    if constexpr (has_plane(kBits, 1)) plane1 = *reinterpret_cast<const uint32_t*>(at(1, warp));
  }

  template <int kRegister>
  __device__ __forceinline__ uint32_t bytes() const {
    if constexpr (kBits == 8) return word_of<kRegister % 4>(plane8[kRegister / 4]);
    return left_aligned<kBits, kRegister>([&] { return word_of<kRegister / 2>(plane4); },
                                          [&] { return kRegister < 4 ? plane2.x : plane2.y; }, [&] { return plane1; });
  }
};

}  // namespace vitq
