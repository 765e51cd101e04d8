// Products by AVX-512's instructions for bf16, for the limit of CPUs that have them. The one file of the
// bench that is compiled for them; it runs only where the library's own kernels use them.
#include <cstdint>

#include "bench/limits.h"

#if defined(__AVX512F__) && defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace quire::bench {

#if defined(__AVX512F__) && defined(__AVX512BF16__)

// Chains of independent sums in registers, enough to hide the latency.
double run_pair_products(std::int64_t num_steps, float, float* sink) {
  constexpr int kChains = 16;
  const auto pairs = reinterpret_cast<__m512bh>(_mm512_set1_epi32(0x3F803F80));  // ones
  __m512 sums[kChains];
  // Each starts differently, else the compiler makes one chain of them.
#pragma GCC unroll 16
  for (int c = 0; c < kChains; ++c) sums[c] = _mm512_set1_ps(static_cast<float>(c));
  for (std::int64_t i = 0; i < num_steps; ++i) {
#pragma GCC unroll 16
    for (int c = 0; c < kChains; ++c) sums[c] = _mm512_dpbf16_ps(sums[c], pairs, pairs);
  }
#pragma GCC unroll 16
  for (int c = 1; c < kChains; ++c) sums[0] = _mm512_add_ps(sums[0], sums[c]);
  *sink = _mm512_cvtss_f32(sums[0]);
  return kChains * 2.0 * 32 * static_cast<double>(num_steps);
}

#else

double run_pair_products(std::int64_t, float, float*) { return 0.0; }

#endif

}  // namespace quire::bench
