/* The serving layer: metadata from a batch and by hand, layers, what is checked before the cache is
 * written. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "quire/quire_c.h"
#include "tests/c_api/checks.h"
#include "tests/c_api/layer.h"
#include "tests/c_api/parts.h"

/* A layer, and the step's own keys and values, which are not in the cache yet. */
typedef struct step {
  layer data;
  float key[kNumTokens][kNumKvHeads][kHeadSize];
  float value[kNumTokens][kNumKvHeads][kHeadSize];
  int64_t slots[kNumTokens];
  quire_kv_cache cache;
  quire_attention_config config;
  quire_score score;
  quire_metadata_builder* builder;
  quire_attention_metadata* metadata;
  quire_attention_impl* impl;
} step;

/* Moves the step's tokens out of a cache that holds them. */
static void take_new_tokens(step* s) {
  for (int seq = 0; seq < kNumSeqs; ++seq) {
    const int query_len = query_start_loc[seq + 1] - query_start_loc[seq];
    for (int i = 0; i < query_len; ++i) {
      const int row = query_start_loc[seq] + i;
      s->slots[row] = slot_of(seq, seq_lens[seq] - query_len + i);
      memcpy(s->key[row], s->data.key_cache[s->slots[row]], sizeof s->key[row]);
      memcpy(s->value[row], s->data.value_cache[s->slots[row]], sizeof s->value[row]);
      memset(s->data.key_cache[s->slots[row]], 0xFF, sizeof s->key[row]);
      memset(s->data.value_cache[s->slots[row]], 0xFF, sizeof s->value[row]);
    }
  }
}

static int is_written(const step* s) {
  int written = 0;
  for (int row = 0; row < kNumTokens; ++row) {
    written += memcmp(s->key[row], s->data.key_cache[s->slots[row]], sizeof s->key[row]) == 0;
    written += memcmp(s->value[row], s->data.value_cache[s->slots[row]], sizeof s->value[row]) == 0;
  }
  CHECK(written == 0 || written == 2 * kNumTokens);
  return written > 0;
}

static void open_step(step* s, const char* backend) {
  fill_layer(&s->data);
  expect_all(&s->data, 0);
  take_new_tokens(s);
  memset(s->data.output, 0xFF, sizeof s->data.output);
  s->cache = make_cache(&s->data);
  s->config = make_config();
  s->config.backend = backend;
  CHECK(quire_score_init(&s->score, sizeof s->score) == QUIRE_OK);
  s->score.sinks = tensor(sinks, QUIRE_DTYPE_FLOAT32, 1, kNumHeads, 0, 0, 0);
  s->config.score = &s->score;
  CHECK(quire_metadata_builder_create(&s->config, &s->builder) == QUIRE_OK);
  CHECK(quire_attention_metadata_create(&s->metadata) == QUIRE_OK);
  CHECK(quire_attention_impl_create(&s->config, NULL, &s->impl) == QUIRE_OK);
}

static void close_step(step* s) {
  CHECK(quire_attention_impl_destroy(s->impl) == QUIRE_OK);
  CHECK(quire_attention_metadata_destroy(s->metadata) == QUIRE_OK);
  CHECK(quire_metadata_builder_destroy(s->builder) == QUIRE_OK);
}

static quire_batch batch_of(const step* s) {
  quire_batch batch = make_batch();
  batch.slot_mapping = tensor(s->slots, QUIRE_DTYPE_INT64, 1, kNumTokens, 0, 0, 0);
  return batch;
}

static quire_forward_args args_of(step* s) {
  quire_forward_args args;
  CHECK(quire_forward_args_init(&args, sizeof args) == QUIRE_OK);
  args.query = query_tensor(s->data.query);
  args.key = tensor(s->key, QUIRE_DTYPE_FLOAT32, 3, kNumTokens, kNumKvHeads, kHeadSize, 0);
  args.value = tensor(s->value, QUIRE_DTYPE_FLOAT32, 3, kNumTokens, kNumKvHeads, kHeadSize, 0);
  args.kv_cache = &s->cache;
  args.metadata = s->metadata;
  args.output = query_tensor(s->data.output);
  args.lse = lse_tensor(s->data.lse);
  return args;
}

