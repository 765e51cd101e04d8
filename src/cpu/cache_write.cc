// New K and V rows into the cache, and merge_states. Memory-bound copies: plain loops over
// semantics/, tokens in parallel.
#include <algorithm>
#include <cstring>

#include "cpu/workspace.h"
#include "semantics/kv_row.h"
#include "semantics/softmax_state.h"

namespace quire::cpu {
namespace {

float value_of(const Scale& scale) { return scale.data != nullptr ? *scale.data : scale.value; }

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
  const float scale = value_of(kv.scale);
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

const void* row_of(const MergeParams& p, const MergePart& part, std::int64_t token,
                   std::int32_t head) {
  return static_cast<const char*>(part.output) +
         (token * part.token_stride + head * part.head_stride) * size_of(p.dtype);
}

void merge_row(const MergeParams& p, std::int64_t token, std::int32_t head) {
  const auto lse_of = [&](const MergePart& part) {
    return part.lse[head * part.lse_head_stride + token * part.lse_token_stride];
  };
  using State = semantics::SoftmaxState<float>;
  const auto merged = semantics::merge(State{lse_of(p.a), 1.0F}, State{lse_of(p.b), 1.0F});
  const auto finished = semantics::finish(merged.state, false, 0.0F);
  const float weight_a = merged.weight_a * finished.output_scale;
  const float weight_b = merged.weight_b * finished.output_scale;
  const void* a = row_of(p, p.a, token, head);
  const void* b = row_of(p, p.b, token, head);
  void* result = const_cast<void*>(row_of(p, p.result, token, head));
  for (std::int64_t i = 0; i < p.head_size_v; ++i) {
    // A part without keys may hold anything, NaN included.
    const float part_a = weight_a > 0 ? weight_a * semantics::load_element(a, p.dtype, i) : 0.0F;
    const float part_b = weight_b > 0 ? weight_b * semantics::load_element(b, p.dtype, i) : 0.0F;
    semantics::store_element(result, p.dtype, i, part_a + part_b);
  }
  if (p.result.lse != nullptr) {
    const_cast<float*>(
        p.result.lse)[head * p.result.lse_head_stride + token * p.result.lse_token_stride] =
        finished.lse;
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
