/* The functional core from C: attention of two small sequences against plain loops, on every backend
 * and on several kinds of thread pools; and how mistakes look. */
#include <math.h>
#include <stddef.h>
#include <string.h>

#include "quire/quire_c.h"
#include "tests/c_api/checks.h"
#include "tests/c_api/layer.h"

static void check_result(const layer* data) {
  CHECK(close_to(&data->output[0][0][0], &data->expected[0][0][0],
                 kNumTokens * kNumHeads * kHeadSize));
  CHECK(close_to(&data->lse[0][0], &data->expected_lse[0][0], kNumHeads * kNumTokens));
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

  char text[8];
  size_t length = 0;
  CHECK(quire_plan_to_string(plan, text, sizeof text, &length) == QUIRE_OK && length >= 8);
  CHECK(strlen(text) == sizeof text - 1);
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
  int32_t num_threads = 0;
  CHECK(quire_default_num_threads(&num_threads) == QUIRE_OK && num_threads >= 1);
  EXPECT_INVALID(quire_default_num_threads(NULL), "num_threads");
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
  quire_context context;
  CHECK(quire_context_init(&context, sizeof context) == QUIRE_OK);
  context.backend = "abacus";
  EXPECT_INVALID(quire_merge_states(&o, &lse, &o_b, &lse_b, &output, NULL, &context), "backend");
  context.backend = "reference";
  CHECK(quire_merge_states(&o, &lse, &o_b, &lse_b, &output, NULL, &context) == QUIRE_OK);
  CHECK(
      close_to(&data.output[0][0][0], &data.expected[0][0][0], kNumTokens * kNumHeads * kHeadSize));
  CHECK(quire_merge_states(&o, &lse, &o, &lse, &output, &lse_out, NULL) == QUIRE_OK);
  CHECK(
      close_to(&data.output[0][0][0], &data.expected[0][0][0], kNumTokens * kNumHeads * kHeadSize));
  for (int i = 0; i < kNumHeads * kNumTokens; ++i) {
    CHECK(fabsf((&merged_lse[0][0])[i] - (&data.expected_lse[0][0])[i] - 0.69314718f) < 1e-5f);
  }
}

static void test_config_errors(void) {
  static int not_a_plan;
  quire_plan* plan = (quire_plan*)&not_a_plan;
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
  args = make_args(&data, &cache);
  quire_context context;
  CHECK(quire_context_init(&context, sizeof context) == QUIRE_OK);
  context.backend = "reference"; /* not the plan's */
  EXPECT_INVALID(quire_attention(plan, &args, &context), "backend");
  context.struct_size = offsetof(quire_context, backend); /* a caller without that member */
  CHECK(quire_attention(plan, &args, &context) == QUIRE_OK);
  data.output[0][0][0] = 42.0f;
  args = make_args(&data, NULL);
  EXPECT_INVALID(quire_attention(plan, &args, NULL), "kv_cache");
  CHECK(strcmp(quire_last_error(), "kv_cache: expected a cache, got none") == 0);
  CHECK(quire_plan_backend_name(NULL, &name) == QUIRE_INVALID_ARGUMENT);
  CHECK(quire_plan_workspace_bytes(NULL, &bytes) == QUIRE_INVALID_ARGUMENT);
  EXPECT_INVALID(quire_plan_to_string(NULL, NULL, 0, NULL), "plan");
  EXPECT_INVALID(quire_plan_to_string(plan, NULL, 1, NULL), "text");
  EXPECT_INVALID(quire_attention(plan, NULL, NULL), "args");
  EXPECT_INVALID(quire_attention(NULL, &args, NULL), "plan");
  CHECK(data.output[0][0][0] == 42.0f);
  CHECK(quire_plan_destroy(plan) == QUIRE_OK);
  CHECK(quire_plan_destroy(NULL) == QUIRE_OK);
}

void test_core(void) {
  test_attention();
  test_threads();
  test_merge_states();
  test_config_errors();
  test_newer_caller();
  test_older_caller();
  test_call_errors();
}
