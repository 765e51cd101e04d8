// From public arguments to params.h, with every check on the way: shapes, dtypes, devices, and what
// the backend says that it can do. Used by the functional core and by the backend layer, so that
// forward() can check all of a step before it writes anything.
#pragma once

#include "backend.h"
#include "params.h"
#include "quire/attention.h"

namespace quire::api {

// The backend that serves a layer; Error with its reasons if none does.
const Backend& backend_of(const AttentionConfig& config);
// Context::backend must not name another than the plan's or the layer's.
void check_backend(const Backend& backend, const Context& ctx);

// `caps`: of the backend that will run it.
LayerParams lower_layer(const AttentionConfig& config, const BackendCapabilities& caps);
BatchParams lower_batch(const AttentionConfig& config, const BackendCapabilities& caps,
                        const CommonAttentionMetadata& batch, std::int64_t common_prefix_len);
// `layer` and `batch` are the plan's; the result has the call's own score, if any.
AttentionParams lower_attention(const AttentionConfig& config, const BackendCapabilities& caps,
                                const LayerParams& layer, const BatchParams& batch,
                                const AttentionArgs& args);
CacheWriteParams lower_cache_write(const BackendCapabilities& caps, const ConstTensorView& key,
                                   const ConstTensorView& value, const PagedKvCache& cache,
                                   const ConstTensorView& slot_mapping);
MergeParams lower_merge(const BackendCapabilities& caps, const ConstTensorView& o_a,
                        const ConstTensorView& lse_a, const ConstTensorView& o_b,
                        const ConstTensorView& lse_b, const TensorView& output,
                        const TensorView& lse);

// parse_kv_cache_dtype() of an argument of another name.
KvCacheDType parse_cache_dtype(std::string_view text, const char* argument);

// The kind that kAuto stands for, so that a dtype spelled out equals it.
KvCacheDType spelled_out(KvCacheDType dtype, DType model_dtype);

// Checks a cache view and fills both sides.
void lower_cache(const PagedKvCache& cache, Device device, KvParams* k, KvParams* v);

// The data of index tensors and of scales (Context::check_indices), read through the backend.
void check_batch_indices(const Backend& backend, const LayerParams& layer, const BatchParams& batch,
                         const Context& ctx);
void check_cascade_data(const Backend& backend, const LayerParams& layer, const BatchParams& batch,
                        const AttentionMetadata& metadata, const Context& ctx);
void check_call_data(const Backend& backend, const AttentionParams& params, const Context& ctx);
void check_write_data(const Backend& backend, const CacheWriteParams& params, const Context& ctx);

// lower_cache_write() with a look at the data, where ctx asks for it; and the work.
CacheWriteParams checked_cache_write(const Backend& backend, const ConstTensorView& key,
                                     const ConstTensorView& value, const PagedKvCache& cache,
                                     const ConstTensorView& slot_mapping, const Context& ctx);
void run_cache_write(const Backend& backend, const CacheWriteParams& params, const Context& ctx);

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

  // A batch, everything checked; and the update of the plan with it.
  BatchParams lower(const CommonAttentionMetadata& batch, std::int64_t common_prefix_len,
                    const Context& ctx) const;
  void update(const CommonAttentionMetadata& batch, const BatchParams& params, const Context& ctx);
  // One attention call, everything checked; and its work.
  AttentionParams lower(const AttentionArgs& args, const Context& ctx) const;
  void attend(const AttentionParams& params, const Context& ctx) const;
};

}  // namespace quire
