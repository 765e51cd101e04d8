// Products of a warpgroup (sm_90a): d (64 x N, fp32) = or += a (64 x 16) * b (16 x N), 16-bit
// elements. They run beside the warpgroup's other work:
//
//   fence(); multiply...(); commit();   ...   wait<0>(); keep(d);
//
// Between fence and commit there must be no branch, and registers that take part must not be
// touched until the wait: else the compiler runs every product to its end before the next
// (ptxas C7510 to C7520; the build fails on these messages).
//
// Shared-memory operands are named by 64-bit descriptors: matrices of 8 rows of 16 bytes, or, with
// the 128-byte swizzle, of 128 bytes. A K-major operand (rows hold consecutive k) moves by `stride`
// bytes from 8 rows to the next 8. An MN-major one ("transposed") moves by `stride` bytes from 8
// values of k to the next 8, and by `lead` bytes from 64 columns (8 without swizzle) to the next.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/ptx/mma.cuh"

namespace quire::cuda::ptx::wgmma {

// A descriptor in two words. The low one holds the address: advancing by some bytes is one
// addition.
__device__ __forceinline__ std::uint32_t descriptor_low(std::uint32_t address, std::uint32_t lead) {
  return ((address & 0x3FFFFU) >> 4) | ((lead >> 4) << 16);
}
// `low` advanced by `bytes`; 128-byte swizzle, base aligned to 1024 bytes.
__device__ __forceinline__ std::uint64_t swizzled(std::uint32_t low, std::uint32_t bytes,
                                                  std::uint32_t stride) {
  return (std::uint64_t{(stride >> 4) | (1U << 30)} << 32) | (low + (bytes >> 4));
}
__device__ __forceinline__ std::uint64_t unswizzled(std::uint32_t low, std::uint32_t bytes,
                                                    std::uint32_t stride) {
  return (std::uint64_t{stride >> 4} << 32) | (low + (bytes >> 4));
}

__device__ __forceinline__ void fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// Until at most `kPending` of the newest groups are under way.
template <int kPending>
__device__ __forceinline__ void wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}
// After a wait: keeps the compiler from moving uses of `d` before it.
template <class T, int kCount>
__device__ __forceinline__ void keep(T (&d)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      asm volatile("" : "+f"(d[i])::"memory");
    } else {
      asm volatile("" : "+r"(d[i])::"memory");
    }
  }
}

// Element i of a thread's d is row fragment_row(warp lane, i % 4), column i / 4 * 8 +
// fragment_column(lane, i % 4) of the 16 rows of its warp (cuda/ptx/fragment.cuh).

// For each N: the registers of d as operands, and their names in the instruction.
#define QUIRE_D4(i) "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3])
#define QUIRE_D8(i) QUIRE_D4(i), QUIRE_D4((i) + 4)
#define QUIRE_D16(i) QUIRE_D8(i), QUIRE_D8((i) + 8)
#define QUIRE_D32(i) QUIRE_D16(i), QUIRE_D16((i) + 16)
#define QUIRE_D64(i) QUIRE_D32(i), QUIRE_D32((i) + 32)

#define QUIRE_NAMES_8 "%0, %1, %2, %3"
#define QUIRE_NAMES_16 \
  QUIRE_NAMES_8        \
  ", %4, %5, %6, %7"
#define QUIRE_NAMES_24 \
  QUIRE_NAMES_16       \
  ", %8, %9, %10, %11"
#define QUIRE_NAMES_32 \
  QUIRE_NAMES_24       \
  ", %12, %13, %14, %15"
#define QUIRE_NAMES_40 \
  QUIRE_NAMES_32       \
  ", %16, %17, %18, %19"
#define QUIRE_NAMES_64 \
  QUIRE_NAMES_40       \
  ", %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define QUIRE_NAMES_72 \
  QUIRE_NAMES_64       \
  ", %32, %33, %34, %35"
#define QUIRE_NAMES_128                                                              \
  QUIRE_NAMES_64                                                                     \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define QUIRE_NAMES_256                                                                  \
  QUIRE_NAMES_128                                                                        \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79"     \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"     \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109"     \
  ", %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123" \
  ", %124, %125, %126, %127"

#define QUIRE_REGISTERS_8 QUIRE_D4(0)
#define QUIRE_REGISTERS_16 QUIRE_D8(0)
#define QUIRE_REGISTERS_24 QUIRE_D8(0), QUIRE_D4(8)
#define QUIRE_REGISTERS_32 QUIRE_D16(0)
#define QUIRE_REGISTERS_40 QUIRE_D16(0), QUIRE_D4(16)
#define QUIRE_REGISTERS_64 QUIRE_D32(0)
#define QUIRE_REGISTERS_72 QUIRE_D32(0), QUIRE_D4(32)
#define QUIRE_REGISTERS_128 QUIRE_D64(0)
#define QUIRE_REGISTERS_256 QUIRE_D64(0), QUIRE_D64(64)

#define QUIRE_WGMMA_SHARED(N, TYPE, A, B, ACCUMULATE, TRANS_A, TRANS_B)                        \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ACCUMULATE                                \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE           \
               " {" QUIRE_NAMES_##N "}, %" #A ", %" #B ", p, 1, 1, %" #TRANS_A ", %" #TRANS_B  \
                                    ";\n}"                                                     \
               : QUIRE_REGISTERS_##N                                                           \
               : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(kTransA), "n"(kTransB) \
               : "memory")
