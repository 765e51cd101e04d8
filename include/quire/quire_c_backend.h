/*
 * The C ABI of quire/backend.h: the backends of a build and what they can do, and the serving layer in
 * the words of vLLM's v1 backends. Comes with quire/quire_c.h, which says how errors, structures and
 * texts work.
 *
 *     quire_metadata_builder* builder = NULL;    quire_attention_metadata* metadata = NULL;
 *     quire_attention_impl* layer = NULL;
 *     quire_metadata_builder_create(&config, &builder);         once for layers of one configuration
 *     quire_attention_metadata_create(&metadata);               once
 *     quire_attention_impl_create(&config, NULL, &layer);       once a layer
 *     quire_metadata_builder_build(builder, 0, &batch, 0, NULL, metadata);               once a step
 *     quire_attention_impl_forward(layer, &args, NULL);  once a layer: cache write, then attention
 */
#ifndef QUIRE_QUIRE_C_BACKEND_H_
#define QUIRE_QUIRE_C_BACKEND_H_

#include "quire/quire_c.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ------------------------------------------------------------------------------------------------
 * Backends (quire::AttentionBackend): numbered from 0, best first for each device */

QUIRE_API quire_status quire_backend_count(int32_t* count);

/* "cpu", "reference", "cuda". */
QUIRE_API quire_status quire_backend_name(int32_t backend, const char** name);

/* The number of the backend of that name. */
QUIRE_API quire_status quire_backend_find(const char* name, int32_t* backend);

/* QUIRE_DEVICE_* */
QUIRE_API quire_status quire_backend_device_type(int32_t backend, int32_t* device_type);

/* 1 if this machine can run it now, else 0. */
QUIRE_API quire_status quire_backend_available(int32_t backend, int32_t* available);

/* What it runs on ("AVX3", "sm_90", ...), or why it cannot. */
QUIRE_API quire_status quire_backend_instruction_set(int32_t backend, char* text, size_t capacity,
                                                     size_t* length);

/* Why the backend cannot serve the configuration, a line for each reason; empty if it can. */
QUIRE_API quire_status quire_backend_supports(int32_t backend, const quire_attention_config* config,
                                              char* text, size_t capacity, size_t* length);

/* What a backend can do (quire::BackendCapabilities). Sets of dtypes have bit i set for the dtype
 * with number i: (dtypes >> QUIRE_DTYPE_BFLOAT16) & 1. The other members are sizes, or 0 or 1. */
typedef struct quire_capabilities {
  size_t struct_size;
  uint64_t dtypes;          /* of the query */
  uint64_t kv_cache_dtypes; /* bits are QUIRE_KV_CACHE_* */
  uint64_t output_dtypes;
  int64_t min_head_size;
  int64_t max_head_size;
  int64_t head_size_multiple;
  int64_t block_size_multiple;
  int64_t max_block_size;
  int32_t sinks;
  int32_t alibi;
  int32_t soft_cap;
  int32_t sliding_window;
  int32_t chunked;
  int32_t bidirectional_ranges;
  int32_t visible_prefix;
  int32_t qq_bias;
  int32_t cross_attention;
  int32_t encoder_attention;
  int32_t cascade;
  int32_t lse;
  int32_t fp8_output;
  int32_t block_scale_output;
  int32_t batch_invariant;
  int32_t graph_capture;
} quire_capabilities;

QUIRE_API quire_status quire_backend_capabilities(int32_t backend, quire_capabilities* capabilities,
                                                  size_t struct_size);

/* The kernels in this build, in the order of the table that dispatch looks them up in; none where
 * there is one kernel for all. `serves` says for which calls, for people; it may be null. */
QUIRE_API quire_status quire_backend_kernel_count(int32_t backend, int32_t* count);
QUIRE_API quire_status quire_backend_kernel(int32_t backend, int32_t kernel, const char** name,
                                            const char** serves);

/* QUIRE_INVALID_ARGUMENT, with the sizes that work, on another. */
QUIRE_API quire_status quire_backend_validate_head_size(int32_t backend, int64_t head_size);

