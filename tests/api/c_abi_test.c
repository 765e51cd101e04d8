/* The C ABI from C: attention of two small sequences against plain loops, and how errors look. */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "quire/quire_c.h"

enum {
  kNumSeqs = 2,
  kNumTokens = 4, /* query rows: 1 of the first sequence, 3 of the second */
  kNumHeads = 6,
  kNumKvHeads = 2,
  kHeadSize = 16,
  kBlockSize = 4,
  kNumBlocks = 8,
  kMaxBlocks = 4,
  kNumSlots = kNumBlocks * kBlockSize
};

static int num_failures = 0;

static void check_at(int line, int condition, const char* what) {
  if (condition) return;
  printf("line %d: %s\n  last error: %s (%s)\n", line, what, quire_last_error(),
         quire_last_error_argument());
  ++num_failures;
}
#define CHECK(condition) check_at(__LINE__, (condition) != 0, #condition)

static const int32_t query_start_loc[kNumSeqs + 1] = {0, 1, 4};
static const int32_t seq_lens[kNumSeqs] = {6, 9};
static const int32_t block_table[kNumSeqs][kMaxBlocks] = {{5, 2, 0, 0}, {7, 1, 3, 0}};

static const float sinks[kNumHeads] = {-1.0f, 0.5f, 0.0f, 1.0f, -2.0f, 0.25f};

/* The whole of one small layer: cache, query and what comes out. */
typedef struct layer {
  float key_cache[kNumSlots][kNumKvHeads][kHeadSize];
  float value_cache[kNumSlots][kNumKvHeads][kHeadSize];
  float query[kNumTokens][kNumHeads][kHeadSize];
  float output[kNumTokens][kNumHeads][kHeadSize];
  float lse[kNumHeads][kNumTokens];
  float expected[kNumTokens][kNumHeads][kHeadSize];
  float expected_lse[kNumHeads][kNumTokens];
} layer;

static float random_value(uint32_t* state) {
  *state = *state * 1664525u + 1013904223u;
  return (float)(*state >> 8) / (float)(1u << 23) - 1.0f;
}

static void fill(float* values, size_t count, uint32_t seed) {
  for (size_t i = 0; i < count; ++i) values[i] = random_value(&seed);
}

static int64_t slot_of(int seq, int pos) {
  return (int64_t)block_table[seq][pos / kBlockSize] * kBlockSize + pos % kBlockSize;
}

static quire_tensor tensor(const void* data, quire_dtype dtype, int32_t ndim, int64_t a, int64_t b,
                           int64_t c, int64_t d) {
  const int64_t shape[4] = {a, b, c, d};
  quire_tensor out;
  CHECK(quire_tensor_init(&out, data, dtype, ndim, shape) == QUIRE_OK);
  return out;
}

static quire_tensor query_tensor(const void* data) {
  return tensor(data, QUIRE_DTYPE_FLOAT32, 3, kNumTokens, kNumHeads, kHeadSize, 0);
}

static quire_tensor lse_tensor(const void* data) {
  return tensor(data, QUIRE_DTYPE_FLOAT32, 2, kNumHeads, kNumTokens, 0, 0);
}

static quire_kv_cache make_cache(const layer* data) {
  quire_kv_cache cache;
  CHECK(quire_kv_cache_init(&cache, sizeof cache) == QUIRE_OK);
  cache.key = tensor(data->key_cache, QUIRE_DTYPE_FLOAT32, 4, kNumBlocks, kBlockSize, kNumKvHeads,
                     kHeadSize);
  cache.value = tensor(data->value_cache, QUIRE_DTYPE_FLOAT32, 4, kNumBlocks, kBlockSize,
                       kNumKvHeads, kHeadSize);
  return cache;
}

static quire_batch make_batch(void) {
  quire_batch batch;
  CHECK(quire_batch_init(&batch, sizeof batch) == QUIRE_OK);
  batch.query_start_loc = tensor(query_start_loc, QUIRE_DTYPE_INT32, 1, kNumSeqs + 1, 0, 0, 0);
  batch.seq_lens = tensor(seq_lens, QUIRE_DTYPE_INT32, 1, kNumSeqs, 0, 0, 0);
  batch.block_table = tensor(block_table, QUIRE_DTYPE_INT32, 2, kNumSeqs, kMaxBlocks, 0, 0);
  batch.num_actual_tokens = kNumTokens;
  return batch;
}

static quire_attention_config make_config(void) {
  quire_attention_config config;
  CHECK(quire_attention_config_init(&config, sizeof config) == QUIRE_OK);
  config.dtype = QUIRE_DTYPE_FLOAT32;
  config.num_heads = kNumHeads;
  config.num_kv_heads = kNumKvHeads;
  config.head_size = kHeadSize;
  config.block_size = kBlockSize;
  return config;
}

