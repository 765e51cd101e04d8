// Tensor maps of a paged cache: what the copy engine needs to know to bring some keys of a kv head
// to shared memory by one instruction.
//
// A side of the cache (K or V) is seen as five dimensions, innermost first:
//
//   64 elements | 8 slots | head_size / 64 columns of 64 | block x head | slots / 8
//
// and a box is 64 x 8 x all columns x 1 x (keys of a box / 8). In shared memory a box is eight
// slots of one column after the other, then the next column, then the next eight slots:
//
//   key k, element e:  k / 8 * (head_size * 16) + e / 64 * 1024 + k % 8 * 128 + e % 64 * 2
//
// under the 128-byte swizzle. Eight slots, a column: 1024 bytes, which is what a wgmma descriptor
// calls a matrix; from eight keys to the next eight is always head_size * 16 bytes, also from one
// box to the next. So one descriptor spans a tile of many pages.
//
// 8-bit caches: columns of 128 elements; head size 64 is one of 64 bytes, under the 64-byte swizzle.
//
// Blocks and heads are one dimension, whose stride is that of heads: block b, head h is at
// b * heads_per_block + h. That takes NHD and HND, packed K and V, separate tensors and padded
// blocks, as long as the block stride is a multiple of the head stride.
#pragma once

#include <cstdint>

#include "cuda/kernel_params.h"
#include "cuda/ptx/tensor_map.h"

namespace quire::cuda::sm90 {

struct KvMap {
  ptx::TensorMap map;
  std::int32_t heads_per_block;  // of the fourth coordinate
};

struct KvMaps {
  KvMap k;
  KvMap v;
  std::int32_t box_keys;  // keys of a box: they lie in one block and begin at a multiple of it
};

// Whether the driver can encode tensor maps.
bool has_tensor_maps();

// Whether there are maps for a layer's blocks and head sizes, whatever the strides of its caches.
bool maps_fit(const LayerParams& layer);

// Whether there are maps for the caches of a call: their addresses and strides. Cheap.
bool maps_fit(const KernelParams& params);

// The maps of a call's caches, for tiles of `tile_keys` keys (a power of two, at least 16). Encoded
// once a cache and thread, then remembered: encoding costs about as much host time as a launch. The
// reference is valid until the thread's next call.
const KvMaps& kv_maps(const KernelParams& params, int tile_keys);

// Queries and outputs as three dimensions, 64 elements | heads | tokens, and boxes of them: some
// tokens' rows of all query heads of a kv head, one behind the other under the 128-byte swizzle.
struct RowMaps {
  ptx::TensorMap query;
  ptx::TensorMap output;
};

// Whether there are maps for the rows of a call. Head size 64 in 16 bits.
bool row_maps_fit(const KernelParams& params);

// The maps of a call's rows, remembered as those of its caches are.
const RowMaps& row_maps(const KernelParams& params, int box_tokens);

}  // namespace quire::cuda::sm90
