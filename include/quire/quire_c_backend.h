/*
 * The C ABI of quire/backend.h: the backends of a build and what they can do. Comes with
 * quire/quire_c.h, which says how errors, structures and texts work.
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

#ifdef __cplusplus
}
#endif

#endif /* QUIRE_QUIRE_C_BACKEND_H_ */
