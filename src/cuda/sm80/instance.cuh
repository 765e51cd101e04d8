// What the translation unit of an instance consists of: CMake writes one for each line of
// instances.def, which includes this file and names the instance with one of the macros below.
#pragma once

#include "cuda/sm80/decode/attention.cuh"
#include "cuda/sm80/kernels.h"
#include "cuda/sm80/policy.h"
#include "cuda/sm80/prefill/attention.cuh"

namespace quire::cuda::sm80 {

// The words of instances.def.
enum class Phase { decode, prefill };
enum class Compute { fp16, bf16 };

template <Phase, class Type, bool kKv8, int kHeadSize, int kRows, bool kScoreMod>
struct Kernel;

template <class Type, bool kKv8, int kHeadSize, int kRows, bool kScoreMod>
struct Kernel<Phase::decode, Type, kKv8, kHeadSize, kRows, kScoreMod> {
  using Config = DecodeConfig<Type, kKv8, kHeadSize, kRows, kScoreMod>;
  static Instance instance(const char* name) {
    Instance instance;
    instance.name = name;
    instance.function = reinterpret_cast<const void*>(&attention_decode<Config>);
    instance.threads = kDecodeThreads;
    instance.shared_bytes = [](int stages) { return decode_shared_bytes<Config>(stages); };
    instance.max_pipeline_stages = Config::kMaxStages;
    instance.powers_of_two = true;
    return instance;
  }
  static void describe(AttentionKernel* row) {
    row->key.max_rows = kRows;
    row->kv_chunks = true;
  }
};

template <class Type, bool kKv8, int kHeadSize, bool kScoreMod>
struct Kernel<Phase::prefill, Type, kKv8, kHeadSize, 0, kScoreMod> {
  using Config = PrefillConfig<Type, kKv8, kHeadSize, kScoreMod>;
  static Instance instance(const char* name) {
    Instance instance;
    instance.name = name;
    instance.function = reinterpret_cast<const void*>(&attention_prefill<Config>);
    instance.threads = Config::kThreads;
    instance.shared_bytes = [](int stages) { return prefill_shared_bytes<Config>(stages); };
    instance.max_pipeline_stages = Config::kMaxStages;
    return instance;
  }
  static void describe(AttentionKernel* row) {
    row->whole_items = true;
    row->shared_prefix = true;
  }
};

// A row of the table. The name is part of the type, so that prepare and launch are plain functions.
template <Phase kPhase, Compute kCompute, bool kKv8, int kHeadSize, int kRows, bool kScoreMod,
          const char* kName>
AttentionKernel make_row() {
  constexpr bool kHalf = kCompute == Compute::fp16;
  using Type = std::conditional_t<kHalf, ptx::Half, ptx::BFloat16>;
  using Row = Kernel<kPhase, Type, kKv8, kHeadSize, kRows, kScoreMod>;
  AttentionKernel row;
  row.key.compute = kHalf ? DType::kFloat16 : DType::kBFloat16;
  row.key.kv8 = kKv8;
  row.key.max_head_size = kHeadSize;
  row.key.min_head_size_v = kMinHeadSizeV;
  row.key.plain = !kScoreMod;
  row.key.score_mod = kScoreMod;
  row.name = kName;
  row.policy = policy_of<typename Row::Config>();
  Row::describe(&row);
  row.prepare = [](const LayerParams&, const DeviceInfo& device, Launch* launch) {
    return sm80::prepare(Row::instance(kName), device, launch);
  };
  row.launch = [](const Launch& launch, int grid, const KernelParams& params, cudaStream_t stream) {
    sm80::launch(Row::instance(kName), launch, grid, params, stream);
  };
  return row;
}

}  // namespace quire::cuda::sm80

#define QUIRE_KERNEL(function, phase, compute, kv8, head_size, rows, score_mod)      \
  namespace quire::cuda::sm80 {                                                      \
  static constexpr char k_##function[] = "sm80::" #function;                         \
  AttentionKernel function() {                                                       \
    return make_row<Phase::phase, Compute::compute, kv8, head_size, rows, score_mod, \
                    k_##function>();                                                 \
  }                                                                                  \
  }
