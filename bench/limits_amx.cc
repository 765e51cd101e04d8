// Products by Intel's tile instructions, for the limit of CPUs that have them. The one file of the
// bench that is compiled for AMX; it runs only where the library's own kernels use AMX.
#include <cstdint>

#include "bench/limits.h"

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)
#include <immintrin.h>
#endif

namespace quire::bench {

#if defined(__AMX_TILE__) && defined(__AMX_BF16__)

// Four sums of two by two operands, all in registers: the products of 16 x 16 x 32 follow each other
// without loads.
double run_tile_products(std::int64_t num_steps, float, float* sink) {
  struct alignas(64) {
    unsigned char palette = 1;
    unsigned char unused[15] = {};
    unsigned short row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  } config;
  alignas(64) float result[16 * 16] = {};
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, result, 64);
  _tile_loadd(5, result, 64);
  _tile_loadd(6, result, 64);
  _tile_loadd(7, result, 64);
  for (std::int64_t i = 0; i < num_steps; ++i) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_stored(0, result, 64);
  _tile_release();
  *sink = result[0];
  return 4.0 * 2.0 * 16 * 16 * 32 * static_cast<double>(num_steps);
}

#else

double run_tile_products(std::int64_t, float, float*) { return 0.0; }

#endif

}  // namespace quire::bench
