// New K and V rows into the cache, and merge_states. Memory-bound copies: plain loops over
// semantics/, tokens in parallel.
#include <algorithm>
#include <cstring>

#include "cpu/workspace.h"
#include "semantics/kv_row.h"
#include "semantics/merge_row.h"

namespace quire::cpu {
namespace {

struct NewRows {
  const void* data;
  std::int64_t token_stride;
  std::int64_t head_stride;
  std::int64_t size;
};

void write_side(const CacheWriteParams& p, const KvParams& kv, const NewRows& x, std::int64_t token,
                std::int64_t slot) {
  const std::int64_t block = slot / p.block_size;
  const std::int64_t offset = slot % p.block_size;
  const float scale = semantics::value_of(kv.scale);
  for (std::int32_t head = 0; head < p.num_kv_heads; ++head) {
    const char* from = static_cast<const char*>(x.data) +
                       (token * x.token_stride + head * x.head_stride) * size_of(p.dtype);
    char* to = static_cast<char*>(kv.data) +
               semantics::cache_offset(kv.strides, block, offset, head) * size_of(kv.dtype);
    if (kv.dtype == p.dtype) {
      std::memcpy(to, from, static_cast<std::size_t>(x.size * size_of(p.dtype)));
      continue;
    }
    float* token_scale = kv.token_scales == nullptr
                             ? nullptr
                             : kv.token_scales + semantics::cache_offset(kv.token_scale_strides,
                                                                         block, offset, head);
    semantics::store_kv_row(from, p.dtype, x.size, to, kv.dtype, scale, token_scale);
  }
}

// Enough tokens a task that handing it out costs nothing beside the copying.
constexpr std::int64_t kTokensPerTask = 16;

}  // namespace

void run_cache_write(const CacheWriteParams& p, ThreadPool& pool) {
  const NewRows key{p.key, p.key_token_stride, p.key_head_stride, p.head_size};
  const NewRows value{p.value, p.value_token_stride, p.value_head_stride, p.head_size_v};
  auto task = [&](std::int64_t i, int) {
    const std::int64_t end = std::min((i + 1) * kTokensPerTask, p.num_slots);
    for (std::int64_t token = i * kTokensPerTask; token < end; ++token) {
      const std::int64_t slot = p.slot_mapping[token];
      if (slot < 0 || slot >= p.num_blocks * p.block_size) continue;
      write_side(p, p.k, key, token, slot);
      write_side(p, p.v, value, token, slot);
    }
  };
  parallel_for(pool, (p.num_slots + kTokensPerTask - 1) / kTokensPerTask, task);
}

namespace {

void merge_row(const MergeParams& p, std::int64_t token, std::int32_t head) {
  const auto merged =
      semantics::merge_rows<float>(*p.a.lse_at(token, head), *p.b.lse_at(token, head));
  const void* a = p.a.row(p.dtype, token, head);
  const void* b = p.b.row(p.dtype, token, head);
  void* result = const_cast<void*>(p.result.row(p.dtype, token, head));
  for (std::int64_t i = 0; i < p.head_size_v; ++i) {
    semantics::store_element(result, p.dtype, i, merged.element(a, b, p.dtype, i));
  }
  if (p.result.lse != nullptr) {
    *const_cast<float*>(p.result.lse_at(token, head)) = merged.lse;
  }
}

}  // namespace

void run_merge(const MergeParams& p, ThreadPool& pool) {
  auto task = [&](std::int64_t token, int) {
    for (std::int32_t head = 0; head < p.num_heads; ++head) merge_row(p, token, head);
  };
  parallel_for(pool, p.num_tokens, task);
}

}  // namespace quire::cpu
