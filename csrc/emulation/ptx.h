// The functions of ptx.cuh on a CPU, each computed from its definition in the PTX ISA, with nothing but plain loops.
#pragma once

#include <cmath>
#include <cstring>

#include "emulation/execution.h"

#define VITQ_LAUNCH(kernel, grid, threads, shared_bytes, stream, ...) \
  (static_cast<void>(stream), vitq::emulation::launch(grid, threads, shared_bytes, [=] { kernel(__VA_ARGS__); }))
#define VITQ_BARRIER() vitq::emulation::barrier(__LINE__)

namespace vitq {

inline void follow_predecessor() { emulation::follow_predecessor(); }

inline unsigned lane_index() { return emulation::lane(); }
inline int warp_index() { return static_cast<int>(threadIdx.x / 32); }
inline unsigned char* shared_memory() { return emulation::shared_memory_of_block(); }

inline void sync_warp() {
  emulation::collective("bar.warp.sync", nullptr, [](void* const*) {});
}
inline void hold(int&) {}

inline void copy_async_16(void* shared, const void* global, unsigned valid = 16) {
  emulation::copy_async(shared, global, 16, valid);
}
inline void commit_copies() { emulation::commit_copies(); }
template <int kPending>
void wait_copies() {
  emulation::wait_copies(kPending);
}

inline void load_matrices(uint32_t (&fragment)[4], const void* shared_row) {
  emulation::check_shared(shared_row, 16, "ldmatrix");
  struct Operands {
    uint32_t* fragment;
    const unsigned char* row;
  } operands{fragment, static_cast<const unsigned char*>(shared_row)};
  emulation::collective("ldmatrix", &operands, [](void* const all[]) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int matrix = 0; matrix < 4; ++matrix) {
        const auto* source = static_cast<const Operands*>(all[8 * matrix + lane / 4]);
        std::memcpy(&static_cast<Operands*>(all[lane])->fragment[matrix], source->row + 4 * (lane % 4), 4);
      }
    }
  });
}

namespace emulation {

struct MmaOperands {
  int32_t* d;
  uint32_t a[4];
  uint32_t b[2];
};

// Element `index` of a word of elements of kBits.
template <int kBits, bool kSigned>
int element(uint32_t word, int index) {
  const int value = static_cast<int>(word >> (kBits * index) & ((1u << kBits) - 1));
  return kSigned && value >> (kBits - 1) ? value - (1 << kBits) : value;
}

template <int kBits, bool kSignedA>
void execute_mma(void* const all[]) {
  constexpr int kPerWord = 32 / kBits, kDepth = 8 * kPerWord;  // a lane's word; k of the instruction
  const auto lane_of = [&](int lane) { return static_cast<MmaOperands*>(all[lane]); };
  for (int row = 0; row < 16; ++row) {
    for (int column = 0; column < 8; ++column) {
      int64_t sum = 0;
      for (int k = 0; k < kDepth; ++k) {
        const int lane_k = k / kPerWord % 4, upper = k / (kDepth / 2), at = k % kPerWord;
        const MmaOperands* a = lane_of(4 * (row % 8) + lane_k);
        const MmaOperands* b = lane_of(4 * column + lane_k);
        sum += int64_t{element<kBits, kSignedA>(a->a[row / 8 + 2 * upper], at)} * element<kBits, true>(b->b[upper], at);
      }
      int32_t& d = lane_of(4 * (row % 8) + column / 2)->d[2 * (row / 8) + column % 2];
      d = static_cast<int32_t>(static_cast<uint32_t>(d) + static_cast<uint32_t>(sum));  // wraps, as without .satfinite
    }
  }
}

template <int kBits, bool kSignedA>
void mma(const char* name, int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaOperands operands{d, {a[0], a[1], a[2], a[3]}, {b0, b1}};
  if (faults().swapped_fragment) operands.a[1] = a[2], operands.a[2] = a[1];
  collective(name, &operands, execute_mma<kBits, kSignedA>);
}

}  // namespace emulation

inline void mma_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::mma<8, true>("mma.s8.s8", d, a, b0, b1);
}
inline void mma_u8_s8(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::mma<8, false>("mma.u8.s8", d, a, b0, b1);
}
inline void mma_s4(int32_t (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  emulation::mma<4, true>("mma.s4.s4", d, a, b0, b1);
}

template <typename T>
T shuffle_xor(T value, int mask) {
  struct Operands {
    T value, result;
    int mask;
  } operands{value, value, mask};
  emulation::collective("shfl.bfly", &operands, [](void* const all[]) {
    for (int lane = 0; lane < 32; ++lane) {
      auto* own = static_cast<Operands*>(all[lane]);
      own->result = static_cast<const Operands*>(all[lane ^ own->mask])->value;
    }
  });
  return operands.result;
}

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t{b} << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i) {
    const uint32_t choice = selector >> (4 * i);
    uint32_t byte = static_cast<uint32_t>(bytes >> (8 * (choice & 7))) & 255;
    if (choice & 8) byte = byte & 128 ? 255 : 0;
    result |= byte << (8 * i);
  }
  return result;
}

inline uint32_t dot_u8(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 32; i += 8) c += (a >> i & 255) * (b >> i & 255);
  return c;
}

inline float divide_approximately(float a, float b) { return a / b; }
inline float exp2_approximately(float x) { return std::exp2(x); }

template <typename To, typename From>
To same_bits(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline uint32_t float_bits(float x) { return same_bits<uint32_t>(x); }
inline float bits_float(uint32_t x) { return same_bits<float>(x); }
inline uint64_t double_bits(double x) { return same_bits<uint64_t>(x); }
inline double bits_double(uint64_t x) { return same_bits<double>(x); }
inline float int_to_float(int32_t x) { return static_cast<float>(x); }
inline float half_to_float(uint16_t x) { return static_cast<float>(same_bits<_Float16>(x)); }
inline uint16_t float_to_half(float x) { return same_bits<uint16_t>(static_cast<_Float16>(x)); }
inline float bfloat16_to_float(uint16_t x) { return bits_float(uint32_t{x} << 16); }
inline uint16_t float_to_bfloat16(float x) {
  const uint32_t word = float_bits(x);
  if (x != x) return 0x7fff;  // the one NaN that the GPU's conversion gives
  return static_cast<uint16_t>((word + 0x7fff + (word >> 16 & 1)) >> 16);
}

}  // namespace vitq
