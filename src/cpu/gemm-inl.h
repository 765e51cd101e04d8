// Rows of A times panels of B, for S = Q K^T and O = P V alike. A panel is as many columns of B as
// the micro-kernel takes at a time, stored row by row.
#if defined(QUIRE_CPU_GEMM_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef QUIRE_CPU_GEMM_INL_H_
#undef QUIRE_CPU_GEMM_INL_H_
#else
#define QUIRE_CPU_GEMM_INL_H_
#endif

#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/simd/vec-inl.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu::HWY_NAMESPACE {

// Micro-kernel: 6 rows by a panel. Its accumulators, one row of B and a broadcast fit the register
// file: 24 + 4 + 1 of 32 registers on AVX-512 and NEON, 12 + 2 + 1 of 16 on AVX2.
constexpr std::int32_t kBlockRows = 6;
#if HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_SSE4 || HWY_TARGET == HWY_SSSE3
constexpr std::int32_t kPanelVectors = 2;
#else
constexpr std::int32_t kPanelVectors = 4;
#endif
constexpr std::int64_t kPanel = kPanelVectors * kVec;
static_assert(kMaxKvTile % kPanel == 0 && kPadV % kPanel == 0);

// What becomes of the values that c holds already.
enum class Update { kStore, kAdd, kRescale };

// c[r][0, kPanel) = (nothing, c[r] or alpha[r] * c[r]) + sum_k a[r][k] * b[k][0, kPanel)
template <int kRows, Update kUpdate>
HWY_INLINE void gemm_block(const float* HWY_RESTRICT a, std::int64_t lda,
                           const float* HWY_RESTRICT b, std::int32_t depth, float* HWY_RESTRICT c,
                           std::int64_t ldc, const float* alpha) {
  const Df d;
  Vf acc[kRows][kPanelVectors];
  HWY_UNROLL(6)
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kPanelVectors; ++v) {
      acc[r][v] = kUpdate == Update::kRescale
                      ? hn::Mul(hn::Set(d, alpha[r]), hn::LoadU(d, c + r * ldc + v * kVec))
                      : hn::Zero(d);
    }
  }
  for (std::int32_t k = 0; k < depth; ++k) {
    Vf row[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v) row[v] = hn::Load(d, b + k * kPanel + v * kVec);
    HWY_UNROLL(6)
    for (int r = 0; r < kRows; ++r) {
      const Vf x = hn::Set(d, a[r * lda + k]);
      for (int v = 0; v < kPanelVectors; ++v) acc[r][v] = hn::MulAdd(x, row[v], acc[r][v]);
    }
  }
  HWY_UNROLL(6)
  for (int r = 0; r < kRows; ++r) {
    for (int v = 0; v < kPanelVectors; ++v) {
      float* to = c + r * ldc + v * kVec;
      hn::StoreU(kUpdate == Update::kAdd ? hn::Add(hn::LoadU(d, to), acc[r][v]) : acc[r][v], d, to);
    }
  }
}

// The same for any number of rows and panels; panel p of b starts at p * panel_stride.
template <Update kUpdate>
HWY_NOINLINE void gemm(const float* a, std::int64_t lda, const float* b, std::int64_t panel_stride,
                       std::int32_t num_panels, std::int32_t depth, float* c, std::int64_t ldc,
                       std::int32_t rows, const float* alpha) {
  for (std::int32_t p = 0; p < num_panels; ++p) {
    const float* panel = b + p * panel_stride;
    float* out = c + p * kPanel;
    std::int32_t r = 0;
    const auto block = [&](auto block_rows) {
      gemm_block<block_rows(), kUpdate>(a + r * lda, lda, panel, depth, out + r * ldc, ldc,
                                        kUpdate == Update::kRescale ? alpha + r : nullptr);
    };
    for (; r + kBlockRows <= rows; r += kBlockRows) {
      block(std::integral_constant<int, kBlockRows>());
    }
    switch (rows - r) {
      case 1: block(std::integral_constant<int, 1>()); break;
      case 2: block(std::integral_constant<int, 2>()); break;
      case 3: block(std::integral_constant<int, 3>()); break;
      case 4: block(std::integral_constant<int, 4>()); break;
      case 5: block(std::integral_constant<int, 5>()); break;
      default: break;
    }
  }
}

}  // namespace quire::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif  // toggle
