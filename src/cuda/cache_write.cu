// New K and V rows into the cache.
//
//   slot_mapping -> (block, slot) | one warp a (token, head): K row, then V row
//
// The same type: 16-byte pieces of K and V side by side over the lanes where rows are aligned (256
// bytes each at head size 128: one piece a lane). Else element by element, coalesced; per-token-head
// caches take the row's largest magnitude first (two passes over a row that is then in the L1).
#include "cuda/check.h"
#include "cuda/kernels.h"
#include "semantics/kv_row.h"

namespace quire::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / 32;

struct Side {
  const char* from;
  char* to;
  float* token_scale;
  int size;
};

__device__ Side side_of(const CacheWriteParams& p, const KvParams& kv, const void* data,
                        std::int64_t token_stride, std::int64_t head_stride, int size,
                        std::int64_t token, std::int64_t slot, int head) {
  const std::int64_t block = slot / p.block_size;
  const std::int64_t offset = slot - block * p.block_size;
  Side side;
  side.from = static_cast<const char*>(data) +
              (token * token_stride + head * head_stride) * size_of(p.dtype);
  side.to = static_cast<char*>(kv.data) +
            semantics::cache_offset(kv.strides, block, offset, head) * size_of(kv.dtype);
  side.token_scale =
      kv.token_scales == nullptr
          ? nullptr
          : kv.token_scales + semantics::cache_offset(kv.token_scale_strides, block, offset, head);
  side.size = size;
  return side;
}

__device__ void copy_elements(const CacheWriteParams& p, const KvParams& kv, const Side& side) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (kv.dtype == p.dtype) {
    // Bits, so that NaN payloads survive.
    if (size_of(p.dtype) == 2) {
      for (int i = lane; i < side.size; i += 32) {
        reinterpret_cast<std::uint16_t*>(side.to)[i] =
            reinterpret_cast<const std::uint16_t*>(side.from)[i];
      }
    } else {
      for (int i = lane; i < side.size; i += 32) {
        reinterpret_cast<std::uint32_t*>(side.to)[i] =
            reinterpret_cast<const std::uint32_t*>(side.from)[i];
      }
    }
    return;
  }
  float scale = semantics::value_of(kv.scale);
  if (side.token_scale != nullptr) {
    float absmax = 0.0F;
    for (int i = lane; i < side.size; i += 32) {
      const float magnitude = fabsf(semantics::load_element(side.from, p.dtype, i));
      absmax = magnitude > absmax ? magnitude : absmax;
    }
    for (int d = 16; d > 0; d /= 2) absmax = fmaxf(absmax, __shfl_xor_sync(~0U, absmax, d));
    scale = semantics::token_head_scale(
        absmax, kv.dtype == DType::kInt8 ? semantics::kInt8Max : semantics::kE4M3Max);
    if (lane == 0) *side.token_scale = scale;
  }
  const float inverse = 1.0F / scale;
  for (int i = lane; i < side.size; i += 32) {
    const float element = semantics::load_element(side.from, p.dtype, i);
    semantics::store_element(side.to, kv.dtype, i,
                             side.token_scale != nullptr ? element * inverse : element / scale);
  }
}

__global__ void __launch_bounds__(kThreads)
    cache_write(const __grid_constant__ CacheWriteParams p, bool whole_pieces) {
  const std::int64_t num_rows = p.num_slots * p.num_kv_heads;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t stride = std::int64_t{gridDim.x} * kWarps;
  for (std::int64_t row = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32; row < num_rows;
       row += stride) {
    const std::int64_t token = row / p.num_kv_heads;
    const auto head = static_cast<int>(row - token * p.num_kv_heads);
    const std::int64_t slot = p.slot_mapping[token];
    if (slot < 0 || slot >= p.num_blocks * p.block_size) continue;
    const Side k = side_of(p, p.k, p.key, p.key_token_stride, p.key_head_stride, p.head_size, token,
                           slot, head);
    const Side v = side_of(p, p.v, p.value, p.value_token_stride, p.value_head_stride,
                           p.head_size_v, token, slot, head);
    if (!whole_pieces) {
      copy_elements(p, p.k, k);
      copy_elements(p, p.v, v);
      continue;
    }
    const auto element = static_cast<int>(size_of(p.dtype));
    const int k_pieces = k.size * element / 16;
    const int pieces = k_pieces + v.size * element / 16;
    for (int i = lane; i < pieces; i += 32) {
      const Side& side = i < k_pieces ? k : v;
      const int piece = i < k_pieces ? i : i - k_pieces;
      reinterpret_cast<uint4*>(side.to)[piece] =
          __ldcs(reinterpret_cast<const uint4*>(side.from) + piece);
    }
  }
}

bool aligned(const void* data, std::int64_t a, std::int64_t b, std::int64_t c,
             std::int64_t element) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && a * element % 16 == 0 &&
         b * element % 16 == 0 && c * element % 16 == 0;
}

bool has_whole_pieces(const CacheWriteParams& p) {
  const std::int64_t e = size_of(p.dtype);
  const auto cache_ok = [&](const KvParams& kv) {
    return kv.dtype == p.dtype &&
           aligned(kv.data, kv.strides.block, kv.strides.slot, kv.strides.head, e);
  };
  return cache_ok(p.k) && cache_ok(p.v) && p.head_size * e % 16 == 0 &&
         p.head_size_v * e % 16 == 0 &&
         aligned(p.key, p.key_token_stride, p.key_head_stride, 0, e) &&
         aligned(p.value, p.value_token_stride, p.value_head_stride, 0, e);
}

}  // namespace

void launch_cache_write(const CacheWriteParams& params, cudaStream_t stream) {
  constexpr std::int64_t kMaxGrid = 1 << 20;
  const std::int64_t rows = params.num_slots * params.num_kv_heads;
  if (rows == 0) return;
  const auto grid =
      static_cast<unsigned>(semantics::min_of((rows + kWarps - 1) / kWarps, kMaxGrid));
  cache_write<<<grid, kThreads, 0, stream>>>(params, has_whole_pieces(params));
  check_launch("cache_write", dim3(grid), kThreads, 0);
}

}  // namespace quire::cuda
