// The window kernel as rows of the kernel table.
#pragma once

#include "cuda/sm90/instance.cuh"
#include "cuda/sm90/window/attention.cuh"

namespace quire::cuda::sm90 {

template <class Type, int kHeadSize>
struct Kernel<Phase::window, Type, false, kHeadSize, 0, false> {
  using Config = WindowConfig<Type, kHeadSize>;
  static_assert(window_shared_bytes<Config>() <= 227 * 1024);
  static Instance instance(const char* name) {
    Instance instance;
    instance.name = name;
    instance.function = reinterpret_cast<const void*>(&attention_window<Config>);
    instance.threads = Config::kThreads;
    instance.shared_bytes = window_shared_bytes<Config>();
    instance.tile_keys = kPageKeys;
    instance.box_tokens = step_tokens;
    return instance;
  }
  static void describe(AttentionKernel* row) {
    row->whole_items = true;
    row->policy = window_policy<Config>();
  }
  static bool takes(const LayerParams& layer) { return takes_window(layer); }
  static bool takes(const KernelParams& p) {
    // The window is the only mask.
    return p.layer.alibi_slopes == nullptr && p.batch.qq_bias == nullptr &&
           p.batch.causal == nullptr && p.batch.num_ranges == 0 &&
           p.batch.visible_prefix_lens == nullptr && !p.batch.has_positions() && row_maps_fit(p);
  }
};

}  // namespace quire::cuda::sm90
