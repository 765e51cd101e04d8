// What one batch looks like, in the words of vLLM's v1 attention metadata.
#pragma once

#include <cstdint>
#include <memory>

#include "quire/types.h"

namespace quire {

class Plan;

// One step's batch, as a scheduler hands it to every attention layer. All tensors are on the
// layer's device; a view only, the memory must stay unchanged until the last attention call of the
// step. Sequence s has the query rows [query_start_loc[s], query_start_loc[s + 1]); its row i sits
// at absolute position seq_lens[s] - query_len + i, its key j at position j, unless the batch gives
// other positions (kv_offset and what follows it).
//
// Padding: padded sequences have seq_len 0 (or an empty row range) and any table entries, of which
// none is read; rows they own below num_actual_tokens see no key and get 0. Padded tokens have slot
// -1 and are not written to the cache.
struct CommonAttentionMetadata {
  ConstTensorView query_start_loc{};  // int32 [num_seqs + 1], row offsets into the query
  ConstTensorView seq_lens{};         // int32 [num_seqs], tokens after this step, cache included
  ConstTensorView block_table{};      // int32 [num_seqs, max_blocks], unit stride in the last
                                      // dimension; absent for attention without a cache
  ConstTensorView slot_mapping{};     // int64 [num_slots], for the first num_slots rows of key and
                                      // value (write_kv_cache); absent if nothing is written

  // Rows of the query and output that are real; rows at or past it are neither read nor written.
  std::int64_t num_actual_tokens = 0;

  // Upper bounds known to the host, which may lie above what the block table can hold; 0 means
  // unknown. The CPU does not use them. On CUDA they save launches: kernels for more query rows
  // than max_query_len gives are left out (so a captured graph serves batches of up to that), and
  // all kernels but one where num_actual_tokens is num_seqs * max_query_len; shared prefixes are
  // not looked for where max_seq_len leaves no room for one. Results are the same up to rounding.
  std::int64_t max_query_len = 0;
  std::int64_t max_seq_len = 0;

  // Masks that belong to the batch; absent means none.
  ConstTensorView
      causal{};  // bool or uint8 [num_seqs]: 0 switches causality off for that sequence, and its
                 // left window then is on both sides. Never switches it on where the
                 // layer is not causal
  ConstTensorView mm_prefix_range{};  // int32 [num_seqs, num_ranges, 2]: closed ranges [start, end]
                                      // of positions that see each other; start >= end means none.
                                      // See Mask::clamp_ranges
  ConstTensorView
      visible_prefix_lens{};  // int32 [num_seqs]: keys at positions before it escape the
                              // window (R-SWA); 0 or less: none

  // Query-query bias of tree attention: float32 [m, m] for all sequences or [num_seqs, m, m].
  // Query row i and this step's key row n of one sequence (key seq_lens[s] - query_len + n) get
  // qq_bias[i][n] added to their score (may be -inf); rows or keys at or past m get 0. Not used
  // where no key is this step's own token: by cross attention and with kv_start_loc.
  ConstTensorView qq_bias{};

  // Attention without a cache: key/value row offsets, int32 [num_seqs + 1]; absent means that keys
  // and queries are the same tokens (query_start_loc). seq_lens is not used then.
  ConstTensorView kv_start_loc{};

  // Positions, where they are not the indices of keys: a cache that starts in the middle of a
  // sequence or holds a rank's shard of it (context parallelism). Key j of sequence s sits at
  // position kv_offset[s] + j * kv_stride[s], its query row i at q_offset[s] + i. int32 [num_seqs];
  // absent means 0, 1 and seq_lens[s] - query_len. Causality, windows, chunks, ranges, visible
  // prefixes and ALiBi go by positions; block_table, seq_lens, slot_mapping and qq_bias by the
  // keys' indices. With q_offset this step's tokens need not be among the keys. Positions are at
  // least 0 and below 2^31, strides at least 1; anything else gives wrong results, but never an
  // access outside the caller's memory. Shared prefixes (cascade) are not used for a batch that has
  // any of the three.
  ConstTensorView kv_offset{};
  ConstTensorView kv_stride{};
  ConstTensorView q_offset{};

  std::int64_t num_seqs() const { return query_start_loc ? query_start_loc.shape[0] - 1 : 0; }
};

// The metadata of a step that an attention layer takes: vLLM's TritonAttentionMetadata, its
// fourteen fields by their names. Seven are CommonAttentionMetadata's (num_actual_tokens,
// max_query_len, query_start_loc, max_seq_len, seq_lens, block_table, slot_mapping), which also has
// what Quire's batches may have beyond vLLM's; seven follow.
//
// AttentionMetadataBuilder::build() makes it from a CommonAttentionMetadata. A caller may also fill
// it by hand, all but the plans, and pass it through AttentionMetadataBuilder::plan(): both ways
// compute the same. Copies share the plan, and all are valid until the builder plans another batch.
// A layer takes the fields as they were planned (AttentionImpl::forward() refuses others); only
// slot_mapping may be another for each layer.
struct AttentionMetadata : CommonAttentionMetadata {
  // Cascade: keys [0, common_prefix_len) are shared by all sequences (their block tables start with
  // the same blocks), read once for the whole batch and merged by lse. 0 without use_cascade, above
  // 0 with it. The plan checks the promise and treats sequences that do not keep it plainly.
  bool use_cascade = false;
  std::int64_t common_prefix_len = 0;

  // With use_cascade, else absent: all rows of the batch over the shared keys, and each sequence
  // over its own. On the layer's device. The plan does not read them, since it has the same from
  // common_prefix_len and seq_lens: they are for kernels of the caller's. What build() and plan()
  // make of them lies in the builder's memory and is written with the plan: on return on the CPU,
  // in the order of ctx.stream on CUDA, and again by each replay of a graph that captured it.
  ConstTensorView cu_prefix_query_lens{};  // int32 [2]: {0, num_actual_tokens}
  ConstTensorView prefix_kv_lens{};        // int32 [1]: {common_prefix_len}
  ConstTensorView suffix_kv_lens{};        // int32 [num_seqs]: seq_lens - common_prefix_len; 0 (by
                                           // hand also less) for sequences shorter than that

  // How the batch is cut into work. One plan covers prefix and suffixes: with use_cascade both are
  // that plan, without it the second is null. Null before the metadata is planned.
  std::shared_ptr<Plan> scheduler_metadata{};
  std::shared_ptr<Plan> prefix_scheduler_metadata{};

  // Quire's own: which of the plan's updates it was. Set by the builder.
  std::uint64_t build_number = 0;
};

}  // namespace quire