static void check_result(const step* s) {
  CHECK(close_to(&s->data.output[0][0][0], &s->data.expected[0][0][0],
                 kNumTokens * kNumHeads * kHeadSize));
  CHECK(close_to(&s->data.lse[0][0], &s->data.expected_lse[0][0], kNumHeads * kNumTokens));
}

static void build(step* s) {
  const quire_batch batch = batch_of(s);
  CHECK(quire_metadata_builder_build(s->builder, 0, &batch, 0, NULL, s->metadata) == QUIRE_OK);
}

static void test_forward(const char* backend) {
  static step s;
  open_step(&s, backend);
  build(&s);
  const quire_forward_args args = args_of(&s);
  CHECK(quire_attention_impl_forward(s.impl, &args, NULL) == QUIRE_OK);
  CHECK(is_written(&s));
  check_result(&s);
  close_step(&s);
}

/* The cache written apart; the builder gone, its metadata not. */
static void test_cache_update(void) {
  static step s;
  open_step(&s, "cpu");
  build(&s);
  quire_forward_args args = args_of(&s);
  quire_layer_scales scales;
  CHECK(quire_layer_scales_init(&scales, sizeof scales) == QUIRE_OK);
  const quire_tensor slots = tensor(s.slots, QUIRE_DTYPE_INT64, 1, kNumTokens, 0, 0, 0);
  CHECK(quire_attention_impl_do_kv_cache_update(s.impl, &scales, &args.key, &args.value, &s.cache,
                                                &slots, NULL) == QUIRE_OK);
  CHECK(is_written(&s));
  memset(&args.key, 0, sizeof args.key);
  memset(&args.value, 0, sizeof args.value);
  CHECK(quire_metadata_builder_destroy(s.builder) == QUIRE_OK);
  s.builder = NULL;
  CHECK(quire_attention_impl_forward(s.impl, &args, NULL) == QUIRE_OK);
  check_result(&s);
  EXPECT_INVALID(quire_attention_impl_do_kv_cache_update(NULL, NULL, &args.key, &args.value,
                                                         &s.cache, &slots, NULL),
                 "impl");
  EXPECT_INVALID(quire_attention_impl_do_kv_cache_update(s.impl, NULL, NULL, &args.value, &s.cache,
                                                         &slots, NULL),
                 "key");
  close_step(&s);
}

/* This layer's own slots; a layer that shares another's cache writes nothing. */
static void test_slots_and_sharing(void) {
  static step s;
  open_step(&s, "cpu");
  const int64_t nowhere[kNumTokens] = {-1, -1, -1, -1};
  quire_batch batch = batch_of(&s);
  batch.slot_mapping = tensor(nowhere, QUIRE_DTYPE_INT64, 1, kNumTokens, 0, 0, 0);
  CHECK(quire_metadata_builder_build(s.builder, 0, &batch, 1, NULL, s.metadata) == QUIRE_OK);
  quire_forward_args args = args_of(&s);
  quire_attention_impl* sharing = NULL;
  CHECK(quire_attention_impl_create(&s.config, "model.layers.3", &sharing) == QUIRE_OK);
  args.slot_mapping = tensor(s.slots, QUIRE_DTYPE_INT64, 1, kNumTokens, 0, 0, 0);
  CHECK(quire_attention_impl_forward(sharing, &args, NULL) == QUIRE_OK);
  CHECK(!is_written(&s));
  CHECK(quire_attention_impl_forward(s.impl, &args, NULL) == QUIRE_OK);
  CHECK(is_written(&s));
  check_result(&s);
  CHECK(quire_attention_impl_destroy(sharing) == QUIRE_OK);
  close_step(&s);
}

