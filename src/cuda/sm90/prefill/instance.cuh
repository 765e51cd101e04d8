// The prefill kernel as rows of the kernel table.
#pragma once

#include "cuda/sm90/instance.cuh"
#include "cuda/sm90/policy.h"
#include "cuda/sm90/prefill/attention.cuh"

namespace quire::cuda::sm90 {

template <class Type, bool kKv8, int kHeadSize, bool kScoreMod>
struct Kernel<Phase::prefill, Type, kKv8, kHeadSize, 0, kScoreMod> {
  using Config = PrefillConfig<Type, kKv8, kHeadSize, kScoreMod>;
  static Instance instance(const char* name) {
    Instance instance;
    instance.name = name;
    instance.function = reinterpret_cast<const void*>(&attention_prefill<Config>);
    instance.threads = Config::kThreads;
    instance.shared_bytes = prefill_shared_bytes<Config>();
    instance.tile_keys = Config::kKeys;
    static_assert(prefill_shared_bytes<Config>() <= 227 * 1024);
    return instance;
  }
  static void describe(AttentionKernel* row) {
    row->key.token_scales = !Config::kKv8;
    row->whole_items = true;
    row->shared_prefix = true;
    row->policy = prefill_policy<Config>();
  }
  static bool takes(const LayerParams& layer) { return size_of(layer.dtype) == 2; }
  static bool takes(const KernelParams& p) {
    // Of modified scores those with a soft cap alone.
    return p.layer.alibi_slopes == nullptr && p.batch.qq_bias == nullptr;
  }
};

}  // namespace quire::cuda::sm90
