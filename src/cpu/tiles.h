// Products of bf16 matrices by the tile instructions of Intel CPUs (AMX, "Intel Architecture
// Instruction Set Extensions", chapter 3), by AVX-512's instructions for pairs of bf16, over the same
// layouts, and the same arithmetic in plain code for tests on other machines.
#pragma once

#include <cstdint>

namespace quire::cpu {

// A step of the tile instruction multiplies 16 rows by 32 products deep by 16 columns.
inline constexpr std::int32_t kTileRows = 16;
inline constexpr std::int32_t kTileDepth = 32;
inline constexpr std::int32_t kTileColumns = 16;
inline constexpr std::int64_t kTileSize = std::int64_t{kTileDepth} * kTileColumns;

// c (+)= a * b. `rows` is a multiple of 16, `depth` of 32.
struct TileProduct {
  const std::uint16_t* a = nullptr;  // bf16 [rows, depth]
  std::int64_t a_stride = 0;
  // bf16, [columns / 16][depth / 32] tiles of [16 pairs][16 columns][2]: two elements that lie below
  // each other in B lie side by side.
  const std::uint16_t* b = nullptr;
  std::int64_t b_stride = 0;  // from 16 columns to the next
  float* c = nullptr;         // [rows, columns]
  std::int64_t c_stride = 0;
  std::int32_t rows = 0;
  std::int32_t depth = 0;
  std::int32_t columns = 0;  // a multiple of 16
  bool add = false;          // to what c holds; else c is only written
};

using MultiplyTiles = void (*)(const TileProduct& product);

// Whether this CPU has AMX for bf16 and the kernel lets this process use it; asks the kernel once.
bool amx_is_usable();
// Only where amx_is_usable(). Leaves the tile registers released.
void multiply_tiles_amx(const TileProduct& product);
// Whether this CPU has AVX-512 with its instructions for bf16 (and VBMI, for pairs.h): AMD's from Zen 4 on,
// Intel's from Sapphire Rapids on. They multiply and add twice as many elements in a cycle as those for
// fp32.
bool avx512_bf16_is_usable();
// Only where avx512_bf16_is_usable().
void multiply_tiles_avx512(const TileProduct& product);
// With the rounding of both for what is too small to be normal: to 0, in a, b and c.
void multiply_tiles_portable(const TileProduct& product);

}  // namespace quire::cpu
