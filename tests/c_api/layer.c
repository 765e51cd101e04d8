#include "tests/c_api/layer.h"

#include <math.h>
#include <stdio.h>
#include <string.h>

#include "tests/c_api/checks.h"

const int32_t query_start_loc[kNumSeqs + 1] = {0, 1, 4};
const int32_t seq_lens[kNumSeqs] = {6, 9};
const int32_t block_table[kNumSeqs][kMaxBlocks] = {{5, 2, 0, 0}, {7, 1, 3, 0}};

const float sinks[kNumHeads] = {-1.0f, 0.5f, 0.0f, 1.0f, -2.0f, 0.25f};

static float random_value(uint32_t* state) {
  *state = *state * 1664525u + 1013904223u;
  return (float)(*state >> 8) / (float)(1u << 23) - 1.0f;
}

void fill(float* values, size_t count, uint32_t seed) {
  for (size_t i = 0; i < count; ++i) values[i] = random_value(&seed);
}

int64_t slot_of(int seq, int pos) {
  return (int64_t)block_table[seq][pos / kBlockSize] * kBlockSize + pos % kBlockSize;
}

quire_tensor tensor(const void* data, quire_dtype dtype, int32_t ndim, int64_t a, int64_t b,
                    int64_t c, int64_t d) {
  const int64_t shape[4] = {a, b, c, d};
  quire_tensor out;
  CHECK(quire_tensor_init(&out, data, dtype, ndim, shape) == QUIRE_OK);
  return out;
}

quire_tensor query_tensor(const void* data) {
  return tensor(data, QUIRE_DTYPE_FLOAT32, 3, kNumTokens, kNumHeads, kHeadSize, 0);
}

quire_tensor lse_tensor(const void* data) {
  return tensor(data, QUIRE_DTYPE_FLOAT32, 2, kNumHeads, kNumTokens, 0, 0);
}

quire_kv_cache make_cache(const layer* data) {
  quire_kv_cache cache;
  CHECK(quire_kv_cache_init(&cache, sizeof cache) == QUIRE_OK);
  cache.key = tensor(data->key_cache, QUIRE_DTYPE_FLOAT32, 4, kNumBlocks, kBlockSize, kNumKvHeads,
                     kHeadSize);
  cache.value = tensor(data->value_cache, QUIRE_DTYPE_FLOAT32, 4, kNumBlocks, kBlockSize,
                       kNumKvHeads, kHeadSize);
  return cache;
}

quire_batch make_batch(void) {
  quire_batch batch;
  CHECK(quire_batch_init(&batch, sizeof batch) == QUIRE_OK);
  batch.query_start_loc = tensor(query_start_loc, QUIRE_DTYPE_INT32, 1, kNumSeqs + 1, 0, 0, 0);
  batch.seq_lens = tensor(seq_lens, QUIRE_DTYPE_INT32, 1, kNumSeqs, 0, 0, 0);
  batch.block_table = tensor(block_table, QUIRE_DTYPE_INT32, 2, kNumSeqs, kMaxBlocks, 0, 0);
  batch.num_actual_tokens = kNumTokens;
  return batch;
}

quire_attention_config make_config(void) {
  quire_attention_config config;
  CHECK(quire_attention_config_init(&config, sizeof config) == QUIRE_OK);
  config.dtype = QUIRE_DTYPE_FLOAT32;
  config.num_heads = kNumHeads;
  config.num_kv_heads = kNumKvHeads;
  config.head_size = kHeadSize;
  config.block_size = kBlockSize;
  return config;
}

quire_attention_args make_args(layer* data, const quire_kv_cache* cache) {
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

void expect_all(layer* data, int window) {
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

int close_to(const float* got, const float* expected, size_t count) {
  for (size_t i = 0; i < count; ++i) {
    if (!(fabsf(got[i] - expected[i]) <= 1e-5f)) {
      printf("  element %zu: %g, expected %g\n", i, (double)got[i], (double)expected[i]);
      return 0;
    }
  }
  return 1;
}

void fill_layer(layer* data) {
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