static quire_attention_args make_args(layer* data, const quire_kv_cache* cache) {
  quire_attention_args args;
  CHECK(quire_attention_args_init(&args, sizeof args) == QUIRE_OK);
  args.query = query_tensor(data->query);
  args.kv_cache = cache;
  args.output = query_tensor(data->output);
  args.lse = lse_tensor(data->lse);
  return args;
}

/* One row and head by the definition: softmax over the keys [begin, q_pos] that lie in `window`. */
static void expect_row(layer* data, int seq, int row, int q_pos, int head, int window) {
  const int kv_head = head / (kNumHeads / kNumKvHeads);
  const int begin = window > 0 && q_pos - window + 1 > 0 ? q_pos - window + 1 : 0;
  double scores[16];
  double highest = -INFINITY;
  for (int j = begin; j <= q_pos; ++j) {
    const float* key = data->key_cache[slot_of(seq, j)][kv_head];
    double dot = 0.0;
    for (int d = 0; d < kHeadSize; ++d) dot += (double)data->query[row][head][d] * key[d];
    scores[j] = dot / sqrt(kHeadSize);
    highest = fmax(highest, scores[j]);
  }
  double sum = exp(sinks[head] - highest); /* a logit without a value */
  double out[kHeadSize] = {0};
  for (int j = begin; j <= q_pos; ++j) {
    const float* value = data->value_cache[slot_of(seq, j)][kv_head];
    const double weight = exp(scores[j] - highest);
    sum += weight;
    for (int d = 0; d < kHeadSize; ++d) out[d] += weight * value[d];
  }
  for (int d = 0; d < kHeadSize; ++d) data->expected[row][head][d] = (float)(out[d] / sum);
  data->expected_lse[head][row] = (float)(highest + log(sum));
}

static void expect_all(layer* data, int window) {
  for (int seq = 0; seq < kNumSeqs; ++seq) {
    const int query_len = query_start_loc[seq + 1] - query_start_loc[seq];
    for (int i = 0; i < query_len; ++i) {
      for (int head = 0; head < kNumHeads; ++head) {
        expect_row(data, seq, query_start_loc[seq] + i, seq_lens[seq] - query_len + i, head,
                   window);
      }
    }
  }
}

static int close_to(const float* got, const float* expected, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (!(fabsf(got[i] - expected[i]) <= 1e-5f)) {
      printf("  element %zu: %g, expected %g\n", i, (double)got[i], (double)expected[i]);
      return 0;
    }
  }
  return 1;
}

static void check_result(const layer* data) {
  CHECK(close_to(&data->output[0][0][0], &data->expected[0][0][0],
                 kNumTokens * kNumHeads * kHeadSize));
  CHECK(close_to(&data->lse[0][0], &data->expected_lse[0][0], kNumHeads * kNumTokens));
}

/* Random tokens reach the cache through quire_write_kv_cache, so that both calls are tested. */
static void fill_layer(layer* data) {
  float key[kNumSlots][kNumKvHeads][kHeadSize];
  float value[kNumSlots][kNumKvHeads][kHeadSize];
  int64_t slots[kNumSlots];
  int64_t count = 0;
  memset(data, 0, sizeof *data);
  fill(&data->query[0][0][0], kNumTokens * kNumHeads * kHeadSize, 1);
  fill(&key[0][0][0], kNumSlots * kNumKvHeads * kHeadSize, 2);
  fill(&value[0][0][0], kNumSlots * kNumKvHeads * kHeadSize, 3);
  for (int seq = 0; seq < kNumSeqs; ++seq) {
    for (int pos = 0; pos < seq_lens[seq]; ++pos) slots[count++] = slot_of(seq, pos);
  }
  slots[count++] = -1; /* a padded token */

  const quire_kv_cache cache = make_cache(data);
  const quire_tensor k = tensor(key, QUIRE_DTYPE_FLOAT32, 3, kNumSlots, kNumKvHeads, kHeadSize, 0);
  const quire_tensor v =
      tensor(value, QUIRE_DTYPE_FLOAT32, 3, kNumSlots, kNumKvHeads, kHeadSize, 0);
  const quire_tensor slot_mapping = tensor(slots, QUIRE_DTYPE_INT64, 1, count, 0, 0, 0);
  CHECK(quire_write_kv_cache(&k, &v, &cache, &slot_mapping, NULL) == QUIRE_OK);
  for (int64_t i = 0; i + 1 < count; ++i) {
    CHECK(memcmp(data->key_cache[slots[i]], key[i], sizeof key[i]) == 0);
    CHECK(memcmp(data->value_cache[slots[i]], value[i], sizeof value[i]) == 0);
  }
}

