// The functional core: plan a batch once a step, then run attention over it once a layer.
//
//     quire::Plan plan(config);                    // once
//     plan.update(batch);                          // once a step, after scheduling
//     quire::write_kv_cache(k, v, cache, slots);   // once a layer
//     quire::attention(plan, {.query = q, .kv_cache = cache, .output = out});
//
// The algorithm is FlashAttention's (Dao et al., 2022; 2023) over a paged cache, with split-KV
// (Flash-Decoding) and work ranges of equal cost (stream-K; FlashMLA's scheduler).
#pragma once

#include <cstdint>
#include <memory>
#include <string>

#include "quire/export.h"
#include "quire/kv_cache.h"
#include "quire/mask.h"
#include "quire/metadata.h"
#include "quire/score.h"
#include "quire/types.h"

namespace quire {

// What does not change from step to step: the layer and its cache.
struct AttentionConfig {
  Device device{};

  // Dtype of the query: fp16, bf16, fp32; kFloat8E4M3 for a quantised query over an fp8 cache.
  DType dtype = DType::kBFloat16;

  std::int64_t num_heads = 0;     // 1 to 65536
  std::int64_t num_kv_heads = 0;  // divides num_heads; the group need not be a power of two
  std::int64_t head_size = 0;     // of Q and K; 8 to 576
  std::int64_t head_size_v = 0;   // of V and the output; 0 means head_size

  AttentionType type = AttentionType::kDecoder;
  Mask mask{};
  Score score{};

  // Tokens of a block, 1 to 2^20. Not used by encoder and encoder-only attention.
  std::int64_t block_size = 16;
  // kAuto is the same as the dtype of the query spelled out.
  KvCacheDType kv_cache_dtype = KvCacheDType::kAuto;

  // A sequence's output bits depend on that sequence alone: its query_len and seq_len of this step,
  // its data and the layer; not on its neighbours, its place, padding, or how earlier steps chunked
  // it into the cache. Switches cascade off. (He et al., "Defeating Nondeterminism in LLM
  // Inference", 2025.)
  //
  // Not promised: that a token has the same bits in steps of another query_len (prefilled at once
  // or in chunks, decoded, verified as a draft), since kernels are chosen and keys cut by it. CPU:
  // the bits are the same in all steps that give the sequence more than 64 query rows, query_len *
  // num_heads / num_kv_heads. CUDA: rely on nothing.
  bool batch_invariant = false;

  // Look for shared prefixes in the block tables and read them once (cascade), also when nobody
  // announced one. Never done when batch_invariant is set. CUDA: found on the device, where they
  // save enough to pay for a launch of their own on every call; neither found nor announced ones
  // are used with a window, in a captured graph's plan, and in batches planned in its buffers.
  bool auto_cascade = true;

  // "" picks the best backend of the device ("cpu", "cuda"); "reference" is float64 plain loops.
  // The environment variable QUIRE_BACKEND overrides "".
  std::string backend{};

  std::int64_t value_head_size() const { return head_size_v != 0 ? head_size_v : head_size; }
};

// How a batch is cut into work. Holds the workspace of the calls that use it, so one plan serves
// one call at a time; plans are cheap to keep. Memory is taken by the first updates and calls that
// need it, and by larger ones later; steady-state updates and calls allocate nothing.
//
// CUDA: a call lasts until the device has done its work, and the plan itself lies on the device. So
// updates and calls of one plan go to one stream, or to several that wait for each other (events):
// on two streams without that they would write the same workspace at the same time. Destroy a plan
// when its work is done.
//
// CUDA graphs: update(), write_kv_cache(), attention() and merge_states() may be captured.
//   - Warm up first: memory is never taken in a capture. The plan must have run an update and a
//     call of this size and kind (block-scale output is one) before; else Error names "stream".
//   - A graph keeps the addresses of its tensors and of the plan's workspace, and serves all
//     batches up to the num_seqs (block_table's rows), num_actual_tokens and max_query_len that it
//     was captured with. Shorter ones are padded to it (see CommonAttentionMetadata).
//   - A captured update() plans what the tensors hold at each replay. If only calls were captured,
//     update() the plan before each replay, with a batch of up to that size.
//   - Shared prefixes are not used by a graph that has its update() in it.
class QUIRE_API Plan {
 public:
  // Validates the configuration. Throws Error if no backend of the device supports it: the error
  // names the first member that does not fit, and its text lists the others too (see
  // AttentionBackend::supports).
  explicit Plan(const AttentionConfig& config);
  ~Plan();
  // Every function throws Error ("plan") on a plan that was moved from.
  Plan(Plan&&) noexcept;
  Plan& operator=(Plan&&) noexcept;

  // Plans a batch. Keeps views of the batch's tensors. `common_prefix_len` > 0 announces that all
  // sequences' block tables start with the same blocks up to that many tokens (rounded down to
  // whole blocks); it must be 0 for attention without a cache. CPU: reads the tensors now; under
  // 0.2 us a sequence. CUDA: queues one kernel on ctx.stream, two where it looks for shared
  // prefixes, and reads the tensors there. Throws Error on wrong shapes, dtypes, devices, and on
  // what the backend's capabilities lack; the plan then is what it was.
  void update(const CommonAttentionMetadata& batch, std::int64_t common_prefix_len = 0,
              const Context& ctx = {});