/* A layer's scales replace those of the cache where it has them: here K's, not V's. */
static void test_scales(void) {
  static step s;
  static uint8_t bytes[2][2][kNumSlots][kNumKvHeads][kHeadSize]; /* two caches, K and V */
  quire_kv_cache caches[2];
  open_step(&s, "cpu");
  for (int i = 0; i < 2; ++i) {
    CHECK(quire_kv_cache_init(&caches[i], sizeof caches[i]) == QUIRE_OK);
    caches[i].dtype = QUIRE_KV_CACHE_FP8_E4M3;
    caches[i].key =
        tensor(bytes[i][0], QUIRE_DTYPE_UINT8, 4, kNumBlocks, kBlockSize, kNumKvHeads, kHeadSize);
    caches[i].value =
        tensor(bytes[i][1], QUIRE_DTYPE_UINT8, 4, kNumBlocks, kBlockSize, kNumKvHeads, kHeadSize);
    caches[i].v_scale.value = 0.5f;
  }
  caches[0].k_scale.value = 0.125f;
  const quire_forward_args args = args_of(&s);
  const quire_tensor slots = tensor(s.slots, QUIRE_DTYPE_INT64, 1, kNumTokens, 0, 0, 0);
  quire_layer_scales scales;
  CHECK(quire_layer_scales_init(&scales, sizeof scales) == QUIRE_OK);
  scales.has_k = 1;
  scales.k.value = 0.125f;
  scales.v.value = 0.25f; /* without has_v nobody's */
  CHECK(quire_write_kv_cache(&args.key, &args.value, &caches[0], &slots, NULL) == QUIRE_OK);
  quire_attention_impl* impl = NULL;
  s.config.kv_cache_dtype = QUIRE_KV_CACHE_FP8_E4M3;
  CHECK(quire_attention_impl_create(&s.config, "", &impl) == QUIRE_OK);
  CHECK(quire_attention_impl_do_kv_cache_update(impl, &scales, &args.key, &args.value, &caches[1],
                                                &slots, NULL) == QUIRE_OK);
  CHECK(memcmp(bytes[0], bytes[1], sizeof bytes[0]) == 0);
  CHECK(quire_attention_impl_destroy(impl) == QUIRE_OK);
  close_step(&s);
}

static void test_profiling_run(void) {
  static step s;
  open_step(&s, "cpu");
  quire_forward_args args = args_of(&s);
  args.metadata = NULL;
  CHECK(quire_attention_impl_forward(s.impl, &args, NULL) == QUIRE_OK);
  CHECK(!is_written(&s));
  for (int i = 0; i < kNumTokens * kNumHeads * kHeadSize; ++i) {
    CHECK((&s.data.output[0][0][0])[i] == 0.0f);
  }
  close_step(&s);
}

static void test_errors_before_writes(void) {
  static step s;
  open_step(&s, "cpu");
  quire_forward_args args = args_of(&s);
  EXPECT_INVALID(quire_attention_impl_forward(s.impl, &args, NULL), "scheduler_metadata");
  build(&s);
  args.output.shape[0] = kNumTokens - 1;
  EXPECT_INVALID(quire_attention_impl_forward(s.impl, &args, NULL), "output");
  args = args_of(&s);
  args.value.dtype = QUIRE_DTYPE_FLOAT16;
  EXPECT_INVALID(quire_attention_impl_forward(s.impl, &args, NULL), "value");
  args = args_of(&s);
  args.lse.dtype = 77;
  EXPECT_INVALID(quire_attention_impl_forward(s.impl, &args, NULL), "lse");
  args = args_of(&s);
  args.kv_cache = NULL;
  EXPECT_INVALID(quire_attention_impl_forward(s.impl, &args, NULL), "kv_cache");
  args = args_of(&s);
  args.has_output_scale = 2;
  EXPECT_INVALID(quire_attention_impl_forward(s.impl, &args, NULL), "has_output_scale");
  args = args_of(&s);
  args.struct_size = 8;
  EXPECT_INVALID(quire_attention_impl_forward(s.impl, &args, NULL), "args.struct_size");
  args = args_of(&s);
  quire_layer_scales scales;
  CHECK(quire_layer_scales_init(&scales, sizeof scales) == QUIRE_OK);
  scales.has_k = -1;
  args.scales = &scales;
  EXPECT_INVALID(quire_attention_impl_forward(s.impl, &args, NULL), "has_k");
  args = args_of(&s);
  EXPECT_INVALID(quire_attention_impl_forward(NULL, &args, NULL), "impl");
  EXPECT_INVALID(quire_attention_impl_forward(s.impl, NULL, NULL), "args");

  quire_context context;
  CHECK(quire_context_init(&context, sizeof context) == QUIRE_OK);
  context.backend = "reference"; /* not the layer's */
  EXPECT_INVALID(quire_attention_impl_forward(s.impl, &args, &context), "backend");
  CHECK(!is_written(&s));
  CHECK(((const unsigned char*)s.data.output)[0] == 0xFF);

  /* Metadata of an earlier step is refused. */
  quire_attention_metadata* later = NULL;
  const quire_batch batch = batch_of(&s);
  CHECK(quire_attention_metadata_create(&later) == QUIRE_OK);
  CHECK(quire_metadata_builder_build(s.builder, 0, &batch, 0, NULL, later) == QUIRE_OK);
  EXPECT_INVALID(quire_attention_impl_forward(s.impl, &args, NULL), "metadata");
  args.metadata = later;
  CHECK(quire_attention_impl_forward(s.impl, &args, NULL) == QUIRE_OK);
  check_result(&s);
  CHECK(quire_attention_metadata_destroy(later) == QUIRE_OK);
  close_step(&s);
}

