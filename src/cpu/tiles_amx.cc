// The one file compiled for AMX. Everything in it but amx_is_usable() may run only where that is
// true, so nothing else may be included that defines inline functions others link with.
#include "cpu/tiles.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)

#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace quire::cpu {
namespace {

// CPUID leaf 7, EDX; XCR0.
constexpr unsigned kAmxBf16 = 1U << 22U;
constexpr unsigned kAmxTile = 1U << 24U;
constexpr unsigned kOsSavesState = 1U << 27U;  // leaf 1, ECX
constexpr unsigned kTileState = 3U << 17U;
// arch_prctl(2)
constexpr long kRequestPermission = 0x1023;
constexpr long kTileData = 18;

bool cpu_has_amx() {
  unsigned a = 0;
  unsigned b = 0;
  unsigned c = 0;
  unsigned d = 0;
  if (__get_cpuid(1, &a, &b, &c, &d) == 0 || (c & kOsSavesState) == 0) return false;
  if (__get_cpuid_count(7, 0, &a, &b, &c, &d) == 0) return false;
  if ((d & kAmxBf16) == 0 || (d & kAmxTile) == 0) return false;
  unsigned low = 0;
  unsigned high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (low & kTileState) == kTileState;
}

// Eight tiles of 16 rows of 64 bytes.
struct alignas(64) TileConfig {
  unsigned char palette = 1;
  unsigned char start_row = 0;
  unsigned char reserved[14] = {};
  unsigned short row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Tile registers are named by constants. Two by two blocks: of eight registers four are sums, two
// rows of a, two columns of b, so that each load feeds two products.
template <bool kTwoRows, bool kTwoColumns>
void multiply_block(const TileProduct& p, std::int64_t row, std::int64_t column) {
  const auto a_bytes = static_cast<long>(p.a_stride * 2);
  const auto c_bytes = static_cast<long>(p.c_stride * 4);
  const std::uint16_t* a = p.a + row * p.a_stride;
  const std::uint16_t* b = p.b + column / kTileColumns * p.b_stride;
  float* c = p.c + row * p.c_stride + column;
  float* c_below = c + kTileRows * p.c_stride;
  if (p.add) {
    _tile_loadd(0, c, c_bytes);
    if (kTwoColumns) _tile_loadd(1, c + kTileColumns, c_bytes);
    if (kTwoRows) _tile_loadd(2, c_below, c_bytes);
    if (kTwoRows && kTwoColumns) _tile_loadd(3, c_below + kTileColumns, c_bytes);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (std::int64_t i = 0; i < p.depth; i += kTileDepth) {
    const std::uint16_t* b_tile = b + i / kTileDepth * kTileSize;
    _tile_loadd(4, a + i, a_bytes);
    _tile_loadd(6, b_tile, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (kTwoColumns) {
      _tile_loadd(7, b_tile + p.b_stride, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (kTwoRows) {
      _tile_loadd(5, a + kTileRows * p.a_stride + i, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if (kTwoColumns) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if (kTwoColumns) _tile_stored(1, c + kTileColumns, c_bytes);
  if (kTwoRows) _tile_stored(2, c_below, c_bytes);
  if (kTwoRows && kTwoColumns) _tile_stored(3, c_below + kTileColumns, c_bytes);
}

template <bool kTwoRows>
void multiply_rows(const TileProduct& p, std::int64_t row) {
  std::int64_t column = 0;
  for (; column + 2 * kTileColumns <= p.columns; column += 2 * kTileColumns) {
    multiply_block<kTwoRows, true>(p, row, column);
  }
  if (column < p.columns) multiply_block<kTwoRows, false>(p, row, column);
}

}  // namespace

bool amx_is_usable() {
  static const bool usable =
      cpu_has_amx() && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return usable;
}

void multiply_tiles_amx(const TileProduct& product) {
  static constexpr TileConfig kConfig;
  _tile_loadconfig(&kConfig);
  std::int64_t row = 0;
  for (; row + 2 * kTileRows <= product.rows; row += 2 * kTileRows) {
    multiply_rows<true>(product, row);
  }
  if (row < product.rows) multiply_rows<false>(product, row);
  _tile_release();
}

}  // namespace quire::cpu

#else

namespace quire::cpu {

bool amx_is_usable() { return false; }
void multiply_tiles_amx(const TileProduct& product) { multiply_tiles_portable(product); }

}  // namespace quire::cpu

#endif