/* The shape of a tensor for quire_kv_cache_from_combined(): [num_blocks, 2, block_size, num_kv_heads,
 * head_size], the per-token-head kinds with head_size + 4, for inline scales. `cache_dtype_str` is a
 * name as of quire_kv_cache_dtype_from_name(); null: "auto". `shape` has room for QUIRE_MAX_DIMS;
 * `ndim` receives how many there are. Elements are quire_kv_cache_storage_dtype()'s. */
QUIRE_API quire_status quire_backend_kv_cache_shape(int32_t backend, int64_t num_blocks,
                                                    int64_t block_size, int64_t num_kv_heads,
                                                    int64_t head_size, const char* cache_dtype_str,
                                                    int64_t* shape, int32_t* ndim);

/* ------------------------------------------------------------------------------------------------
 * The metadata of a step (quire::AttentionMetadata) and its builder */

/* What a layer needs to know of a step: the batch, and how it is cut into work. Made empty, filled by
 * a builder as often as there are steps. */
typedef struct quire_attention_metadata quire_attention_metadata;

QUIRE_API quire_status quire_attention_metadata_create(quire_attention_metadata** metadata);

/* Null does nothing. */
QUIRE_API quire_status quire_attention_metadata_destroy(quire_attention_metadata* metadata);

/* The fields of the metadata: vLLM's fourteen by their names, then Quire's own, which are those of
 * quire_batch; absent tensors are all zeros. */
typedef struct quire_attention_metadata_fields {
  size_t struct_size;
  int64_t num_actual_tokens;
  int64_t max_query_len;        /* an upper bound; 0: unknown */
  quire_tensor query_start_loc; /* int32 [num_seqs + 1] */
  int64_t max_seq_len;          /* an upper bound; 0: unknown */
  quire_tensor seq_lens;        /* int32 [num_seqs] */
  quire_tensor block_table;     /* int32 [num_seqs, max_blocks] */
  quire_tensor slot_mapping;    /* int64 [>= tokens written] */
  int32_t use_cascade;
  int64_t common_prefix_len; /* above 0 with use_cascade, else 0 */
  /* With use_cascade, else absent. For kernels of the caller's: the plan does not read them. What a
   * builder makes of them lies in the plan's memory and is written with the plan. */
  quire_tensor cu_prefix_query_lens; /* int32 [2]: 0, num_actual_tokens */
  quire_tensor prefix_kv_lens;       /* int32 [1]: common_prefix_len */
  quire_tensor suffix_kv_lens;       /* int32 [num_seqs]: seq_lens less common_prefix_len */
  /* One plan covers prefix and suffixes: with use_cascade both are that plan, else the second is
   * null. They are the metadata's, which owns them until it is filled again or destroyed. */
  const quire_plan* scheduler_metadata;
  const quire_plan* prefix_scheduler_metadata;

  quire_tensor causal;
  quire_tensor mm_prefix_range;
  quire_tensor visible_prefix_lens;
  quire_tensor qq_bias;
  quire_tensor kv_start_loc;
  quire_tensor kv_offset;
  quire_tensor kv_stride;
  quire_tensor q_offset;
} quire_attention_metadata_fields;

QUIRE_API quire_status quire_attention_metadata_fields_init(quire_attention_metadata_fields* fields,
                                                            size_t struct_size);

QUIRE_API quire_status quire_attention_metadata_get(const quire_attention_metadata* metadata,
                                                    quire_attention_metadata_fields* fields,
                                                    size_t struct_size);

typedef struct quire_metadata_builder quire_metadata_builder;

/* Checks the configuration; *builder is null after a failure. */
QUIRE_API quire_status quire_metadata_builder_create(const quire_attention_config* config,
                                                     quire_metadata_builder** builder);

/* Null does nothing. Metadata that it filled keeps what it needs of it and stays good. */
QUIRE_API quire_status quire_metadata_builder_destroy(quire_metadata_builder* builder);

/* Plans the batch and fills `metadata`, which is good until the builder plans again; layers refuse
 * that of an earlier step. `common_prefix_len` as in quire_plan_update(); above 0 it sets use_cascade,
 * unless the layer is batch-invariant. `fast_build`, 0 or 1, is accepted for vLLM's sake. */
