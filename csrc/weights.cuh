// Packed weights of 2..8 bits, from shared memory to the B registers of an mma or the A registers of a wgmma. The
// layout is defined, and made, in vitq_kernels/ops/mma_fragments.py; here it is undone.
//
// A group is 64 stored rows in four quarters of 16, each of its own width. A step of a quarter is 64 columns: 8
// registers of four bytes a lane, register 4j + 2h' + h holding, of the 8 rows of the quarter's fragment j (0, 1), the
// columns 32 h' + 16 h + 4 (lane % 4) .. + 3 (h', h: which mma of the step, which of its two registers). The codes are
// cut into planes of 8, 4, 2 and 1 bits from the top down (7 = 4 + 2 + 1, 6 = 4 + 2, 5 = 4 + 1, 3 = 2 + 1); a plane of
// p bits holds 8 / p registers in a word and p words of a lane. So a quarter's step of b bits is b chunks of 128 bytes,
// read by conflict-free accesses of 16, 8 and 4 bytes a lane.
#pragma once

#include <cstdint>

#include "ptx.cuh"

namespace vitq {

constexpr int kGroupRows = 64;
constexpr int kQuarters = 4;  // of a group
constexpr int kStepColumns = 64;
constexpr int kChunkBytes = 128;      // of a quarter's step, for each bit of its width
constexpr int kFragmentsOfGroup = 8;  // of 8 rows, two a quarter

// Widths of a group's quarters, a byte each.
struct Widths {
  uint32_t bytes;

  __host__ __device__ constexpr int of(int quarter) const { return static_cast<int>(bytes >> (8 * quarter) & 255); }
  // Chunks of a step of the group, and of its quarters in front of one.
  __host__ __device__ constexpr int chunks() const { return of(0) + of(1) + of(2) + of(3); }
  __host__ __device__ constexpr int chunks_before(int quarter) const {
    return (quarter > 0 ? of(0) : 0) + (quarter > 1 ? of(1) : 0) + (quarter > 2 ? of(2) : 0);
  }
  // The only width; kMixed: there are several; 0: no group.
  __host__ __device__ constexpr int only() const { return bytes == 0x01010101u * (bytes & 255) ? of(0) : kMixed; }
  static constexpr int kMixed = -1;
};

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

// A step of a quarter as it lies in shared memory, from `chunks` on: what a lane has of each plane.
template <int kBits>
struct QuarterStep {
  uint4 plane8[2], plane4;
  uint2 plane2;
  uint32_t plane1;

  __device__ __forceinline__ explicit QuarterStep(const unsigned char* chunks) {
    // plane: its bits; a lane has as many words of it, of which up to four lie together.
    const auto at = [&](int plane, int word) {
      return chunks + first_chunk(kBits, plane) * kChunkBytes + word * 32 * 4 +
             lane_index() * (plane < 4 ? plane : 4) * 4;
    };
    if constexpr (has_plane(kBits, 8)) {
      plane8[0] = *reinterpret_cast<const uint4*>(at(8, 0)), plane8[1] = *reinterpret_cast<const uint4*>(at(8, 4));
    }
    if constexpr (has_plane(kBits, 4)) plane4 = *reinterpret_cast<const uint4*>(at(4, 0));
    if constexpr (has_plane(kBits, 2)) plane2 = *reinterpret_cast<const uint2*>(at(2, 0));
    if constexpr (has_plane(kBits, 1)) plane1 = *reinterpret_cast<const uint32_t*>(at(1, 0));
  }

  // Register kRegister (0..7) as bytes.
  template <int kRegister>
  __device__ __forceinline__ uint32_t bytes() const {
    if constexpr (kBits == 8) return word_of<kRegister % 4>(plane8[kRegister / 4]);
    return left_aligned<kBits, kRegister>([&] { return word_of<kRegister / 2>(plane4); },
                                          [&] { return kRegister < 4 ? plane2.x : plane2.y; }, [&] { return plane1; });
  }

  // Registers kRegister (even) and the next one as nibbles, the first in the upper ones: times 2^(4 - kBits).
  template <int kRegister>
  __device__ __forceinline__ uint32_t nibbles() const {
    static_assert(kBits <= 4);
    if constexpr (kBits == 4) return word_of<kRegister / 2>(plane4);
    const uint32_t twos = kRegister < 4 ? plane2.x : plane2.y;
    uint32_t result = part_of<2, kRegister % 4, 6>(twos);
    result |= part_of<2, kRegister % 4 + 1, 2>(twos);
    if constexpr (kBits == 3) {  // one by one: each is a LOP3 that masks and adds
      result |= part_of<1, kRegister, 5>(plane1);
      result |= part_of<1, kRegister + 1, 1>(plane1);
    }
    return result;
  }
};

// A step of a quarter in the registers of its fragments, [4 j + 2 h' + h]: left-aligned bytes, or where kNative4
// nibbles, [2 j + h].
template <bool kNative4>
using QuarterRegisters = uint32_t[kNative4 ? 4 : 8];

template <int kBits, bool kNative4>
__device__ __forceinline__ void unpack_quarter(const unsigned char* chunks, QuarterRegisters<kNative4>& to) {
  const QuarterStep<kBits> step(chunks);
  if constexpr (kNative4) {
    to[0] = step.template nibbles<0>(), to[1] = step.template nibbles<2>();
    to[2] = step.template nibbles<4>(), to[3] = step.template nibbles<6>();
  } else {
    to[0] = step.template bytes<0>(), to[1] = step.template bytes<1>(), to[2] = step.template bytes<2>();
    to[3] = step.template bytes<3>(), to[4] = step.template bytes<4>(), to[5] = step.template bytes<5>();
    to[6] = step.template bytes<6>(), to[7] = step.template bytes<7>();
  }
}

// The same where the width is known only when the kernel runs. A warp takes one of the cases.
template <bool kNative4>
__device__ __forceinline__ void unpack_quarter(int bits, const unsigned char* chunks, QuarterRegisters<kNative4>& to) {
#define VITQ_QUARTER(width)                      \
  case width:                                    \
    unpack_quarter<width, kNative4>(chunks, to); \
    break;
  switch (bits) {
    VITQ_QUARTER(2)
    VITQ_QUARTER(3)
    default:
      if constexpr (kNative4) {
        unpack_quarter<4, true>(chunks, to);
      } else {
        switch (bits) {
          VITQ_QUARTER(4)
          VITQ_QUARTER(5)
          VITQ_QUARTER(6)
          VITQ_QUARTER(7)
          default:
            unpack_quarter<8, false>(chunks, to);
        }
      }
  }
#undef VITQ_QUARTER
}

}  // namespace vitq
