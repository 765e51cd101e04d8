/* One small layer with its cache and a batch of two sequences, made through the C ABI, and what
 * attention has to give for it. */
#ifndef QUIRE_TESTS_C_API_LAYER_H_
#define QUIRE_TESTS_C_API_LAYER_H_

#include <stddef.h>
#include <stdint.h>

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

extern const int32_t query_start_loc[kNumSeqs + 1];
extern const int32_t seq_lens[kNumSeqs];
extern const int32_t block_table[kNumSeqs][kMaxBlocks];
extern const float sinks[kNumHeads];

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

void fill(float* values, size_t count, uint32_t seed);

int64_t slot_of(int seq, int pos);

quire_tensor tensor(const void* data, quire_dtype dtype, int32_t ndim, int64_t a, int64_t b,
                    int64_t c, int64_t d);

quire_tensor query_tensor(const void* data);

quire_tensor lse_tensor(const void* data);

quire_kv_cache make_cache(const layer* data);

quire_batch make_batch(void);

quire_attention_config make_config(void);

quire_attention_args make_args(layer* data, const quire_kv_cache* cache);

void expect_all(layer* data, int window);

int close_to(const float* got, const float* expected, size_t count);

/* Random tokens reach the cache through quire_write_kv_cache, so that both calls are tested. */
void fill_layer(layer* data);

#endif /* QUIRE_TESTS_C_API_LAYER_H_ */