static void run_on(const char* backend, int window, const quire_context* context) {
  static layer data;
  fill_layer(&data);
  expect_all(&data, window);
  const quire_kv_cache cache = make_cache(&data);
  const quire_batch batch = make_batch();
  quire_attention_args args = make_args(&data, &cache);
  quire_attention_config config = make_config();
  quire_score score;
  CHECK(quire_score_init(&score, sizeof score) == QUIRE_OK);
  score.sinks = tensor(sinks, QUIRE_DTYPE_FLOAT32, 1, kNumHeads, 0, 0, 0);
  config.backend = backend;
  *(window > 0 ? &args.score : &config.score) = &score; /* the call's own, or the plan's */
  if (window > 0) {
    config.window = QUIRE_WINDOW_LEFT;
    config.window_size = window;
  }

  quire_plan* plan = NULL;
  const char* name = NULL;
  int64_t workspace_bytes = -1;
  CHECK(quire_plan_create(&config, &plan) == QUIRE_OK);
  if (plan == NULL) return;
  CHECK(quire_plan_backend_name(plan, &name) == QUIRE_OK && strcmp(name, backend) == 0);
  CHECK(quire_plan_update(plan, &batch, 0, context) == QUIRE_OK);
  CHECK(quire_attention(plan, &args, context) == QUIRE_OK);
  CHECK(quire_plan_workspace_bytes(plan, &workspace_bytes) == QUIRE_OK && workspace_bytes >= 0);
  check_result(&data);
  CHECK(quire_plan_destroy(plan) == QUIRE_OK);
}

/* A caller's own threads: here the calling thread does everything, in reverse order. */
static void run_tasks_backwards(void* user, int64_t num_tasks, quire_task task, void* context) {
  ++*(int*)user;
  for (int64_t i = num_tasks - 1; i >= 0; --i) task(context, i, 0);
}

static void test_attention(void) {
  int32_t num_backends = 0;
  CHECK(quire_backend_count(&num_backends) == QUIRE_OK && num_backends >= 2);
  for (int32_t i = 0; i < num_backends; ++i) {
    const char* name = "";
    int32_t available = -1;
    CHECK(quire_backend_name(i, &name) == QUIRE_OK);
    CHECK(quire_backend_available(i, &available) == QUIRE_OK && (available == 0 || available == 1));
    if (!available || strncmp(name, "cuda", 4) == 0) continue; /* needs memory of the device */
    run_on(name, 0, NULL);
    run_on(name, 3, NULL);
  }
}

static void test_threads(void) {
  quire_context context;
  int num_runs = 0;
  CHECK(quire_context_init(&context, sizeof context) == QUIRE_OK);
  context.check_indices = 1;
  CHECK(quire_thread_pool_create(3, &context.threads) == QUIRE_OK);
  run_on("cpu", 0, &context);
  CHECK(quire_thread_pool_destroy(context.threads) == QUIRE_OK);

  CHECK(quire_thread_pool_wrap(1, run_tasks_backwards, &num_runs, &context.threads) == QUIRE_OK);
  run_on("cpu", 0, &context);
  CHECK(quire_thread_pool_destroy(context.threads) == QUIRE_OK);
  CHECK(num_runs > 0);

  CHECK(quire_thread_pool_create(0, &context.threads) == QUIRE_INVALID_ARGUMENT);
  CHECK(context.threads == NULL);
  CHECK(strcmp(quire_last_error_argument(), "num_threads") == 0);
}

/* A state merged with one that saw nothing stays; merged with itself, its lse grows by ln 2. */
static void test_merge_states(void) {
  static layer data;
  float merged_lse[kNumHeads][kNumTokens];
  float nothing[kNumHeads][kNumTokens];
  fill_layer(&data);
  expect_all(&data, 0);
  for (int i = 0; i < kNumHeads * kNumTokens; ++i) (&nothing[0][0])[i] = -INFINITY;
  memset(data.query, 0xFF, sizeof data.query); /* NaN: must not matter */

  const quire_tensor o = query_tensor(data.expected);
  const quire_tensor lse = lse_tensor(data.expected_lse);
  const quire_tensor o_b = query_tensor(data.query);
  const quire_tensor lse_b = lse_tensor(nothing);
  const quire_tensor output = query_tensor(data.output);
  const quire_tensor lse_out = lse_tensor(merged_lse);
  CHECK(quire_merge_states(&o, &lse, &o_b, &lse_b, &output, NULL, NULL) == QUIRE_OK);
  CHECK(
      close_to(&data.output[0][0][0], &data.expected[0][0][0], kNumTokens * kNumHeads * kHeadSize));
  CHECK(quire_merge_states(&o, &lse, &o, &lse, &output, &lse_out, NULL) == QUIRE_OK);
  CHECK(
      close_to(&data.output[0][0][0], &data.expected[0][0][0], kNumTokens * kNumHeads * kHeadSize));
  for (int i = 0; i < kNumHeads * kNumTokens; ++i) {
    CHECK(fabsf((&merged_lse[0][0])[i] - (&data.expected_lse[0][0])[i] - 0.69314718f) < 1e-5f);
  }
}

