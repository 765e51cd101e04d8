// The mixed kernel as rows of the kernel table.
#pragma once

#include <string>

#include "cuda/sm90/decode/instance.cuh"
#include "cuda/sm90/instance.cuh"
#include "cuda/sm90/mixed/attention.cuh"
#include "cuda/sm90/policy.h"

namespace quire::cuda::sm90 {

template <class Type, int kHeadSize, int kRows>
struct Kernel<Phase::mixed, Type, false, kHeadSize, kRows, false> {
  using Decode = TeamConfig<Type, kHeadSize, kRows>;
  using Prefill = PrefillConfig<Type, false, kHeadSize, false>;
  using Config = MixedConfig<Prefill, Decode>;
  static_assert(sizeof(DecodeShared<Decode>) <= kDecodeSharedBytes<Decode>);
  static Instance instance(const char* name) {
    Instance instance;
    instance.name = name;
    instance.function = reinterpret_cast<const void*>(&attention_mixed<Config>);
    instance.threads = Config::kThreads;
    instance.shared_bytes =
        std::max(prefill_shared_bytes<Prefill>(), kDecodeTeams * kDecodeSharedBytes<Decode>);
    instance.tile_keys = kKvTile;
    instance.tile_keys_beside = Prefill::kKeys;
    return instance;
  }
  static void describe(AttentionKernel* row) {
    Kernel<Phase::decode, Type, false, kHeadSize, kRows, false>::describe(row);
    static const std::string beside = std::string("sm90::prefill_") +
                                      (std::is_same_v<Type, ptx::Half> ? "fp16" : "bf16") + "_d" +
                                      std::to_string(kHeadSize);
    row->beside = beside.c_str();
    row->beside_policy = prefill_policy<Prefill>();
  }
  static bool takes(const KernelParams&) { return true; }
  static bool takes(const LayerParams& layer) { return decode_rows_fit(kRows, layer.group); }
};

}  // namespace quire::cuda::sm90
