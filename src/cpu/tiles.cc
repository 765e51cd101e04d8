#include "cpu/tiles.h"

#include "cpu/portable_bf16.h"

namespace quire::cpu {

void multiply_tiles_portable(const TileProduct& product) {
  for (std::int64_t row = 0; row < product.rows; ++row) {
    const std::uint16_t* a = product.a + row * product.a_stride;
    for (std::int64_t column = 0; column < product.columns; ++column) {
      const std::uint16_t* b =
          product.b + column / kTileColumns * product.b_stride + column % kTileColumns * 2;
      float* c = product.c + row * product.c_stride + column;
      float sum = product.add ? flushed(*c) : 0.0F;
      // As AMX: of each step the even products, the odd ones, then all to the sum. The pairs of a tile
      // follow each other, and so do the tiles of a column.
      for (std::int64_t first = 0; first < product.depth; first += kTileDepth) {
        float even = 0.0F;
        float odd = 0.0F;
        for (std::int64_t i = first; i < first + kTileDepth; i += 2) {
          const std::uint16_t* pair = b + i * kTileColumns;
          even = add_product(even, a[i], pair[0]);
          odd = add_product(odd, a[i + 1], pair[1]);
        }
        sum = flushed(sum + flushed(even + odd));
      }
      *c = sum;
    }
  }
}

}  // namespace quire::cpu