static int same_view(const quire_tensor* a, const quire_tensor* b) {
  return a->data == b->data && a->dtype == b->dtype && a->ndim == b->ndim &&
         memcmp(a->shape, b->shape, sizeof a->shape) == 0;
}

/* Both sequences start with the same block: a prefix of 4 tokens. */
static const int32_t shared_table[kNumSeqs][kMaxBlocks] = {{5, 2, 0, 0}, {5, 1, 3, 0}};

static void check_cascade(const quire_attention_metadata_fields* fields) {
  const int32_t* cu_prefix_query_lens = fields->cu_prefix_query_lens.data;
  const int32_t* prefix_kv_lens = fields->prefix_kv_lens.data;
  const int32_t* suffix_kv_lens = fields->suffix_kv_lens.data;
  CHECK(fields->use_cascade == 1 && fields->common_prefix_len == kBlockSize);
  CHECK(fields->cu_prefix_query_lens.shape[0] == 2);
  CHECK(cu_prefix_query_lens[0] == 0 && cu_prefix_query_lens[1] == kNumTokens);
  CHECK(fields->prefix_kv_lens.shape[0] == 1 && prefix_kv_lens[0] == kBlockSize);
  CHECK(fields->suffix_kv_lens.shape[0] == kNumSeqs);
  CHECK(suffix_kv_lens[0] == 2 && suffix_kv_lens[1] == 5);
}

static void test_fields(void) {
  static step s;
  open_step(&s, "cpu");
  quire_batch batch = batch_of(&s);
  quire_attention_metadata_fields fields;
  batch.max_query_len = 3;
  batch.max_seq_len = 9;
  CHECK(quire_attention_metadata_get(s.metadata, &fields, sizeof fields) == QUIRE_OK);
  CHECK(fields.query_start_loc.dtype == QUIRE_DTYPE_NONE && fields.scheduler_metadata == NULL);

  CHECK(quire_metadata_builder_build(s.builder, 0, &batch, 0, NULL, s.metadata) == QUIRE_OK);
  memset(&fields, 0xFF, sizeof fields);
  CHECK(quire_attention_metadata_get(s.metadata, &fields, sizeof fields) == QUIRE_OK);
  CHECK(fields.struct_size == sizeof fields);
  CHECK(fields.num_actual_tokens == kNumTokens);
  CHECK(fields.max_query_len == 3 && fields.max_seq_len == 9);
  CHECK(same_view(&fields.query_start_loc, &batch.query_start_loc));
  CHECK(same_view(&fields.seq_lens, &batch.seq_lens));
  CHECK(same_view(&fields.block_table, &batch.block_table));
  CHECK(same_view(&fields.slot_mapping, &batch.slot_mapping));
  CHECK(fields.use_cascade == 0 && fields.common_prefix_len == 0);
  CHECK(fields.cu_prefix_query_lens.dtype == QUIRE_DTYPE_NONE);
  CHECK(fields.causal.dtype == QUIRE_DTYPE_NONE && fields.q_offset.dtype == QUIRE_DTYPE_NONE);
  CHECK(fields.scheduler_metadata != NULL && fields.prefix_scheduler_metadata == NULL);

  /* The plan is one as of the functional core. */
  const char* name = NULL;
  CHECK(quire_plan_backend_name(fields.scheduler_metadata, &name) == QUIRE_OK);
  CHECK(strcmp(name, "cpu") == 0);

  batch.block_table = tensor(shared_table, QUIRE_DTYPE_INT32, 2, kNumSeqs, kMaxBlocks, 0, 0);
  CHECK(quire_metadata_builder_build(s.builder, kBlockSize, &batch, 0, NULL, s.metadata) ==
        QUIRE_OK);
  CHECK(quire_attention_metadata_get(s.metadata, &fields, sizeof fields) == QUIRE_OK);
  check_cascade(&fields);
  CHECK(fields.scheduler_metadata == fields.prefix_scheduler_metadata);
  close_step(&s);
}

