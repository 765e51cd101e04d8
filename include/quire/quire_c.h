/*
 * The C ABI of Quire, for C and for languages that call C. The C++ headers are the manual of what
 * each call means; this one says how it looks from C. Here is the functional core of
 * quire/attention.h and quire/kv_cache.h; quire/quire_c_backend.h, which comes with it, has the
 * backends and the serving layer of quire/backend.h.
 *
 *     quire_attention_config config;
 *     quire_attention_config_init(&config, sizeof config);
 *     config.num_heads = 9; config.num_kv_heads = 3; config.head_size = 64;
 *     quire_plan* plan = NULL;
 *     if (quire_plan_create(&config, &plan) != QUIRE_OK) puts(quire_last_error());
 *     quire_plan_update(plan, &batch, 0, NULL);                 once a step
 *     quire_write_kv_cache(&key, &value, &cache, &slots, NULL); once a layer
 *     quire_attention(plan, &args, NULL);
 *     quire_plan_destroy(plan);
 *
 * Errors. Functions that can fail return a quire_status; no C++ exception leaves this library and
 * it never exits or aborts. After a failure, quire_last_error() tells the calling thread what was
 * wrong. A call that returns QUIRE_INVALID_ARGUMENT has written nothing and queued no work.
 *
 * Structures. Those that begin with `struct_size` may gain members at their end. Set them up with
 * their _init function, which fills in the defaults and the size that the caller was compiled with;
 * a library that knows more members uses their defaults, and one that knows fewer refuses a
 * structure whose additional members are not zero. Functions that fill such a structure take its
 * size, as _init does. quire_device, quire_tensor and quire_scale stay as they are. Enumerations
 * travel as int32_t, booleans as int32_t that is 0 or 1.
 *
 * Texts. A `const char**` receives a text that lives as long as the library. Where a text is made by
 * the call, it goes to `text`, cut to `capacity` bytes with the final 0; `length`, if not null,
 * receives the whole length without it. `text` may be null if `capacity` is 0.
 *
 * Threads. A plan serves one call at a time; different plans may be used from different threads.
 * Everything that is passed by pointer is read before the call returns, except the memory that
 * tensors point to: see quire_plan_update() and quire_score.
 */
#ifndef QUIRE_QUIRE_C_H_
#define QUIRE_QUIRE_C_H_

#include <stddef.h>
#include <stdint.h>

#include "quire/export.h"

