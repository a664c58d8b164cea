// wgmma by its shapes: one overload for each count of accumulators. Included by ptx_sm90.cuh alone.
#pragma once

#include "ptx.cuh"

namespace vitq {

// 9.7.15.5.1.2.2 The descriptor of a matrix of bytes in shared memory, in lines of kLine (32, 64, 128) swizzled as
// copy_box does, rows of 8 lines one after another: its lower word; the upper one is the same for all. The next 32
// columns are 32 bytes further.
template <int kLine>
struct MatrixDescriptor {
  uint32_t lower;

  __device__ __forceinline__ uint64_t whole() const {
    constexpr uint32_t kSwizzle = kLine == 128 ? 1 : kLine == 64 ? 2 : 3;
    return uint64_t{kSwizzle << 30 | 8 * kLine >> 4} << 32 | lower;
  }
};
template <int kLine = 128>
__device__ __forceinline__ MatrixDescriptor<kLine> matrix_descriptor(const void* shared) {
  return {1u << 16 | (shared_address(shared) & 0x3ffff) >> 4};
}
template <int kLine>
__device__ __forceinline__ MatrixDescriptor<kLine> columns_further(MatrixDescriptor<kLine> descriptor, int columns) {
  return {descriptor.lower + static_cast<uint32_t>(columns >> 4)};
}

// 9.7.15.5 wgmma: d += a * b of a warpgroup. a is 64 x 32 of 8 bits, warp w's 16 rows as mma_s8 has them; b N x 32 in
// shared memory, signed; d 64 x N: of a warp's rows lane / 4 and + 8, columns 8 i + 2 (lane % 4) and + 1, at
// d[4 i + 2 h + c]. wgmma_s8: a is signed; wgmma_u8_s8: unsigned.
// clang-format off
#define VITQ_DEFINE_WGMMA(name, shape, count, registers, inputs, ...)                                          \
  template <int kLine>                                                                                         \
  __device__ __forceinline__ void name(int32_t (&d)[count], const uint32_t (&a)[4], MatrixDescriptor<kLine> b) { \
    asm volatile("wgmma.mma_async.sync.aligned." shape " {" registers "}, " inputs ", 1;"                      \
                 : __VA_ARGS__                                                                                 \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b.whole()));                                \
  }
#define VITQ_D8(i)                                                                                            \
  "+r"(d[i]), "+r"(d[i + 1]), "+r"(d[i + 2]), "+r"(d[i + 3]), "+r"(d[i + 4]), "+r"(d[i + 5]), "+r"(d[i + 6]), \
      "+r"(d[i + 7])
#define VITQ_WGMMA_TEXT_32 "%0, %1, %2, %3, %4, %5, %6, %7" ", %8, %9, %10, %11, %12, %13, %14, %15"
#define VITQ_WGMMA_OUT_32 VITQ_D8(0), VITQ_D8(8)
#define VITQ_WGMMA_TEXT_64 VITQ_WGMMA_TEXT_32 ", %16, %17, %18, %19, %20, %21, %22, %23" \
  ", %24, %25, %26, %27, %28, %29, %30, %31"
#define VITQ_WGMMA_OUT_64 VITQ_WGMMA_OUT_32, VITQ_D8(16), VITQ_D8(24)
#define VITQ_WGMMA_TEXT_80 VITQ_WGMMA_TEXT_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define VITQ_WGMMA_OUT_80 VITQ_WGMMA_OUT_64, VITQ_D8(32)
#define VITQ_WGMMA_TEXT_96 VITQ_WGMMA_TEXT_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define VITQ_WGMMA_OUT_96 VITQ_WGMMA_OUT_80, VITQ_D8(40)
#define VITQ_WGMMA_TEXT_128 VITQ_WGMMA_TEXT_96 ", %48, %49, %50, %51, %52, %53, %54, %55" \
  ", %56, %57, %58, %59, %60, %61, %62, %63"