  const AttentionConfig& config() const;
  const CommonAttentionMetadata& batch() const;
  // The backend that serves it: "cpu", "cuda", "reference".
  const char* backend_name() const;

  // Bytes of workspace held now; the host's own lists of work are not counted. Whatever the
  // sequence lengths, at most the sum of
  //   - tiles of floats for each thread, on CUDA for each CTA that fits on the device at once;
  //   - cascade: num_tokens x num_heads x (head_size_v + 2) floats for the tokens that share a
  //     prefix. CUDA: for up to 2048 tokens, of sequences of few query rows, from the first batch
  //     on that may share; and 4 bytes a sequence for AttentionMetadata's cascade tensors;
  //   - output_block_scale: num_tokens x num_heads x head_size_v floats, from the first call on
  //     that asks for it;
  //   - CUDA: the plan itself, some bytes a sequence and a tile of query rows.
  // CUDA sizes by num_seqs and num_tokens rounded up to powers of two, and once more for each size
  // that a graph was captured with.
  std::int64_t workspace_bytes() const;

  // For people and for tests. CPU: one line for each work tile and each work range. CUDA, where the
  // plan is not read back: one line for each kernel that may serve the layer. Reference: one line.
  std::string to_string() const;

  struct Impl;  // src/api
  Impl& impl() const;

 private:
  std::unique_ptr<Impl> impl_;
};

// A new plan for one batch; the same as constructing and updating one.
QUIRE_API Plan plan(const AttentionConfig& config, const CommonAttentionMetadata& batch,
                    std::int64_t common_prefix_len = 0, const Context& ctx = {});

// The tensors of one attention call. Absent views are default-constructed. What is a
// ConstTensorView is only read.
struct AttentionArgs {
  // [>= num_actual_tokens, num_heads, head_size], the plan's dtype, unit last stride.
  ConstTensorView query{};

  // Decoder and cross attention: the cache, already holding this step's tokens. Only read.
  PagedKvCache kv_cache{};
  // Encoder and encoder-only attention: K and V themselves, [num_kv_tokens, num_kv_heads,
  // head_size(_v)], the plan's dtype, unit last stride.
  ConstTensorView key{};
  ConstTensorView value{};

  // [>= num_actual_tokens, num_heads * head_size_v] or [.., num_heads, head_size_v], unit last
  // stride: fp16, bf16, fp32, or kFloat8E4M3 with output_scale or output_block_scale. Written for
  // the rows that belong to a sequence and are < num_actual_tokens; nothing else is touched. A row
  // that sees no key gets 0.
  TensorView output{};

  // This layer's own scale, cap, slopes and sinks, where layers share a plan; null: the plan's.
  const Score* score = nullptr;

  // Optional result: float32 [num_heads, >= num_actual_tokens], natural logarithm of the softmax
  // denominator, sink included. -inf for a row that sees no key and has no sink. NaN for a row that
  // sees a NaN score.
  TensorView lse{};

  // Scale of an fp8 query.
  Scale q_scale{};

  // fp8 output, one of:
  // static: output = saturate(x / output_scale), divided, not multiplied with an inverse
  bool has_output_scale = false;
  Scale output_scale{};
  // dynamic, in groups of 128 of the token's flattened row: s = max(absmax / 448, tiny), output =
  // saturate(x / s); this view receives s: float32 [>= num_actual_tokens, ceil(row / 128)].
  TensorView output_block_scale{};
};

// Attention of one layer over the planned batch. CPU: done on return. CUDA: queued on ctx.stream.
// Memory: reads query, the needed parts of the cache and the batch's tensors; writes output, lse,
// output_block_scale and the plan's workspace. Throws Error before anything is written; OutOfMemory
// and std::runtime_error if a device fails.
QUIRE_API void attention(const Plan& plan, const AttentionArgs& args, const Context& ctx = {});

// Merges two attention results over disjoint keys, (o_a, lse_a) and (o_b, lse_b):
//   lse = logaddexp(lse_a, lse_b),  o = o_a exp(lse_a - lse) + o_b exp(lse_b - lse)
// A part with lse = -inf contributes nothing, whatever its o holds. o: [num_tokens, num_heads,
// head_size_v] fp16/bf16/fp32, one dtype for all three; lse: float32 [num_heads, num_tokens].
// `output` may alias o_a or o_b, `lse` (optional) lse_a or lse_b. Attention sinks belong to exactly
// one part. The result is attention over all the keys only if each part was computed with the
// positions that keys and queries have in the whole sequence: where causality, windows or ALiBi go
// by them, a part over the second half of a cache, or over every other key, needs
// CommonAttentionMetadata's kv_offset, kv_stride and q_offset. (Section 2.2 of FlashInfer, Ye et
// al., 2025; vLLM's merge_attn_states.)
//
// Runs on the device of o_a, on the backend that ctx.backend names. CPU: done on return. CUDA:
// queued on ctx.stream. Reads the parts, writes output and lse, allocates nothing. Throws Error
// before anything is written.
QUIRE_API void merge_states(const ConstTensorView& o_a, const ConstTensorView& lse_a,
                            const ConstTensorView& o_b, const ConstTensorView& lse_b,
                            const TensorView& output, const TensorView& lse = {},
                            const Context& ctx = {});

}  // namespace quire