#ifdef __cplusplus
extern "C" {
#endif

/* ------------------------------------------------------------------------------------------------
 * Status */

typedef int32_t quire_status;
enum {
  QUIRE_OK = 0,
  QUIRE_INVALID_ARGUMENT = 1, /* a mistake of the caller: quire::Error, or a null pointer */
  QUIRE_OUT_OF_MEMORY = 2,    /* of the host or a device, or threads that the system starts */
  QUIRE_INTERNAL = 3          /* a device failed, or Quire did */
};

/* "0.1.0" */
QUIRE_API const char* quire_version(void);

/* The text of the calling thread's last failure, "" if it had none. Valid until this thread's next
 * failing call; successful calls leave it alone. Long texts are cut. */
QUIRE_API const char* quire_last_error(void);

/* The argument that the last failure is about, spelled as in the headers and without the structure
 * that it is a member of: "query", "num_heads", "block_table[3][0]". Members of quire_kv_cache have
 * "kv_cache." ahead, struct_size has its structure: "config.struct_size". "" if there is none. */
QUIRE_API const char* quire_last_error_argument(void);

/* ------------------------------------------------------------------------------------------------
 * Tensors (quire/types.h) */

typedef int32_t quire_dtype;
enum {
  QUIRE_DTYPE_NONE = 0, /* "no tensor" */
  QUIRE_DTYPE_FLOAT32 = 1,
  QUIRE_DTYPE_FLOAT16 = 2,
  QUIRE_DTYPE_BFLOAT16 = 3,
  QUIRE_DTYPE_FLOAT8_E4M3 = 4,
  QUIRE_DTYPE_FLOAT8_E5M2 = 5,
  QUIRE_DTYPE_INT8 = 6,
  QUIRE_DTYPE_UINT8 = 7,
  QUIRE_DTYPE_INT32 = 8,
  QUIRE_DTYPE_INT64 = 9,
  QUIRE_DTYPE_BOOL = 10
};

enum { QUIRE_DEVICE_CPU = 0, QUIRE_DEVICE_CUDA = 1 };

typedef struct quire_device {
  int32_t type; /* QUIRE_DEVICE_* */
  int32_t index;
} quire_device;

enum { QUIRE_MAX_DIMS = 6 };

/* A view of memory that the caller owns. All zeros means "absent". Strides count elements. Calls
 * write only the tensors that are said to receive something: output, lse, output_block_scale, and
 * the cache in quire_write_kv_cache(). */
typedef struct quire_tensor {
  void* data; /* element [0, ..., 0] */
  quire_dtype dtype;
  quire_device device;
  int32_t ndim;
  int64_t shape[QUIRE_MAX_DIMS];
  int64_t strides[QUIRE_MAX_DIMS];
} quire_tensor;

/* Fills `tensor` as a contiguous (row-major) view on the CPU; change `device` and `strides`
 * afterwards where they differ. `data` is const for the sake of inputs; where a call is to write,
 * the memory must be writable. */
QUIRE_API quire_status quire_tensor_init(quire_tensor* tensor, const void* data, quire_dtype dtype,
                                         int32_t ndim, const int64_t* shape);

/* Fills `view` from a DLTensor (https://dmlc.github.io/dlpack). `tensor` is a const DLTensor*, alike
 * in all versions of dlpack.h so far; of a DLManagedTensor or DLManagedTensorVersioned pass the
 * address of its dl_tensor. Shape and strides are copied (no strides: row-major), byte_offset is
 * applied to the data. Nothing is owned, kept or freed: the memory must stay as long as calls use the
 * view, after which the caller calls the deleter. Whether the memory may be written, the DLTensor
 * does not say (DLPACK_FLAG_BITMASK_READ_ONLY does): see quire_tensor for what is written. On CUDA,
 * streams are the caller's to synchronise.
 *
 * Taken are the types of QUIRE_DTYPE_* (float8_e4m3fn and float8_e5m2 since DLPack 1.1), on kDLCPU,
 * kDLCUDA and, as memory of the CPU, kDLCUDAHost. kDLCUDAManaged is refused: it does not say which
 * device is to work on it. */
QUIRE_API quire_status quire_tensor_from_dlpack(quire_tensor* view, const void* tensor);

/* "float16", "bfloat16", "float8_e4m3", "int32", ... */
QUIRE_API quire_status quire_dtype_name(quire_dtype dtype, const char** name);

/* A scale: `value`, or the float that `data` points to in memory of the layer's device if it is
 * not null, read when the work runs. */
typedef struct quire_scale {
  float value;
  const float* data;
} quire_scale;

/* ------------------------------------------------------------------------------------------------
 * Threads and context (quire::ThreadPool, quire::Context) */

typedef struct quire_thread_pool quire_thread_pool;

/* One piece of work: to be called once for each index in [0, num_tasks); `worker` is in
 * [0, num_threads) and differs between calls of one run that run at the same time. */
typedef void (*quire_task)(void* task_context, int64_t index, int32_t worker);

/* Runs a task on threads of the caller's: returns when all num_tasks calls have returned, and
 * blocks rather than spins. Called from inside a task it must not wait for the run which that task
 * is part of: see quire::ThreadPool. */
typedef void (*quire_run_tasks)(void* user, int64_t num_tasks, quire_task task, void* task_context);

/* How many threads the process-wide pool asks for: QUIRE_NUM_THREADS, or one for each CPU. */
QUIRE_API quire_status quire_default_num_threads(int32_t* num_threads);

/* A pool of Quire's own: num_threads - 1 threads are started, the calling thread is the last.
 * QUIRE_OUT_OF_MEMORY if the system does not start them all; the text says how many it would.
 * quire/types.h says what holds after fork() and for calls from inside a task. */
QUIRE_API quire_status quire_thread_pool_create(int32_t num_threads, quire_thread_pool** pool);

/* A pool over threads of the caller's: at most `num_threads` tasks run at a time. */
QUIRE_API quire_status quire_thread_pool_wrap(int32_t num_threads, quire_run_tasks run, void* user,
                                              quire_thread_pool** pool);

/* Null does nothing. No call may be using the pool. */
QUIRE_API quire_status quire_thread_pool_destroy(quire_thread_pool* pool);

/* Where and how a call runs. Functions accept null for the defaults. */
typedef struct quire_context {
  size_t struct_size;
  void* stream;               /* CUDA: a cudaStream_t; null is the legacy default stream */
  quire_thread_pool* threads; /* CPU: null is the process-wide pool */
  int32_t check_indices; /* 1: look at the data of index tensors and scales first; for debugging */
  const char* backend;   /* of calls without a plan (quire_write_kv_cache, quire_merge_states); null
                            or "": the best one of the device. With a plan: that, or the plan's */
} quire_context;

QUIRE_API quire_status quire_context_init(quire_context* context, size_t struct_size);

/* ------------------------------------------------------------------------------------------------
 * The layer (quire::AttentionConfig, Mask, Score) */

enum {
  QUIRE_ATTENTION_DECODER = 0,
  QUIRE_ATTENTION_ENCODER = 1,
  QUIRE_ATTENTION_ENCODER_ONLY = 2,
  QUIRE_ATTENTION_ENCODER_DECODER = 3
};

enum {
  QUIRE_WINDOW_NONE = 0,
  QUIRE_WINDOW_LEFT = 1,
  QUIRE_WINDOW_BOTH = 2,
  QUIRE_WINDOW_CHUNKED = 3
};

enum {
  QUIRE_KV_CACHE_AUTO = 0,
  QUIRE_KV_CACHE_FLOAT16 = 1,
  QUIRE_KV_CACHE_BFLOAT16 = 2,
  QUIRE_KV_CACHE_FLOAT32 = 3,
  QUIRE_KV_CACHE_FP8_E4M3 = 4,
  QUIRE_KV_CACHE_FP8_E5M2 = 5,
  QUIRE_KV_CACHE_INT8_PER_TOKEN_HEAD = 6,
  QUIRE_KV_CACHE_FP8_E4M3_PER_TOKEN_HEAD = 7,
  QUIRE_KV_CACHE_INT4_PER_TOKEN_HEAD = 8
};

/* How a score is made from a dot product (quire::Score). */
typedef struct quire_score {
  size_t struct_size;
  float softmax_scale; /* 0: 1 / sqrt(head_size) */
  float soft_cap;      /* 0: none */
  /* float32 [num_heads] or absent. Their memory must outlive the plans made from them. */
  quire_tensor alibi_slopes;
  quire_tensor sinks;
  int32_t alibi_sqrt;
} quire_score;

QUIRE_API quire_status quire_score_init(quire_score* score, size_t struct_size);

typedef struct quire_attention_config {
  size_t struct_size;
  quire_device device;
  quire_dtype dtype;      /* of the query; default bfloat16 */
  int32_t attention_type; /* QUIRE_ATTENTION_*; default decoder */
  int64_t num_heads;      /* must be set: 1 to 65536 */
  int64_t num_kv_heads;   /* must be set: a divisor of num_heads */
  int64_t head_size;      /* must be set: 8 to 576 */
  int64_t head_size_v;    /* 0: head_size */

  int32_t causal;         /* default 1 */
  int32_t window;         /* QUIRE_WINDOW_* */
  int64_t window_size;    /* left and both: the window; chunked: the chunk */
  int64_t chunk_lookback; /* chunked: earlier chunks that stay visible */

  const quire_score* score; /* null: the defaults of quire_score; copied */

  int32_t kv_cache_dtype;  /* QUIRE_KV_CACHE_*; default auto, the same as `dtype` spelled out */
  int64_t block_size;      /* default 16; 1 to 2^20 */
  int32_t batch_invariant; /* default 0 */
  int32_t auto_cascade;    /* default 1 */
  const char* backend;     /* null or "": the best one of the device */
  int32_t clamp_ranges;    /* 1: bidirectional ranges end at the sliding window; default 0 */
} quire_attention_config;

QUIRE_API quire_status quire_attention_config_init(quire_attention_config* config,
                                                   size_t struct_size);

/* ------------------------------------------------------------------------------------------------
 * The batch (quire::CommonAttentionMetadata); absent tensors are all zeros */

typedef struct quire_batch {
  size_t struct_size;
  quire_tensor query_start_loc; /* int32 [num_seqs + 1] */
  quire_tensor seq_lens;        /* int32 [num_seqs] */
  quire_tensor block_table;     /* int32 [num_seqs, max_blocks]; absent without a cache */
  quire_tensor slot_mapping;    /* int64 [>= tokens written] or absent */
  int64_t num_actual_tokens;
  int64_t max_query_len;            /* an upper bound; 0: unknown */
  int64_t max_seq_len;              /* an upper bound; 0: unknown */
  quire_tensor causal;              /* bool [num_seqs] or absent */
  quire_tensor mm_prefix_range;     /* int32 [num_seqs, num_ranges, 2] or absent */
  quire_tensor visible_prefix_lens; /* int32 [num_seqs] or absent */
  quire_tensor qq_bias;             /* float32 [m, m] or [num_seqs, m, m] or absent */
  quire_tensor kv_start_loc;        /* int32 [num_seqs + 1] or absent */
  quire_tensor kv_offset;           /* int32 [num_seqs] or absent: positions of keys, */
  quire_tensor kv_stride;           /* int32 [num_seqs] or absent */
  quire_tensor q_offset;            /* int32 [num_seqs] or absent: and of queries */
} quire_batch;

QUIRE_API quire_status quire_batch_init(quire_batch* batch, size_t struct_size);

/* ------------------------------------------------------------------------------------------------
 * The plan (quire::Plan) */

typedef struct quire_plan quire_plan;

/* Checks the configuration and sets up the workspace; *plan is null after a failure. `backend` is
 * copied. */
QUIRE_API quire_status quire_plan_create(const quire_attention_config* config, quire_plan** plan);

/* Plans a batch. The memory of the batch's tensors must stay unchanged until the last attention
 * call of the step; the structure itself need not. `common_prefix_len` > 0 announces that all block
 * tables start with the same blocks up to that many tokens. */
QUIRE_API quire_status quire_plan_update(quire_plan* plan, const quire_batch* batch,
                                         int64_t common_prefix_len, const quire_context* context);

/* Null does nothing. */
QUIRE_API quire_status quire_plan_destroy(quire_plan* plan);

/* "cpu", "cuda", "reference" */
QUIRE_API quire_status quire_plan_backend_name(const quire_plan* plan, const char** name);

QUIRE_API quire_status quire_plan_workspace_bytes(const quire_plan* plan, int64_t* bytes);

/* How the batch is cut into work, for people: quire::Plan::to_string(). */
QUIRE_API quire_status quire_plan_to_string(const quire_plan* plan, char* text, size_t capacity,
                                            size_t* length);

/* ------------------------------------------------------------------------------------------------
 * The paged cache (quire::PagedKvCache) */

typedef struct quire_kv_cache {
  size_t struct_size;
  /* Of the element type that `dtype` stores; bytes (uint8) stand for the fp8 and int8 kinds. int4:
   * bytes of two elements, the last dimension is half the head size. */
  quire_tensor key;           /* [num_blocks, block_size, num_kv_heads, head_size] */
  quire_tensor value;         /* [num_blocks, block_size, num_kv_heads, head_size_v] */
  int32_t dtype;              /* QUIRE_KV_CACHE_*; default auto */
  quire_scale k_scale;        /* default 1 */
  quire_scale v_scale;        /* default 1 */
  quire_tensor k_scale_cache; /* per token and head: float32 [num_blocks, block_size, */
  quire_tensor v_scale_cache; /*   num_kv_heads]; otherwise absent */
} quire_kv_cache;

QUIRE_API quire_status quire_kv_cache_init(quire_kv_cache* cache, size_t struct_size);

/* Where a cache with a scale for each token and head has them (quire::ScaleLayout). */
enum {
  QUIRE_SCALES_SEPARATE = 0, /* in tensors of their own, which the caller sets */
  QUIRE_SCALES_INLINE = 1    /* vLLM's: four bytes behind each row of K and each row of V */
};

/* Sets up `cache` over vLLM's default layout: one tensor [num_blocks, 2, block_size, num_kv_heads,
 * head_size], K before V, any strides. `dtype` is a QUIRE_KV_CACHE_*, `scales` a QUIRE_SCALES_*:
 * with inline ones, of the per-token-head kinds only, rows have head_size + 4 bytes (int4:
 * head_size / 2 + 4), and k_scale_cache and v_scale_cache become views of the last four. */
QUIRE_API quire_status quire_kv_cache_from_combined(quire_kv_cache* cache, size_t struct_size,
                                                    const quire_tensor* kv_cache, int32_t dtype,
                                                    int32_t scales);

/* The same over vLLM's packed layout: [num_blocks, num_kv_heads, block_size, head_size +
 * head_size_v], K before V in each row; with inline scales head_size + 4 + head_size_v + 4 bytes.
 * int4: half as many bytes for K and for V; `head_size` is in elements. */
QUIRE_API quire_status quire_kv_cache_from_packed(quire_kv_cache* cache, size_t struct_size,
                                                  const quire_tensor* kv_cache, int64_t head_size,
                                                  int32_t dtype, int32_t scales);

/* vLLM's names of cache dtypes: auto, float16, bfloat16, float32, fp8 and fp8_e4m3, fp8_e5m2,
 * int8_per_token_head, fp8_per_token_head, int4_per_token_head. */
QUIRE_API quire_status quire_kv_cache_dtype_from_name(const char* kv_cache_dtype, int32_t* dtype);
QUIRE_API quire_status quire_kv_cache_dtype_name(int32_t kv_cache_dtype, const char** name);

/* The element type of a cache of that kind for a model of dtype `model_dtype`. */
QUIRE_API quire_status quire_kv_cache_storage_dtype(int32_t kv_cache_dtype, quire_dtype model_dtype,
                                                    quire_dtype* storage_dtype);

/* Writes K and V of new tokens into `kv_cache` at `slot_mapping` (int64 [num_slots], negative ones
 * are skipped). key: [>= num_slots, num_kv_heads, head_size], value: [.., head_size_v]. */
QUIRE_API quire_status quire_write_kv_cache(const quire_tensor* key, const quire_tensor* value,
                                            const quire_kv_cache* kv_cache,
                                            const quire_tensor* slot_mapping,
                                            const quire_context* context);

/* ------------------------------------------------------------------------------------------------
 * Attention (quire::AttentionArgs, quire::attention) */

typedef struct quire_attention_args {
  size_t struct_size;
  quire_tensor query;             /* [>= num_actual_tokens, num_heads, head_size] */
  const quire_kv_cache* kv_cache; /* decoder and cross attention; else null */
  quire_tensor key;               /* encoder and encoder-only attention; else absent */
  quire_tensor value;
  quire_tensor output;      /* [.., num_heads * head_size_v] or [.., num_heads, head_size_v] */
  quire_tensor lse;         /* float32 [num_heads, >= num_actual_tokens] or absent */
  const quire_score* score; /* this layer's own, where layers share a plan; null: the plan's */
  quire_scale q_scale;      /* of an fp8 query; default 1 */
  int32_t has_output_scale; /* 1: fp8 output with the static output_scale */
  quire_scale output_scale; /* default 1 */
  quire_tensor output_block_scale; /* fp8 output: receives a scale per group of 128, or absent */
} quire_attention_args;

QUIRE_API quire_status quire_attention_args_init(quire_attention_args* args, size_t struct_size);

/* Attention of one layer over the planned batch. CPU: done on return. CUDA: queued on the
 * context's stream. */
QUIRE_API quire_status quire_attention(const quire_plan* plan, const quire_attention_args* args,
                                       const quire_context* context);

/* Merges two results over disjoint keys. o: [num_tokens, num_heads, head_size_v], lse: float32
 * [num_heads, num_tokens]. `output` may alias o_a or o_b. `lse` may be null or absent, and may
 * alias lse_a or lse_b. */
QUIRE_API quire_status quire_merge_states(const quire_tensor* o_a, const quire_tensor* lse_a,
                                          const quire_tensor* o_b, const quire_tensor* lse_b,
                                          const quire_tensor* output, const quire_tensor* lse,
                                          const quire_context* context);

#ifdef __cplusplus
}
#endif

#include "quire/quire_c_backend.h" /* backends, and the serving layer over all of this */

#endif /* QUIRE_QUIRE_C_H_ */