QUIRE_API quire_status quire_metadata_builder_build(quire_metadata_builder* builder,
                                                    int64_t common_prefix_len,
                                                    const quire_batch* batch, int32_t fast_build,
                                                    const quire_context* context,
                                                    quire_attention_metadata* metadata);

/* build() for a CUDA graph: without cascade, in buffers whose addresses stay fixed. Refused on
 * backends without graph_capture. */
QUIRE_API quire_status quire_metadata_builder_build_for_cudagraph_capture(
    quire_metadata_builder* builder, const quire_batch* batch, const quire_context* context,
    quire_attention_metadata* metadata);

/* Plans fields that the caller filled, all but the plans, which are ignored, and fills `metadata`:
 * complete, cascade tensors that were absent too. Refuses fields that contradict each other. */
QUIRE_API quire_status quire_metadata_builder_plan(quire_metadata_builder* builder,
                                                   const quire_attention_metadata_fields* fields,
                                                   const quire_context* context,
                                                   quire_attention_metadata* metadata);

/* ------------------------------------------------------------------------------------------------
 * The layer (quire::AttentionImpl) */

typedef struct quire_attention_impl quire_attention_impl;

/* A layer with a kv_sharing_target_layer_name reads that layer's cache and never writes it; null or
 * "": it has its own. *impl is null after a failure. Texts are copied. */
QUIRE_API quire_status quire_attention_impl_create(const quire_attention_config* config,
                                                   const char* kv_sharing_target_layer_name,
                                                   quire_attention_impl** impl);

/* Null does nothing. */
QUIRE_API quire_status quire_attention_impl_destroy(quire_attention_impl* impl);

/* The scales of a quantised model's layer (quire::LayerScales). */
typedef struct quire_layer_scales {
  size_t struct_size;
  quire_scale q; /* of an fp8 query; default 1 */
  quire_scale k; /* with has_k it replaces the cache's k_scale; default 1 */
  quire_scale v; /* with has_v the cache's v_scale; default 1 */
  int32_t has_k; /* default 0: the cache's own */
  int32_t has_v; /* default 0 */
} quire_layer_scales;

QUIRE_API quire_status quire_layer_scales_init(quire_layer_scales* scales, size_t struct_size);

typedef struct quire_forward_args {
  size_t struct_size;
  const quire_layer_scales* scales; /* null: the defaults */
  quire_tensor query;               /* [num_tokens, num_heads, head_size] */
  quire_tensor key;   /* [num_tokens, num_kv_heads, head_size], or absent: nothing is written */
  quire_tensor value; /* [num_tokens, num_kv_heads, head_size_v], likewise */
  const quire_kv_cache* kv_cache;           /* this layer's; null for encoder attention */
  const quire_attention_metadata* metadata; /* null: a profiling run, output becomes 0 */
  quire_tensor slot_mapping; /* where key and value go in this layer; absent: the metadata's */
  quire_tensor output;       /* [num_tokens, num_heads * head_size_v] or 3-D */
  quire_tensor lse;          /* float32 [num_heads, num_tokens] or absent */
  int32_t has_output_scale;  /* 1: fp8 output with the static output_scale */
  quire_scale output_scale;  /* default 1 */
  quire_tensor output_block_scale; /* fp8 output: receives a scale per group of 128, or absent */
} quire_forward_args;

QUIRE_API quire_status quire_forward_args_init(quire_forward_args* args, size_t struct_size);

/* Writes the step's key and value into the cache and computes attention. Everything is checked
 * before the cache is written. CPU: done on return. CUDA: queued on the context's stream. */
QUIRE_API quire_status quire_attention_impl_forward(const quire_attention_impl* impl,
                                                    const quire_forward_args* args,
                                                    const quire_context* context);

/* Only the cache write of forward, for hosts that do it apart. `scales` may be null. */
QUIRE_API quire_status quire_attention_impl_do_kv_cache_update(
    const quire_attention_impl* impl, const quire_layer_scales* scales, const quire_tensor* key,
    const quire_tensor* value, const quire_kv_cache* kv_cache, const quire_tensor* slot_mapping,
    const quire_context* context);

#ifdef __cplusplus
}
#endif

#endif /* QUIRE_QUIRE_C_BACKEND_H_ */
