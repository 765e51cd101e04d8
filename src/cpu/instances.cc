// Compiles the kernels once per instruction set and picks one at run time.
#include <cstdlib>
#include <string>
#include <vector>

#include "cpu/kernels.h"

// Highway calls AVX-512 AVX3. Machines older than AVX2 get the scalar build. Scalable vectors (SVE)
// cannot be elements of arrays, as the kernels' accumulators are, so Arm gets NEON.
#define HWY_DISABLED_TARGETS \
  (HWY_SSSE3 | HWY_SSE4 | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)

#undef HWY_TARGET_INCLUDE
#define HWY_TARGET_INCLUDE "cpu/instances.cc"
#include "hwy/foreach_target.h"  // IWYU pragma: keep

#include "cpu/attention-inl.h"

HWY_BEFORE_NAMESPACE();
namespace quire::cpu::HWY_NAMESPACE {

Kernels table() {
  return {hwy::TargetName(HWY_TARGET),
          nullptr,
          nullptr,
          load_queries,
          attend_chunk,
          combine,
          store_row};
}

}  // namespace quire::cpu::HWY_NAMESPACE
HWY_AFTER_NAMESPACE();

#if HWY_ONCE

namespace quire::cpu {

HWY_EXPORT(table);

namespace {

// "SCALAR" for the build without SIMD, Highway's target names otherwise.
std::string name_of(std::int64_t target) { return hwy::TargetName(target); }

std::vector<std::int64_t> usable_targets() {
  std::vector<std::int64_t> targets;
  for (std::int64_t bits = hwy::SupportedTargets() & HWY_TARGETS; bits != 0; bits &= bits - 1) {
    targets.push_back(bits & -bits);
  }
  return targets;  // best first: Highway numbers better targets lower
}

// The kernels of the best of these targets.
Kernels kernels_of(std::int64_t targets) {
  hwy::GetChosenTarget().Update(targets);
  return HWY_DYNAMIC_DISPATCH(table)();
}

// The kernels of the best target, with products of bf16.
Kernels bf16_kernels(const char* isa, MultiplyTiles multiply_tiles, const PairKernels* pairs) {
  Kernels kernels = kernels_of(hwy::SupportedTargets());
  kernels.isa = isa;
  kernels.multiply_tiles = multiply_tiles;
  kernels.multiply_pairs = pairs;
  return kernels;
}

// AVX3, with products of bf16 by AVX-512's instructions for them, and for prefill by tile instructions.
// Taken where there are any: on each CPU that has them they do twice what fp32's do, and prefill by tiles
// took a third of the time (a Xeon). Timing them at start-up would cost little, but a busy machine
// could then give other bits from one run to the next.
constexpr const char* kAvx512Bf16 = "AVX3_BF16";
Kernels avx512_bf16_kernels() {
  return bf16_kernels(kAvx512Bf16, multiply_tiles_avx512, &kPairKernelsAvx512);
}
constexpr const char* kAmx = "AMX";
Kernels amx_kernels() {
  return bf16_kernels(kAmx, multiply_tiles_amx,
                      avx512_bf16_is_usable() ? &kPairKernelsAvx512 : nullptr);
}

Kernels best_kernels() {
  if (amx_is_usable()) return amx_kernels();
  if (avx512_bf16_is_usable()) return avx512_bf16_kernels();
  return kernels_of(hwy::SupportedTargets());
}

Kernels choose() {
  const char* forced = std::getenv("QUIRE_CPU_ISA");
  if (forced == nullptr || *forced == '\0') return best_kernels();
  const std::string name = forced;
  if (name == kAmx && amx_is_usable()) return amx_kernels();
  if (name == kAvx512Bf16 && avx512_bf16_is_usable()) return avx512_bf16_kernels();
  if (name == "AMX_PORTABLE") {
    return bf16_kernels("AMX_PORTABLE", multiply_tiles_portable, &kPairKernelsPortable);
  }
  std::string usable = amx_is_usable() ? kAmx : "";
  if (avx512_bf16_is_usable()) usable += (usable.empty() ? "" : ", ") + std::string(kAvx512Bf16);
  for (const std::int64_t target : usable_targets()) {
    usable += (usable.empty() ? "" : ", ") + name_of(target);
    if (name_of(target) == name) return kernels_of(target);
  }
  throw Error("QUIRE_CPU_ISA", "one of " + usable, forced);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels chosen = choose();
  return chosen;
}

}  // namespace quire::cpu

#endif  // HWY_ONCE