static quire_attention_metadata_fields fields_by_hand(const step* s) {
  const quire_batch batch = batch_of(s);
  quire_attention_metadata_fields fields;
  CHECK(quire_attention_metadata_fields_init(&fields, sizeof fields) == QUIRE_OK);
  fields.num_actual_tokens = batch.num_actual_tokens;
  fields.query_start_loc = batch.query_start_loc;
  fields.seq_lens = batch.seq_lens;
  fields.block_table = batch.block_table;
  fields.slot_mapping = batch.slot_mapping;
  return fields;
}

static void test_by_hand(void) {
  static step s;
  open_step(&s, "cpu");
  quire_attention_metadata_fields fields = fields_by_hand(&s);
  quire_forward_args args = args_of(&s);
  CHECK(quire_metadata_builder_plan(s.builder, &fields, NULL, s.metadata) == QUIRE_OK);
  CHECK(quire_attention_impl_forward(s.impl, &args, NULL) == QUIRE_OK);
  CHECK(is_written(&s));
  check_result(&s);

  fields.block_table = tensor(shared_table, QUIRE_DTYPE_INT32, 2, kNumSeqs, kMaxBlocks, 0, 0);
  fields.use_cascade = 1;
  fields.common_prefix_len = kBlockSize;
  CHECK(quire_metadata_builder_plan(s.builder, &fields, NULL, s.metadata) == QUIRE_OK);
  quire_attention_metadata_fields complete;
  CHECK(quire_attention_metadata_get(s.metadata, &complete, sizeof complete) == QUIRE_OK);
  check_cascade(&complete);
  close_step(&s);
}

/* Quire's own members of the batch reach the plan, each by its name, and come back. */
static void test_own_members(void) {
  static step s;
  open_step(&s, "cpu");
  quire_attention_metadata_fields fields;
  static const char* const names[] = {"causal",  "mm_prefix_range", "visible_prefix_lens",
                                      "qq_bias", "kv_offset",       "kv_stride",
                                      "q_offset"};
  quire_tensor* const members[] = {
      &fields.causal,  &fields.mm_prefix_range, &fields.visible_prefix_lens,
      &fields.qq_bias, &fields.kv_offset,       &fields.kv_stride,
      &fields.q_offset};
  const quire_tensor wrong = tensor(s.slots, QUIRE_DTYPE_INT64, 1, kNumSeqs, 0, 0, 0);
  for (int i = 0; i < 7; ++i) {
    fields = fields_by_hand(&s);
    *members[i] = wrong; /* none of them is int64 */
    EXPECT_INVALID(quire_metadata_builder_plan(s.builder, &fields, NULL, s.metadata), names[i]);
  }

  static const int32_t ones[kNumSeqs] = {1, 1};
  const quire_tensor kv_stride = tensor(ones, QUIRE_DTYPE_INT32, 1, kNumSeqs, 0, 0, 0);
  fields = fields_by_hand(&s);
  fields.kv_stride = kv_stride;
  fields.kv_start_loc = wrong; /* not looked at with a cache */
  CHECK(quire_metadata_builder_plan(s.builder, &fields, NULL, s.metadata) == QUIRE_OK);
  memset(&fields, 0, sizeof fields);
  CHECK(quire_attention_metadata_get(s.metadata, &fields, sizeof fields) == QUIRE_OK);
  CHECK(same_view(&fields.kv_stride, &kv_stride) && same_view(&fields.kv_start_loc, &wrong));
  close_step(&s);
}