#define QUIRE_WGMMA_REGISTERS(N, TYPE, A0, A1, A2, A3, B, ACCUMULATE, TRANS_B)          \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #ACCUMULATE                         \
               ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE    \
               " {" QUIRE_NAMES_##N "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B \
                                    ", p, 1, 1, %" #TRANS_B ";\n}"                      \
               : QUIRE_REGISTERS_##N                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b),                    \
                 "r"(static_cast<int>(accumulate)), "n"(kTransB)                        \
               : "memory")
#define QUIRE_WGMMA_SHARED_CASE(N, A, B, ACCUMULATE, TRANS_A, TRANS_B) \
  if constexpr (kN == N && kBFloat16)                                  \
    QUIRE_WGMMA_SHARED(N, "bf16", A, B, ACCUMULATE, TRANS_A, TRANS_B); \
  if constexpr (kN == N && !kBFloat16)                                 \
  QUIRE_WGMMA_SHARED(N, "f16", A, B, ACCUMULATE, TRANS_A, TRANS_B)
#define QUIRE_WGMMA_REGISTERS_CASE(N, A0, A1, A2, A3, B, ACCUMULATE, TRANS_B) \
  if constexpr (kN == N && kBFloat16)                                         \
    QUIRE_WGMMA_REGISTERS(N, "bf16", A0, A1, A2, A3, B, ACCUMULATE, TRANS_B); \
  if constexpr (kN == N && !kBFloat16)                                        \
  QUIRE_WGMMA_REGISTERS(N, "f16", A0, A1, A2, A3, B, ACCUMULATE, TRANS_B)

// Both operands in shared memory. kTransA, kTransB: 1 for MN-major.
template <class Type, int kN, int kTransA, int kTransB>
__device__ __forceinline__ void multiply(float (&d)[kN / 2], std::uint64_t a, std::uint64_t b,
                                         bool accumulate) {
  constexpr bool kBFloat16 = std::is_same_v<Type, BFloat16>;
  QUIRE_WGMMA_SHARED_CASE(8, 4, 5, 6, 7, 8);
  QUIRE_WGMMA_SHARED_CASE(16, 8, 9, 10, 11, 12);
  QUIRE_WGMMA_SHARED_CASE(24, 12, 13, 14, 15, 16);
  QUIRE_WGMMA_SHARED_CASE(32, 16, 17, 18, 19, 20);
  QUIRE_WGMMA_SHARED_CASE(40, 20, 21, 22, 23, 24);
  QUIRE_WGMMA_SHARED_CASE(64, 32, 33, 34, 35, 36);
  QUIRE_WGMMA_SHARED_CASE(72, 36, 37, 38, 39, 40);
  QUIRE_WGMMA_SHARED_CASE(128, 64, 65, 66, 67, 68);
  QUIRE_WGMMA_SHARED_CASE(256, 128, 129, 130, 131, 132);
}

// A in registers, as mma.m16n8k16 has it: rows 0 to 15 of its warp.
template <class Type, int kN, int kTransB>
__device__ __forceinline__ void multiply(float (&d)[kN / 2], const std::uint32_t* a,
                                         std::uint64_t b, bool accumulate) {
  constexpr bool kBFloat16 = std::is_same_v<Type, BFloat16>;
  QUIRE_WGMMA_REGISTERS_CASE(8, 4, 5, 6, 7, 8, 9, 10);
  QUIRE_WGMMA_REGISTERS_CASE(16, 8, 9, 10, 11, 12, 13, 14);
  QUIRE_WGMMA_REGISTERS_CASE(24, 12, 13, 14, 15, 16, 17, 18);
  QUIRE_WGMMA_REGISTERS_CASE(32, 16, 17, 18, 19, 20, 21, 22);
  QUIRE_WGMMA_REGISTERS_CASE(40, 20, 21, 22, 23, 24, 25, 26);
  QUIRE_WGMMA_REGISTERS_CASE(64, 32, 33, 34, 35, 36, 37, 38);
  QUIRE_WGMMA_REGISTERS_CASE(128, 64, 65, 66, 67, 68, 69, 70);
  QUIRE_WGMMA_REGISTERS_CASE(256, 128, 129, 130, 131, 132, 133, 134);
}

#undef QUIRE_D4
#undef QUIRE_D8
#undef QUIRE_D16
#undef QUIRE_D32
#undef QUIRE_D64
#undef QUIRE_NAMES_8
#undef QUIRE_REGISTERS_8
#undef QUIRE_NAMES_16
#undef QUIRE_REGISTERS_16
#undef QUIRE_NAMES_24
#undef QUIRE_REGISTERS_24
#undef QUIRE_NAMES_32
#undef QUIRE_REGISTERS_32
#undef QUIRE_NAMES_40
#undef QUIRE_REGISTERS_40
#undef QUIRE_NAMES_64
#undef QUIRE_REGISTERS_64
#undef QUIRE_NAMES_72
#undef QUIRE_REGISTERS_72
#undef QUIRE_NAMES_128
#undef QUIRE_REGISTERS_128
#undef QUIRE_NAMES_256
#undef QUIRE_REGISTERS_256
#undef QUIRE_WGMMA_SHARED
#undef QUIRE_WGMMA_REGISTERS
#undef QUIRE_WGMMA_SHARED_CASE
#undef QUIRE_WGMMA_REGISTERS_CASE

}  // namespace quire::cuda::ptx::wgmma
