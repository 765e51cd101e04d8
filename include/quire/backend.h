// The serving layer in the words of vLLM's v1 backends: backend class, metadata builder, impl with
// forward(). A thin layer over attention.h for engines that are built that way.
#pragma once

#include <cstdint>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "quire/attention.h"
#include "quire/export.h"
#include "quire/kv_cache.h"
#include "quire/metadata.h"
#include "quire/types.h"

namespace quire {

class AttentionImpl;
class AttentionMetadataBuilder;
class Backend;  // src/backend.h

// What a backend can do, said by the backend itself. `quire info` prints it, and the library
// refuses calls by it: whatever is not in here throws Error naming the argument, when the layer is
// planned (members of AttentionConfig), when the batch is (those of CommonAttentionMetadata), or in
// the call (those of AttentionArgs, caches to write, states to merge). Which kernel then serves the
// call is looked up in another table: kernel_table().
struct BackendCapabilities {
  std::vector<DType> dtypes;  // of the query
  std::vector<KvCacheDType> kv_cache_dtypes;
  std::vector<DType> output_dtypes;
  std::int64_t min_head_size = 0;
  std::int64_t max_head_size = 0;
  std::int64_t head_size_multiple = 1;
  std::int64_t block_size_multiple = 1;
  std::int64_t max_block_size = 0;
  bool sinks = false;
  bool alibi = false;
  bool soft_cap = false;
  bool sliding_window = false;
  bool chunked = false;
  bool bidirectional_ranges = false;
  bool visible_prefix = false;
  bool qq_bias = false;
  bool cross_attention = false;
  bool encoder_attention = false;
  bool cascade = false;
  bool lse = false;
  bool fp8_output = false;
  bool block_scale_output = false;
  bool batch_invariant = false;
  bool graph_capture = false;
};

// A compiled kernel that a backend chooses from.
struct KernelInfo {
  std::string name;
  std::string serves;  // which calls, for people
  // The row above whose compiled code this one is, for other calls; empty: none.
  std::string same_as;
};

// One attention implementation. Objects are immutable, live for the whole process and may be used
// from any thread. Corresponds to TritonAttentionBackend's class methods.
class QUIRE_API AttentionBackend {
 public:
  virtual ~AttentionBackend() = default;

  virtual const char* name() const = 0;  // "cpu", "reference", "cuda"
  virtual DeviceType device_type() const = 0;
  // Whether this machine can run it now; if not, `instruction_set` says why.
  virtual bool available() const = 0;
  // What it runs on: "AMX", "AVX3_BF16", "AVX3", "AVX2", "NEON", "SCALAR", "sm_90", ...
  virtual std::string instruction_set() const = 0;
  virtual const BackendCapabilities& capabilities() const = 0;

  // The kernels in this build, in the order of the table that dispatch looks them up in; empty
  // where there is one kernel for all.
  virtual std::vector<KernelInfo> kernel_table() const { return {}; }

  // Why this backend cannot serve the configuration; empty means it can. Each reason reads
  // "<member>: expected <...>, got <...>", as an Error's text. Shapes, dtypes and devices of the
  // score's tensors are looked at when a plan or a layer is made of it.
  virtual std::vector<std::string> supports(const AttentionConfig& config) const = 0;

  // vLLM's get_supported_dtypes (of the query) and supported_kv_cache_dtypes.
  const std::vector<DType>& supported_dtypes() const { return capabilities().dtypes; }
  const std::vector<KvCacheDType>& supported_kv_cache_dtypes() const {
    return capabilities().kv_cache_dtypes;
  }

  // Throws Error, naming the sizes that work, on another.
  void validate_head_size(std::int64_t head_size) const;

  // vLLM's get_kv_cache_shape: [num_blocks, 2, block_size, num_kv_heads, head_size], for
  // PagedKvCache::from_combined(). The per-token-head kinds have head_size + 4, with each scale
  // behind its row (ScaleLayout::kInline); with scales in tensors of their own the shape is the one
  // of "auto". Elements are storage_dtype()'s. On a GPU blocks may have to lie further apart than
  // their size to be read at full speed: advised_block_bytes(). Throws Error on sizes below 1, on a
  // block_size or head_size that the backend cannot use (with inline scales head_size is a multiple
  // of 4, too), and on a cache_dtype_str that parse_kv_cache_dtype() or the backend does not know.
  std::vector<std::int64_t> kv_cache_shape(std::int64_t num_blocks, std::int64_t block_size,
                                           std::int64_t num_kv_heads, std::int64_t head_size,
                                           std::string_view cache_dtype_str = "auto") const;

