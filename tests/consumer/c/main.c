/* Attention through the C ABI: one sequence of 20 tokens over two blocks, keys all alike, values
 * the token's number. Token 19 sees all 20 and gets their mean, 9.5. Then a mistake is refused. */
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "quire/quire_c.h"

enum { kTokens = 20, kHeads = 2, kHeadSize = 16, kBlocks = 4, kBlockSize = 16 };
enum { kRow = kHeads * kHeadSize, kPage = kBlockSize * kRow };

static float query_data[kTokens * kRow];
static float key_data[kTokens * kRow];
static float value_data[kTokens * kRow];
static float output_data[kTokens * kRow];
static float k_cache_data[kBlocks * kPage];
static float v_cache_data[kBlocks * kPage];

static quire_tensor tensor(void* data, quire_dtype dtype, int32_t ndim, int64_t a, int64_t b,
                           int64_t c, int64_t d) {
  const int64_t shape[4] = {a, b, c, d};
  quire_tensor view;
  if (quire_tensor_init(&view, data, dtype, ndim, shape) != QUIRE_OK) {
    memset(&view, 0, sizeof view);
  }
  return view;
}

#define CHECK(condition)                                                                          \
  do {                                                                                            \
    if (!(condition)) {                                                                           \
      fprintf(stderr, "line %d: %s; last error: %s\n", __LINE__, #condition, quire_last_error()); \
      return 1;                                                                                   \
    }                                                                                             \
  } while (0)

int main(void) {
  int32_t query_start_loc[2] = {0, kTokens};
  int32_t seq_lens[1] = {kTokens};
  int32_t block_table[2] = {3, 1};
  int64_t slot_data[kTokens];
  for (int t = 0; t < kTokens; ++t) {
    slot_data[t] = (int64_t)block_table[t / kBlockSize] * kBlockSize + t % kBlockSize;
    for (int i = 0; i < kRow; ++i) {
      query_data[t * kRow + i] = 0.25F;
      key_data[t * kRow + i] = 1.0F;
      value_data[t * kRow + i] = (float)t;
    }
  }

  quire_attention_config config;
  CHECK(quire_attention_config_init(&config, sizeof config) == QUIRE_OK);
  config.dtype = QUIRE_DTYPE_FLOAT32;
  config.num_heads = kHeads;
  config.num_kv_heads = kHeads;
  config.head_size = kHeadSize;
  config.block_size = kBlockSize;
  quire_plan* plan = NULL;
  CHECK(quire_plan_create(&config, &plan) == QUIRE_OK);

  quire_batch batch;
  CHECK(quire_batch_init(&batch, sizeof batch) == QUIRE_OK);
  batch.query_start_loc = tensor(query_start_loc, QUIRE_DTYPE_INT32, 1, 2, 0, 0, 0);
  batch.seq_lens = tensor(seq_lens, QUIRE_DTYPE_INT32, 1, 1, 0, 0, 0);
  batch.block_table = tensor(block_table, QUIRE_DTYPE_INT32, 2, 1, 2, 0, 0);
  batch.num_actual_tokens = kTokens;
  CHECK(quire_plan_update(plan, &batch, 0, NULL) == QUIRE_OK);

  quire_kv_cache cache;
  CHECK(quire_kv_cache_init(&cache, sizeof cache) == QUIRE_OK);
  cache.key = tensor(k_cache_data, QUIRE_DTYPE_FLOAT32, 4, kBlocks, kBlockSize, kHeads, kHeadSize);
  cache.value =
      tensor(v_cache_data, QUIRE_DTYPE_FLOAT32, 4, kBlocks, kBlockSize, kHeads, kHeadSize);
  const quire_tensor key = tensor(key_data, QUIRE_DTYPE_FLOAT32, 3, kTokens, kHeads, kHeadSize, 0);
  const quire_tensor value =
      tensor(value_data, QUIRE_DTYPE_FLOAT32, 3, kTokens, kHeads, kHeadSize, 0);
  const quire_tensor slots = tensor(slot_data, QUIRE_DTYPE_INT64, 1, kTokens, 0, 0, 0);
  CHECK(quire_write_kv_cache(&key, &value, &cache, &slots, NULL) == QUIRE_OK);

  quire_attention_args args;
  CHECK(quire_attention_args_init(&args, sizeof args) == QUIRE_OK);
  args.query = tensor(query_data, QUIRE_DTYPE_FLOAT32, 3, kTokens, kHeads, kHeadSize, 0);
  args.kv_cache = &cache;
  args.output = tensor(output_data, QUIRE_DTYPE_FLOAT32, 3, kTokens, kHeads, kHeadSize, 0);
  CHECK(quire_attention(plan, &args, NULL) == QUIRE_OK);
  for (int t = 0; t < kTokens; ++t) {
    const float error = output_data[t * kRow] - 0.5F * (float)t;
    CHECK(error < 1e-4F && error > -1e-4F);
  }

  config.num_kv_heads = 3; /* does not divide num_heads */
  quire_plan* refused = NULL;
  CHECK(quire_plan_create(&config, &refused) == QUIRE_INVALID_ARGUMENT);
  CHECK(refused == NULL && strlen(quire_last_error()) > 0);

  CHECK(quire_plan_destroy(plan) == QUIRE_OK);
  printf("quire %s: token 19 got %.2f\n", quire_version(), output_data[19 * kRow]);
  return 0;
}
