// The decode kernel as rows of the kernel table.
#pragma once

#include "cuda/sm90/decode/attention.cuh"
#include "cuda/sm90/instance.cuh"

namespace quire::cuda::sm90 {

template <class Type, bool kKv8, int kHeadSize, int kRows, bool kScoreMod>
struct Kernel<Phase::decode, Type, kKv8, kHeadSize, kRows, kScoreMod> {
  using Config = DecodeConfig<Type, kKv8, kHeadSize, kRows, kScoreMod>;
  static_assert(sizeof(DecodeShared<Config>) <= kDecodeSharedBytes<Config>);
  static Instance instance(const char* name) {
    Instance instance;
    instance.name = name;
    instance.function = reinterpret_cast<const void*>(&attention_decode<Config>);
    instance.threads = Config::kThreads;
    instance.shared_bytes = sizeof(DecodeShared<Config>);
    instance.tile_keys = kKvTile;
    return instance;
  }
  static void describe(AttentionKernel* row) {
    row->key.max_rows = kRows;
    row->kv_chunks = true;
    row->awaits_partials = true;
    row->policy = decode_policy<Config>();
  }
  static bool takes(const KernelParams& p) {
    // Of modified scores those with a soft cap alone.
    return p.batch.qq_bias == nullptr;
  }
  static bool takes(const LayerParams& layer) {
    return size_of(layer.dtype) == 2 && decode_rows_fit(kRows, layer.group) &&
           layer.alibi_slopes == nullptr;
  }
};

}  // namespace quire::cuda::sm90