#define VITQ_WGMMA_OUT_128 VITQ_WGMMA_OUT_96, VITQ_D8(48), VITQ_D8(56)
#define VITQ_WGMMA_TEXT_144 VITQ_WGMMA_TEXT_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define VITQ_WGMMA_OUT_144 VITQ_WGMMA_OUT_128, VITQ_D8(64)
#define VITQ_WGMMA_TEXT_192 VITQ_WGMMA_TEXT_144 ", %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87" ", %88, %89, %90, %91, %92, %93, %94, %95"
#define VITQ_WGMMA_OUT_192 VITQ_WGMMA_OUT_144, VITQ_D8(72), VITQ_D8(80), VITQ_D8(88)
#define VITQ_WGMMA_TEXT_208 VITQ_WGMMA_TEXT_192 ", %96, %97, %98, %99, %100, %101, %102, %103"
#define VITQ_WGMMA_OUT_208 VITQ_WGMMA_OUT_192, VITQ_D8(96)
#define VITQ_WGMMA_TEXT_256 VITQ_WGMMA_TEXT_208 ", %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119" ", %120, %121, %122, %123, %124, %125, %126, %127"
#define VITQ_WGMMA_OUT_256 VITQ_WGMMA_OUT_208, VITQ_D8(104), VITQ_D8(112), VITQ_D8(120)

VITQ_DEFINE_WGMMA(wgmma_s8, "m64n64k32.s32.s8.s8", 32, VITQ_WGMMA_TEXT_64, "{%32, %33, %34, %35}, %36", VITQ_WGMMA_OUT_64)
VITQ_DEFINE_WGMMA(wgmma_s8, "m64n128k32.s32.s8.s8", 64, VITQ_WGMMA_TEXT_128, "{%64, %65, %66, %67}, %68", VITQ_WGMMA_OUT_128)
VITQ_DEFINE_WGMMA(wgmma_s8, "m64n144k32.s32.s8.s8", 72, VITQ_WGMMA_TEXT_144, "{%72, %73, %74, %75}, %76", VITQ_WGMMA_OUT_144)
VITQ_DEFINE_WGMMA(wgmma_s8, "m64n192k32.s32.s8.s8", 96, VITQ_WGMMA_TEXT_192, "{%96, %97, %98, %99}, %100", VITQ_WGMMA_OUT_192)
VITQ_DEFINE_WGMMA(wgmma_s8, "m64n208k32.s32.s8.s8", 104, VITQ_WGMMA_TEXT_208, "{%104, %105, %106, %107}, %108", VITQ_WGMMA_OUT_208)
VITQ_DEFINE_WGMMA(wgmma_s8, "m64n256k32.s32.s8.s8", 128, VITQ_WGMMA_TEXT_256, "{%128, %129, %130, %131}, %132", VITQ_WGMMA_OUT_256)
VITQ_DEFINE_WGMMA(wgmma_u8_s8, "m64n32k32.s32.u8.s8", 16, VITQ_WGMMA_TEXT_32, "{%16, %17, %18, %19}, %20", VITQ_WGMMA_OUT_32)
VITQ_DEFINE_WGMMA(wgmma_u8_s8, "m64n64k32.s32.u8.s8", 32, VITQ_WGMMA_TEXT_64, "{%32, %33, %34, %35}, %36", VITQ_WGMMA_OUT_64)
VITQ_DEFINE_WGMMA(wgmma_u8_s8, "m64n80k32.s32.u8.s8", 40, VITQ_WGMMA_TEXT_80, "{%40, %41, %42, %43}, %44", VITQ_WGMMA_OUT_80)
VITQ_DEFINE_WGMMA(wgmma_u8_s8, "m64n96k32.s32.u8.s8", 48, VITQ_WGMMA_TEXT_96, "{%48, %49, %50, %51}, %52", VITQ_WGMMA_OUT_96)
VITQ_DEFINE_WGMMA(wgmma_u8_s8, "m64n128k32.s32.u8.s8", 64, VITQ_WGMMA_TEXT_128, "{%64, %65, %66, %67}, %68", VITQ_WGMMA_OUT_128)
// clang-format on
}  // namespace vitq