  // A metadata builder and a layer on this backend (vLLM's get_builder_cls, get_impl_cls), for a
  // configuration whose `backend` is empty or this one's name. Errors as their constructors.
  AttentionMetadataBuilder make_builder(const AttentionConfig& config) const;
  AttentionImpl make_impl(const AttentionConfig& config,
                          std::string kv_sharing_target_layer_name = {}) const;
};

// The distance from one block of a cache to the next that a GPU reads at full speed: `block_bytes`,
// or a little more where blocks so far apart share too few of the memory's channels. An H100 loses
// 20 % of its bandwidth at multiples of 320 KiB, an H200 30 % at those of 3,008 KiB (and 9 and 15 %
// at those of a fourth and a half); blocks that hold many layers come to such distances, and a
// layer of 40 kv heads of 128 in blocks of 16. `step`: the result is `block_bytes` plus a multiple of
// it. With the distance between kv heads as the step the kernels for Hopper take the cache still.
// Throws Error on sizes outside 1 to 2^48.
QUIRE_API std::int64_t advised_block_bytes(std::int64_t block_bytes, std::int64_t step = 4096);

// All backends of this build, best first for each device.
QUIRE_API const std::vector<const AttentionBackend*>& attention_backends();
// By name. Throws Error naming the known ones.
QUIRE_API const AttentionBackend& attention_backend(std::string_view name);

// Builds AttentionMetadata once a step for all layers of one configuration.
class QUIRE_API AttentionMetadataBuilder {
 public:
  // Throws Error if the configuration is not supported.
  explicit AttentionMetadataBuilder(const AttentionConfig& config);

  // Plans the batch and fills all fields. The result, and every copy of it, shares this builder's
  // plan: it is valid until the builder plans again, by whichever function, and
  // AttentionImpl::forward() refuses it afterwards. `common_prefix_len` as in Plan::update; above 0
  // it sets use_cascade, unless the layer is batch-invariant. `fast_build` is accepted for vLLM's
  // sake (planning is already cheap enough to do every time).
  AttentionMetadata build(std::int64_t common_prefix_len, const CommonAttentionMetadata& common,
                          bool fast_build = false, const Context& ctx = {});

  // Plans metadata whose fields the caller filled, and returns it complete: with the plans, and
  // with those of the three cascade tensors that were absent. Plans in it are replaced. Throws
  // Error on fields that contradict each other: use_cascade without a common_prefix_len, a prefix
  // or cascade tensors without use_cascade, cascade tensors of another shape, dtype or device, and,
  // with ctx.check_indices, of other content than AttentionMetadata says.
  AttentionMetadata plan(const AttentionMetadata& metadata, const Context& ctx = {});

  // build() without cascade, for a graph that is captured with the result afterwards and serves
  // every later batch up to this one's num_seqs, num_actual_tokens and max_query_len: build() that
  // batch, then replay. Plan has the rules. The graph stays good; the metadata itself is valid
  // until the next build(), as any. Throws Error on a backend without graph capture
  // (BackendCapabilities): the CPU, the reference.
  AttentionMetadata build_for_cudagraph_capture(const CommonAttentionMetadata& common,
                                                const Context& ctx = {});

  const AttentionConfig& config() const { return config_; }

 private:
  AttentionConfig config_;
  std::shared_ptr<Plan> plan_;
};

// The scales a quantised model attaches to a layer (vLLM's layer._q_scale, _k_scale, _v_scale).
struct LayerScales {
  Scale q{};                 // of an fp8 query
  std::optional<Scale> k{};  // replaces the cache's k_scale; absent: the cache's own
  std::optional<Scale> v{};  // likewise v_scale
};

// One attention layer. Corresponds to TritonAttentionImpl.
class QUIRE_API AttentionImpl {
 public:
  // A layer with a non-empty `kv_sharing_target_layer_name` reads that layer's cache and never
  // writes it. Throws Error if the configuration is not supported.
  explicit AttentionImpl(const AttentionConfig& config,
                         std::string kv_sharing_target_layer_name = {});

  // Writes this step's key and value into the cache (decoder layers that own one; cross attention
  // only when key and value are given) and computes attention.
  //
  //   query     [num_tokens, num_heads, head_size]
  //   key       [num_tokens, num_kv_heads, head_size], may be absent for cross attention or a
  //             cache filled by do_kv_cache_update()
  //   value     [num_tokens, num_kv_heads, head_size_v], likewise
  //   kv_cache  this layer's cache; its dtype must be the configuration's. The k and v of `scales`,
  //             where given, replace its per-tensor scales. Ignored by encoder attention
  //   metadata  of the step, and the builder's last; null means a profiling run: output is filled
  //             with 0, nothing else done
  //   output    [num_tokens, num_heads * head_size_v] or 3-D
  //   output_scale        with an fp8 output: static scale
  //   output_block_scale  with an fp8 output: receives a scale per group of 128; not both
  //   lse       optional float32 [num_heads, num_tokens]
  //
  // Returns `output`. Errors, memory and stream behaviour as write_kv_cache() and attention(), on
  // the layer's backend: everything is checked before the cache is written.
  TensorView forward(const LayerScales& scales, const ConstTensorView& query,
                     const ConstTensorView& key, const ConstTensorView& value,
                     const PagedKvCache& kv_cache, const AttentionMetadata* metadata,
                     const TensorView& output,
                     const std::optional<Scale>& output_scale = std::nullopt,
                     const TensorView& output_block_scale = {}, const TensorView& lse = {},
                     const Context& ctx = {}) const;

  // Only the cache write of forward(), for hosts that do it separately.
  void do_kv_cache_update(const LayerScales& scales, const ConstTensorView& key,
                          const ConstTensorView& value, const PagedKvCache& kv_cache,
                          const ConstTensorView& slot_mapping, const Context& ctx = {}) const;

  const AttentionConfig& config() const { return config_; }

 private:
  AttentionConfig config_;
  const Backend* backend_;
  std::string kv_sharing_target_layer_name_;
};

}  // namespace quire
