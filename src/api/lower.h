// From public arguments to params.h, with every check on the way. Used by the functional core and
// by the backend layer, so that forward() can check all of a step before it writes anything.
#pragma once

#include "backend.h"
#include "params.h"
#include "quire/attention.h"

namespace quire::api {

LayerParams lower_layer(const AttentionConfig& config);
BatchParams lower_batch(const AttentionConfig& config, const CommonAttentionMetadata& batch,
                        std::int64_t common_prefix_len);
// `layer` and `batch` are the plan's; the result has the call's own score, if any.
AttentionParams lower_attention(const AttentionConfig& config, const LayerParams& layer,
                                const BatchParams& batch, const AttentionArgs& args);
CacheWriteParams lower_cache_write(const ConstTensorView& key, const ConstTensorView& value,
                                   const PagedKvCache& cache, const ConstTensorView& slot_mapping);

// The kind that kAuto stands for, so that a dtype spelled out equals it.
KvCacheDType spelled_out(KvCacheDType dtype, DType model_dtype);

// Checks a cache view and fills both sides.
void lower_cache(const PagedKvCache& cache, Device device, KvParams* k, KvParams* v);

// The data of index tensors and of scales (Context::check_indices), read through the backend.
void check_batch_indices(const Backend& backend, const LayerParams& layer, const BatchParams& batch,
                         const Context& ctx);
void check_call_data(const Backend& backend, const AttentionParams& params, const Context& ctx);
void check_write_data(const CacheWriteParams& params, const Context& ctx);

}  // namespace quire::api

namespace quire {

struct Plan::Impl {
  AttentionConfig config;
  const Backend* backend = nullptr;
  LayerParams layer;
  CommonAttentionMetadata batch;
  BatchParams batch_params;
  std::unique_ptr<LayerPlan> plan;
  bool planned = false;
  std::uint64_t build_number = 0;  // updates so far: metadata of an earlier one is refused
};

}  // namespace quire
