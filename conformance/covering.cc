#include "conformance/covering.h"

#include <iterator>
#include <vector>

#include "conformance/case.h"
#include "conformance/merge_case.h"
#include "conformance/runner.h"

namespace quire::conformance {
namespace {

// Sequences of 3, 9, 24 and 135 rows, one that several CTAs share, and padding: kernels of every
// kind have work.
CaseSpec layer_spec(DType model, KvCacheDType cache, std::int64_t head_size) {
  CaseSpec spec;
  spec.seed = 11;
  spec.model_dtype = spec.config.dtype = model;
  spec.config.num_heads = 6;
  spec.config.num_kv_heads = 2;
  spec.config.head_size = head_size;
  spec.config.block_size = 16;
  spec.config.kv_cache_dtype = cache;
  spec.sequences = {{1, 70}, {45, 90}, {0, 5}, {1, 3300}, {3, 17}, {8, 60}};
  spec.padded_sequences = 1;
  spec.padded_rows = 2;
  return spec;
}

CaseSpec with_soft_cap(CaseSpec spec) {
  spec.config.score.soft_cap = 20.0F;
  return spec;
}

// Every instance of the tensor-core kernels: dtype, storage, head bucket, plain and modified
// scores.
void add_instances(std::vector<CaseSpec>* specs) {
  for (const DType model : {DType::kBFloat16, DType::kFloat16}) {
    for (const KvCacheDType cache : {KvCacheDType::kAuto, KvCacheDType::kFp8E4M3}) {
      for (const std::int64_t head_size : {40, 128, 200, 576}) {
        const CaseSpec spec = layer_spec(model, cache, head_size);
        specs->push_back(spec);
        specs->push_back(with_soft_cap(spec));
      }
    }
  }
}

// Kernels of single head sizes, by how many query heads share a kv head: few rows in tiles of each
// size, many rows.
void add_groups(std::vector<CaseSpec>* specs) {
  for (const DType model : {DType::kBFloat16, DType::kFloat16}) {
    for (const std::int64_t head_size : {64, 128}) {
      for (const std::int64_t group : {4, 5, 8, 12, 20, 28}) {
        CaseSpec spec = layer_spec(model, KvCacheDType::kAuto, head_size);
        spec.config.num_heads = 2 * group;
        spec.sequences = {{1, 70}, {2, 90}, {5, 200}, {1, 1300}, {20, 60}};
        specs->push_back(spec);
        if (group > 4) continue;
        // Without a long query, which the kernels of mixed batches would take together with these;
        // and with one, beside items that are cut.
        spec.sequences = {{1, 70}, {2, 90}, {5, 200}, {1, 1300}};
        specs->push_back(spec);
        // Sequences of one token, which no kernels but those of the fewest rows are launched for.
        spec.sequences = {{1, 70}, {1, 90}, {1, 200}, {1, 1300}};
        specs->push_back(spec);
        specs->back().max_query_len = 1;
        spec.sequences = {{1, 9000}, {100, 400}, {1, 30}, {60, 2000}};
        specs->push_back(spec);
      }
    }
    // Caches that no tensor map fits.
    for (const std::int64_t head_size : {64, 128, 256}) {
      specs->push_back(layer_spec(model, KvCacheDType::kAuto, head_size));
      specs->back().page_padding = 3;
      specs->back().storage_offset = 1;
    }
    specs->push_back(layer_spec(model, KvCacheDType::kFp8E4M3, 128));
    specs->back().page_padding = 3;
    specs->back().storage_offset = 1;
    CaseSpec spec = layer_spec(model, KvCacheDType::kAuto, 256);
    specs->push_back(spec);
    specs->push_back(with_soft_cap(spec));
    spec.config.num_heads = 4;
    spec.sequences = {{1, 70}, {2, 90}, {5, 200}, {1, 1300}, {8, 1100}};
    specs->push_back(spec);
    specs->push_back(with_soft_cap(spec));
  }
}

// Windows whose keys are multiplied at once: more than an item's tokens, whole and cut at the
// sequence's start, tails, keys before every window, blocks that do not exist; groups that fill the
// rows of a product and groups that do not.
void add_windows(std::vector<CaseSpec>* specs) {
  for (const DType model : {DType::kBFloat16, DType::kFloat16}) {
    for (const std::int64_t group : {3, 5, 8, 20}) {
      CaseSpec spec = layer_spec(model, KvCacheDType::kAuto, 64);
      spec.config.num_heads = 2 * group;
      spec.config.mask = Mask::sliding_window(group == 3 ? 50 : 128);
      spec.sequences = {{300, 300}, {1, 200}, {141, 500}, {20, 387}, {0, 5}, {40, 40}};
      spec.sinks = true;
      spec.lse = group == 5;
      spec.wild_blocks = group == 8 ? 2 : 0;
      specs->push_back(spec);
    }
  }
}

// The same over 8-bit caches, each kind with several groups.
void add_byte_groups(std::vector<CaseSpec>* specs) {
  constexpr KvCacheDType kCaches[] = {KvCacheDType::kFp8E4M3, KvCacheDType::kInt8PerTokenHead,
                                      KvCacheDType::kFp8E5M2, KvCacheDType::kFp8E4M3PerTokenHead};
  std::size_t next = 0;
  for (const DType model : {DType::kBFloat16, DType::kFloat16}) {
    for (const std::int64_t head_size : {64, 128}) {
      for (const std::int64_t group : {4, 5, 8, 12, 20}) {
        CaseSpec spec = layer_spec(model, kCaches[next++ % std::size(kCaches)], head_size);
        spec.config.num_heads = 2 * group;
        spec.config.block_size = next % 2 == 0 ? 16 : 32;
        spec.sequences = {{1, 70}, {2, 90}, {5, 200}, {1, 1300}, {20, 60}};
        specs->push_back(spec);
      }
    }
  }
}

// Many rows over fp8 caches: long contexts, windows, blocks that do not exist, blocks of 16 and of 128 tokens.
void add_byte_prefill(std::vector<CaseSpec>* specs) {
  for (const DType model : {DType::kBFloat16, DType::kFloat16}) {
    for (const KvCacheDType cache : {KvCacheDType::kFp8E4M3, KvCacheDType::kFp8E5M2}) {
      for (const std::int64_t head_size : {64, 128}) {
        CaseSpec spec = layer_spec(model, cache, head_size);
        const bool e5m2 = cache == KvCacheDType::kFp8E5M2;
        spec.config.num_heads = 2 * (e5m2 ? 4 : 7);
        spec.config.block_size = head_size == 64 ? 16 : 128;
        spec.sequences = {{60, 700}, {130, 130}, {1, 70}, {40, 1500}, {0, 5}, {33, 33}};
        spec.wild_blocks = e5m2 ? 2 : 0;
        if (e5m2) spec.config.mask = Mask::sliding_window(150);
        spec.sinks = spec.lse = !e5m2;
        specs->push_back(spec);
      }
    }
  }
}

void add_storage(std::vector<CaseSpec>* specs) {
  for (const KvCacheDType cache :
       {KvCacheDType::kInt8PerTokenHead, KvCacheDType::kFp8E4M3PerTokenHead, KvCacheDType::kFp8E5M2,
        KvCacheDType::kInt4PerTokenHead}) {
    specs->push_back(layer_spec(DType::kBFloat16, cache, 128));
  }
  // Rotations of every kind: one block, several, one of 512 elements, K and V apart; split, shared.
  CaseSpec spec = layer_spec(DType::kFloat32, KvCacheDType::kInt4PerTokenHead, 72);
  spec.config.head_size_v = 26;
  spec.inline_scales = true;
  specs->push_back(spec);
  spec = layer_spec(DType::kFloat16, KvCacheDType::kInt4PerTokenHead, 576);
  spec.config.head_size_v = 512;
  specs->push_back(spec);
  spec = layer_spec(DType::kFloat16, KvCacheDType::kInt4PerTokenHead, 64);
  spec.sequences = {{1, 300}, {1, 290}, {2, 280}};
  spec.shared_prefix_len = spec.announced_prefix_len = 256;
  spec.output_dtype = DType::kFloat8E4M3;
  spec.block_scale = true;
  specs->push_back(spec);
  spec = layer_spec(DType::kFloat16, KvCacheDType::kFp8E4M3, 64);
  spec.config.dtype = DType::kFloat8E4M3;
  specs->push_back(spec);
  for (const KvCacheDType cache : {KvCacheDType::kAuto, KvCacheDType::kFp8E4M3,
                                   KvCacheDType::kBFloat16, KvCacheDType::kInt8PerTokenHead}) {
    spec = layer_spec(DType::kFloat32, cache, 72);
    spec.config.head_size_v = 24;
    specs->push_back(spec);
  }
  // Rows that no wide copy fits.
  for (const CacheLayout layout :
       {CacheLayout::kHnd, CacheLayout::kPacked, CacheLayout::kPackedNhd, CacheLayout::kSeparate}) {
    spec = layer_spec(DType::kBFloat16, KvCacheDType::kAuto, 56);
    spec.layout = layout;
    spec.config.head_size_v = layout == CacheLayout::kHnd ? 0 : 41;
    spec.page_padding = 3;
    spec.storage_offset = 1;
    spec.strided_query = spec.output_strided = spec.output_3d = true;
    specs->push_back(spec);
  }
}

void add_masks(std::vector<CaseSpec>* specs) {
  const CaseSpec plain = layer_spec(DType::kBFloat16, KvCacheDType::kAuto, 64);
  for (const Mask& mask : {Mask::sliding_window(33), Mask::chunked(64, 1)}) {
    specs->push_back(plain);
    specs->back().config.mask = mask;
    specs->back().sinks = true;
  }
  CaseSpec spec = plain;
  spec.alibi = spec.causal_flags = spec.ranges = spec.visible_prefixes = true;
  spec.qq_bias_size = 5;
  spec.sequences[1].ranges = {{50, 80}};
  spec.sequences[3].causal = false;
  spec.sequences[3].visible_prefix = 20;
  specs->push_back(spec);
  for (const AttentionType type : {AttentionType::kEncoder, AttentionType::kEncoderDecoder}) {
    spec = plain;
    spec.config.type = type;
    spec.config.mask.causal = false;
    if (!spec.has_cache()) spec.sequences = {{45, 45}, {1, 1}, {7, 7}};
    specs->push_back(spec);
  }
}

void add_plans_and_outputs(std::vector<CaseSpec>* specs) {
  const CaseSpec plain = layer_spec(DType::kBFloat16, KvCacheDType::kAuto, 64);
  for (const bool block_scale : {false, true}) {
    specs->push_back(plain);
    specs->back().output_dtype = DType::kFloat8E4M3;
    specs->back().block_scale = block_scale;
    specs->back().scales_in_memory = true;
  }
  specs->push_back(plain);
  specs->back().config.batch_invariant = true;
  specs->back().sequences = {{1, 2500}, {2, 1300}};
  // More parts of an item than a warp has lanes.
  specs->push_back(plain);
  specs->back().sequences = {{1, 20000}, {3, 900}};
  specs->push_back(plain);
  specs->back().sequences = {{1, 300}, {1, 290}, {2, 280}};
  specs->back().shared_prefix_len = specs->back().announced_prefix_len = 256;
  // Long enough for shared prefixes to be looked for.
  specs->push_back(plain);
  specs->back().sequences = {{1, 6000}, {1, 5990}, {2, 5980}};
  specs->back().shared_prefix_len = 5760;
}

constexpr DType kMergeDTypes[] = {DType::kFloat32, DType::kFloat16, DType::kBFloat16};

// The kernel that looks for shared prefixes runs outside graphs only, so a capture does not show
// it: the plan says whether it ran.
void add_uncaptured(const Plan& plan, std::set<std::string>* kernels) {
  if (plan.to_string().find("find_partners") != std::string::npos) kernels->insert("find_partners");
}

void launch(DeviceCase* on_device, AttentionMetadataBuilder* builder, const Case& c,
            const Context& context) {
  const AttentionMetadata metadata =
      builder->build(c.spec.announced_prefix_len, on_device->batch(), false, context);
  DeviceBuffers& buffers = on_device->buffers();
  const AttentionArgs args = on_device->args();
  if (c.spec.has_cache() && c.spec.write) {
    write_kv_cache(buffers.view(c.key), buffers.view(c.value), args.kv_cache,
                   buffers.view(c.slot_mapping), context);
  }
  attention(*metadata.scheduler_metadata, args, context);
}

std::vector<CaseSpec> covering_specs() {
  std::vector<CaseSpec> specs;
  add_instances(&specs);
  add_groups(&specs);
  add_windows(&specs);
  add_byte_groups(&specs);
  add_byte_prefill(&specs);
  add_storage(&specs);
  add_masks(&specs);
  add_plans_and_outputs(&specs);
  return specs;
}

}  // namespace

std::int64_t num_covering_cases() {
  return static_cast<std::int64_t>(covering_specs().size() + std::size(kMergeDTypes));
}

std::set<std::string> run_covering(const AttentionBackend& backend,
                                   const std::function<void(const std::string&)>& tell) {
  DeviceMemory& memory = memory_of(backend.device_type());
  std::set<std::string> kernels;
  for (const CaseSpec& spec : covering_specs()) {
    const Case c = build_case(spec);
    const std::string problem = run_case(c, backend);
    tell(problem.empty() ? "" : problem + "\n  " + describe(spec));
    DeviceCase on_device(c, backend);
    AttentionMetadataBuilder builder(on_device.config());
    const AttentionMetadata metadata = builder.build(spec.announced_prefix_len, on_device.batch());
    add_uncaptured(*metadata.scheduler_metadata, &kernels);
    memory.synchronize();
    kernels.merge(memory.launched_kernels(
        [&](const Context& context) { launch(&on_device, &builder, c, context); }));
  }
  for (const DType dtype : kMergeDTypes) {
    MergeCase merge({.dtype = dtype}, &memory);
    merge.merge({});
    tell(merge.problem());
    kernels.merge(memory.launched_kernels([&](const Context& context) { merge.merge(context); }));
  }
  return kernels;
}

}  // namespace quire::conformance
