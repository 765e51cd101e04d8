#include "cpu/tiles.h"

#include <cfloat>
#include <cmath>

#include "semantics/quant.h"

namespace quire::cpu {
namespace {

float flushed(float x) { return std::fabs(x) < FLT_MIN ? std::copysign(0.0F, x) : x; }

float operand(std::uint16_t bits) { return flushed(semantics::bf16_to_float(bits)); }

}  // namespace

void multiply_tiles_portable(const TileProduct& product) {
  for (std::int64_t row = 0; row < product.rows; ++row) {
    const std::uint16_t* a = product.a + row * product.a_stride;
    for (std::int64_t column = 0; column < product.columns; ++column) {
      const std::uint16_t* b =
          product.b + column / kTileColumns * product.b_stride + column % kTileColumns * 2;
      float* c = product.c + row * product.c_stride + column;
      float sum = product.add ? flushed(*c) : 0.0F;
      // The pairs of a tile follow each other, and so do the tiles of a column.
      for (std::int64_t i = 0; i < product.depth; ++i) {
        const std::uint16_t below = b[i / 2 * 2 * kTileColumns + i % 2];
        sum = flushed(sum + operand(a[i]) * operand(below));
      }
      *c = sum;
    }
  }
}

}  // namespace quire::cpu