static void expect_invalid(int line, quire_status status, const char* argument) {
  check_at(line, status == QUIRE_INVALID_ARGUMENT, "status is QUIRE_INVALID_ARGUMENT");
  check_at(line, strcmp(quire_last_error_argument(), argument) == 0, argument);
  check_at(line, strstr(quire_last_error(), argument) != NULL, "the text names the argument");
}
#define EXPECT_INVALID(call, argument) expect_invalid(__LINE__, call, argument)

static void test_config_errors(void) {
  quire_plan* plan = (quire_plan*)&num_failures;
  quire_attention_config config = make_config();
  config.num_heads = 0;
  EXPECT_INVALID(quire_plan_create(&config, &plan), "num_heads");
  CHECK(plan == NULL);
  config = make_config();
  config.block_size = 1 << 21;
  EXPECT_INVALID(quire_plan_create(&config, &plan), "block_size");
  config = make_config();
  config.dtype = 99;
  EXPECT_INVALID(quire_plan_create(&config, &plan), "dtype");
  config = make_config();
  config.window = -1;
  EXPECT_INVALID(quire_plan_create(&config, &plan), "window");
  config = make_config();
  config.causal = 7;
  EXPECT_INVALID(quire_plan_create(&config, &plan), "causal");
  config = make_config();
  config.clamp_ranges = 7;
  EXPECT_INVALID(quire_plan_create(&config, &plan), "clamp_ranges");
  config = make_config();
  quire_score score;
  CHECK(quire_score_init(&score, sizeof score) == QUIRE_OK);
  score.sinks.ndim = 9;
  config.score = &score;
  EXPECT_INVALID(quire_plan_create(&config, &plan), "sinks");
  config = make_config();
  config.backend = "abacus";
  EXPECT_INVALID(quire_plan_create(&config, &plan), "backend");
  config = make_config();
  config.struct_size = 8;
  EXPECT_INVALID(quire_plan_create(&config, &plan), "config.struct_size");
  EXPECT_INVALID(quire_plan_create(NULL, &plan), "config");
  config = make_config();
  EXPECT_INVALID(quire_plan_create(&config, NULL), "plan");
  EXPECT_INVALID(quire_attention_config_init(&config, 3), "struct_size");
  EXPECT_INVALID(quire_attention_config_init(NULL, sizeof config), "config");
}

/* What a caller with a later header has: members that this library does not know. */
static void test_newer_caller(void) {
  struct {
    quire_attention_config known;
    int64_t added;
  } config;
  quire_plan* plan = NULL;
  memset(&config, 0xFF, sizeof config);
  CHECK(quire_attention_config_init(&config.known, sizeof config) == QUIRE_OK);
  CHECK(config.added == 0 && config.known.struct_size == sizeof config);
  config.known.num_heads = kNumHeads;
  config.known.num_kv_heads = kNumKvHeads;
  config.known.head_size = kHeadSize;
  CHECK(quire_plan_create(&config.known, &plan) == QUIRE_OK);
  CHECK(quire_plan_destroy(plan) == QUIRE_OK);
  config.added = 1;
  EXPECT_INVALID(quire_plan_create(&config.known, &plan), "config.struct_size");
}

/* What a caller with the first header has: none of the members that came later. */
static void test_older_caller(void) {
  quire_plan* plan = NULL;
  quire_attention_config config = make_config();
  config.struct_size = offsetof(quire_attention_config, clamp_ranges);
  config.clamp_ranges = 7; /* not the caller's memory */
  CHECK(quire_plan_create(&config, &plan) == QUIRE_OK);
  quire_batch batch = make_batch();
  batch.struct_size = offsetof(quire_batch, kv_offset);
  memset(&batch.kv_offset, 0xFF, sizeof batch - batch.struct_size);
  CHECK(quire_plan_update(plan, &batch, 0, NULL) == QUIRE_OK);
  CHECK(quire_plan_destroy(plan) == QUIRE_OK);
  --config.struct_size;
  EXPECT_INVALID(quire_plan_create(&config, &plan), "config.struct_size");
}