static void test_builder_errors(void) {
  static step s;
  static int not_a_handle;
  open_step(&s, "cpu");
  const quire_batch batch = batch_of(&s);
  quire_attention_metadata_fields fields = fields_by_hand(&s);
  EXPECT_INVALID(quire_metadata_builder_build(NULL, 0, &batch, 0, NULL, s.metadata), "builder");
  EXPECT_INVALID(quire_metadata_builder_build(s.builder, 0, NULL, 0, NULL, s.metadata), "batch");
  EXPECT_INVALID(quire_metadata_builder_build(s.builder, 0, &batch, 0, NULL, NULL), "metadata");
  EXPECT_INVALID(quire_metadata_builder_build(s.builder, 0, &batch, 2, NULL, s.metadata),
                 "fast_build");
  EXPECT_INVALID(quire_metadata_builder_build(s.builder, -1, &batch, 0, NULL, s.metadata),
                 "common_prefix_len");
  EXPECT_INVALID(
      quire_metadata_builder_build_for_cudagraph_capture(s.builder, &batch, NULL, s.metadata),
      "backend"); /* the CPU has no graphs */
  fields.use_cascade = 1;
  EXPECT_INVALID(quire_metadata_builder_plan(s.builder, &fields, NULL, s.metadata),
                 "common_prefix_len");
  fields.use_cascade = 3;
  EXPECT_INVALID(quire_metadata_builder_plan(s.builder, &fields, NULL, s.metadata), "use_cascade");
  fields.struct_size = 8;
  EXPECT_INVALID(quire_metadata_builder_plan(s.builder, &fields, NULL, s.metadata),
                 "fields.struct_size");
  EXPECT_INVALID(quire_metadata_builder_plan(s.builder, NULL, NULL, s.metadata), "fields");
  EXPECT_INVALID(quire_attention_metadata_get(NULL, &fields, sizeof fields), "metadata");
  EXPECT_INVALID(quire_attention_metadata_get(s.metadata, NULL, sizeof fields), "fields");
  EXPECT_INVALID(quire_attention_metadata_get(s.metadata, &fields, 8), "struct_size");
  EXPECT_INVALID(quire_attention_metadata_create(NULL), "metadata");

  quire_metadata_builder* builder = (quire_metadata_builder*)&not_a_handle;
  quire_attention_impl* impl = (quire_attention_impl*)&not_a_handle;
  s.config.num_kv_heads = 4; /* does not divide num_heads */
  EXPECT_INVALID(quire_metadata_builder_create(&s.config, &builder), "num_kv_heads");
  EXPECT_INVALID(quire_attention_impl_create(&s.config, NULL, &impl), "num_kv_heads");
  CHECK(builder == NULL && impl == NULL);
  EXPECT_INVALID(quire_metadata_builder_create(&s.config, NULL), "builder");
  EXPECT_INVALID(quire_attention_impl_create(NULL, NULL, &impl), "config");
  EXPECT_INVALID(quire_attention_impl_create(&s.config, NULL, NULL), "impl");
  CHECK(quire_metadata_builder_destroy(NULL) == QUIRE_OK);
  CHECK(quire_attention_impl_destroy(NULL) == QUIRE_OK);
  CHECK(quire_attention_metadata_destroy(NULL) == QUIRE_OK);
  close_step(&s);
}

void test_serving(void) {
  test_forward("cpu");
  test_forward("reference");
  test_cache_update();
  test_slots_and_sharing();
  test_scales();
  test_profiling_run();
  test_errors_before_writes();
  test_fields();
  test_by_hand();
  test_own_members();
  test_builder_errors();
}