static void test_call_errors(void) {
  static layer data;
  fill_layer(&data);
  const quire_kv_cache cache = make_cache(&data);
  const quire_attention_config config = make_config();
  quire_batch batch = make_batch();
  quire_plan* plan = NULL;
  const char* name = NULL;
  int64_t bytes = 0;
  CHECK(quire_plan_create(&config, &plan) == QUIRE_OK);
  EXPECT_INVALID(quire_plan_update(plan, NULL, 0, NULL), "batch");
  EXPECT_INVALID(quire_plan_update(NULL, &batch, 0, NULL), "plan");
  batch.seq_lens.dtype = QUIRE_DTYPE_INT64;
  EXPECT_INVALID(quire_plan_update(plan, &batch, 0, NULL), "seq_lens");
  batch = make_batch();
  batch.q_offset = tensor(seq_lens, QUIRE_DTYPE_INT64, 1, kNumSeqs, 0, 0, 0);
  EXPECT_INVALID(quire_plan_update(plan, &batch, 0, NULL), "q_offset");
  batch = make_batch();
  batch.max_seq_len = 1000000; /* an upper bound, however wide the table is */
  CHECK(quire_plan_update(plan, &batch, 0, NULL) == QUIRE_OK);

  data.output[0][0][0] = 42.0f;
  quire_attention_args args = make_args(&data, &cache);
  args.query.dtype = QUIRE_DTYPE_NONE;
  EXPECT_INVALID(quire_attention(plan, &args, NULL), "query");
  args = make_args(&data, &cache);
  args.query.shape[2] = kHeadSize / 2;
  EXPECT_INVALID(quire_attention(plan, &args, NULL), "query");
  args = make_args(&data, &cache);
  args.output.device.type = 2;
  EXPECT_INVALID(quire_attention(plan, &args, NULL), "output");
  args = make_args(&data, NULL);
  EXPECT_INVALID(quire_attention(plan, &args, NULL), "kv_cache");
  CHECK(strcmp(quire_last_error(), "kv_cache: expected a cache, got none") == 0);
  CHECK(quire_plan_backend_name(NULL, &name) == QUIRE_INVALID_ARGUMENT);
  CHECK(quire_plan_workspace_bytes(NULL, &bytes) == QUIRE_INVALID_ARGUMENT);
  EXPECT_INVALID(quire_attention(plan, NULL, NULL), "args");
  EXPECT_INVALID(quire_attention(NULL, &args, NULL), "plan");
  CHECK(data.output[0][0][0] == 42.0f);
  CHECK(quire_plan_destroy(plan) == QUIRE_OK);
  CHECK(quire_plan_destroy(NULL) == QUIRE_OK);
}

static void test_backends(void) {
  const quire_attention_config config = make_config();
  char text[64];
  char cut[2];
  size_t length = 0;
  const char* name = NULL;
  CHECK(quire_backend_name(0, &name) == QUIRE_OK && strlen(name) > 0);
  CHECK(quire_backend_instruction_set(0, text, sizeof text, &length) == QUIRE_OK);
  CHECK(length == strlen(text) && length > 0);
  CHECK(quire_backend_instruction_set(0, cut, sizeof cut, &length) == QUIRE_OK);
  CHECK(cut[0] == text[0] && cut[1] == '\0' && length == strlen(text));
  CHECK(quire_backend_instruction_set(0, NULL, 0, &length) == QUIRE_OK);
  EXPECT_INVALID(quire_backend_instruction_set(0, NULL, 9, &length), "text");
  EXPECT_INVALID(quire_backend_name(-1, &name), "backend");
  EXPECT_INVALID(quire_backend_name(1000, &name), "backend");
  EXPECT_INVALID(quire_backend_count(NULL), "count");
  CHECK(quire_backend_supports(0, &config, text, sizeof text, &length) == QUIRE_OK && length == 0);
}

int main(void) {
  CHECK(strcmp(quire_last_error(), "") == 0);
  CHECK(strlen(quire_version()) >= 5);
  test_attention();
  test_threads();
  test_merge_states();
  test_config_errors();
  test_newer_caller();
  test_older_caller();
  test_call_errors();
  test_backends();
  if (num_failures > 0) {
    printf("%d checks failed\n", num_failures);
    return EXIT_FAILURE;
  }
  puts("C ABI: every check passed");
  return EXIT_SUCCESS;
}
