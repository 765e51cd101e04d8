/* Caches over one tensor in vLLM's layouts, and the names of cache dtypes. */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "quire/quire_c.h"
#include "tests/c_api/checks.h"
#include "tests/c_api/layer.h"
#include "tests/c_api/parts.h"

enum { kRow = kNumKvHeads * kHeadSize };

static float combined[kNumBlocks][2][kBlockSize][kRow];
static float packed[kNumBlocks][kNumKvHeads][kBlockSize][2 * kHeadSize];

static quire_tensor combined_tensor(void) {
  const int64_t shape[5] = {kNumBlocks, 2, kBlockSize, kNumKvHeads, kHeadSize};
  quire_tensor view;
  CHECK(quire_tensor_init(&view, combined, QUIRE_DTYPE_FLOAT32, 5, shape) == QUIRE_OK);
  return view;
}

static quire_tensor packed_tensor(void) {
  return tensor(packed, QUIRE_DTYPE_FLOAT32, 4, kNumBlocks, kNumKvHeads, kBlockSize, 2 * kHeadSize);
}

/* Writes one token to block 5, offset 2. */
static void write_token(const quire_kv_cache* cache) {
  static float key[1][kNumKvHeads][kHeadSize];
  static float value[1][kNumKvHeads][kHeadSize];
  const int64_t slot = 5 * kBlockSize + 2;
  fill(&key[0][0][0], kRow, 1);
  fill(&value[0][0][0], kRow, 2);
  const quire_tensor k = tensor(key, QUIRE_DTYPE_FLOAT32, 3, 1, kNumKvHeads, kHeadSize, 0);
  const quire_tensor v = tensor(value, QUIRE_DTYPE_FLOAT32, 3, 1, kNumKvHeads, kHeadSize, 0);
  const quire_tensor slots = tensor(&slot, QUIRE_DTYPE_INT64, 1, 1, 0, 0, 0);
  CHECK(quire_write_kv_cache(&k, &v, cache, &slots, NULL) == QUIRE_OK);
}

static void test_layouts(void) {
  float expected[2][kNumKvHeads][kHeadSize];
  quire_kv_cache cache;
  fill(&expected[0][0][0], kRow, 1);
  fill(&expected[1][0][0], kRow, 2);

  const quire_tensor whole = combined_tensor();
  memset(&cache, 0xFF, sizeof cache);
  CHECK(quire_kv_cache_from_combined(&cache, sizeof cache, &whole, QUIRE_KV_CACHE_AUTO,
                                     QUIRE_SCALES_SEPARATE) == QUIRE_OK);
  CHECK(cache.struct_size == sizeof cache && cache.dtype == QUIRE_KV_CACHE_AUTO);
  CHECK(cache.k_scale.value == 1.0f && cache.k_scale.data == NULL);
  CHECK(cache.k_scale_cache.dtype == QUIRE_DTYPE_NONE);
  write_token(&cache);
  CHECK(memcmp(combined[5][0][2], expected[0], sizeof expected[0]) == 0);
  CHECK(memcmp(combined[5][1][2], expected[1], sizeof expected[1]) == 0);

  const quire_tensor rows = packed_tensor();
  CHECK(quire_kv_cache_from_packed(&cache, sizeof cache, &rows, kHeadSize, QUIRE_KV_CACHE_AUTO,
                                   QUIRE_SCALES_SEPARATE) == QUIRE_OK);
  write_token(&cache);
  for (int head = 0; head < kNumKvHeads; ++head) {
    const float* row = packed[5][head][2];
    CHECK(memcmp(row, expected[0][head], sizeof expected[0][head]) == 0);
    CHECK(memcmp(row + kHeadSize, expected[1][head], sizeof expected[1][head]) == 0);
  }
}

/* Bytes stand for an fp8 cache; its dtype comes with it. */
static void test_bytes(void) {
  const int64_t shape[5] = {kNumBlocks, 2, kBlockSize, kNumKvHeads, kHeadSize};
  quire_kv_cache cache;
  quire_tensor bytes;
  CHECK(quire_tensor_init(&bytes, combined, QUIRE_DTYPE_UINT8, 5, shape) == QUIRE_OK);
  CHECK(quire_kv_cache_from_combined(&cache, sizeof cache, &bytes, QUIRE_KV_CACHE_FP8_E4M3,
                                     QUIRE_SCALES_SEPARATE) == QUIRE_OK);
  CHECK(cache.dtype == QUIRE_KV_CACHE_FP8_E4M3);
  CHECK(cache.value.dtype == QUIRE_DTYPE_FLOAT8_E4M3);
  CHECK((char*)cache.value.data - (char*)cache.key.data == kBlockSize * kRow);
}

/* Scales behind the rows: an int8 cache of the shape that the backend names. */
static void test_inline_scales(void) {
  static _Alignas(float) int8_t bytes[kNumBlocks][2][kBlockSize][kNumKvHeads][kHeadSize + 4];
  int64_t shape[QUIRE_MAX_DIMS];
  int32_t ndim = 0;
  CHECK(quire_backend_kv_cache_shape(0, kNumBlocks, kBlockSize, kNumKvHeads, kHeadSize,
                                     "int8_per_token_head", shape, &ndim) == QUIRE_OK);
  CHECK(ndim == 5 && shape[1] == 2 && shape[4] == kHeadSize + 4);
  quire_tensor whole;
  quire_kv_cache cache;
  CHECK(quire_tensor_init(&whole, bytes, QUIRE_DTYPE_INT8, ndim, shape) == QUIRE_OK);
  CHECK(quire_kv_cache_from_combined(&cache, sizeof cache, &whole,
                                     QUIRE_KV_CACHE_INT8_PER_TOKEN_HEAD,
                                     QUIRE_SCALES_INLINE) == QUIRE_OK);
  CHECK(cache.key.shape[3] == kHeadSize && cache.k_scale_cache.dtype == QUIRE_DTYPE_FLOAT32);
  write_token(&cache);

  /* The scale behind a row makes 127 of the row's largest value. */
  float value[kNumKvHeads][kHeadSize];
  fill(&value[0][0], kRow, 2);
  for (int head = 0; head < kNumKvHeads; ++head) {
    float absmax = 0.0f;
    float scale;
    memcpy(&scale, &bytes[5][1][2][head][kHeadSize], sizeof scale);
    for (int d = 0; d < kHeadSize; ++d) absmax = fmaxf(absmax, fabsf(value[head][d]));
    CHECK(fabsf(scale * 127.0f - absmax) < 1e-5f);
  }
  EXPECT_INVALID(quire_kv_cache_from_combined(&cache, sizeof cache, &whole,
                                              QUIRE_KV_CACHE_INT8_PER_TOKEN_HEAD, 2),
                 "scales");
  EXPECT_INVALID(quire_kv_cache_from_combined(&cache, sizeof cache, &whole, QUIRE_KV_CACHE_FP8_E4M3,
                                              QUIRE_SCALES_INLINE),
                 "kv_cache");
}

static void test_layout_errors(void) {
  quire_kv_cache cache;
  const quire_tensor whole = combined_tensor();
  const quire_tensor rows = packed_tensor();
  EXPECT_INVALID(quire_kv_cache_from_combined(&cache, sizeof cache, NULL, 0, 0), "kv_cache");
  EXPECT_INVALID(quire_kv_cache_from_combined(&cache, sizeof cache, &rows, 0, 0), "kv_cache");
  EXPECT_INVALID(quire_kv_cache_from_combined(&cache, sizeof cache, &whole, 9, 0), "dtype");
  EXPECT_INVALID(quire_kv_cache_from_combined(&cache, sizeof cache, &whole, -1, 0), "dtype");
  EXPECT_INVALID(
      quire_kv_cache_from_combined(&cache, sizeof cache, &whole, QUIRE_KV_CACHE_FP8_E4M3, 0),
      "kv_cache");
  EXPECT_INVALID(quire_kv_cache_from_combined(&cache, 8, &whole, 0, 0), "struct_size");
  EXPECT_INVALID(quire_kv_cache_from_combined(NULL, sizeof cache, &whole, 0, 0), "cache");
  EXPECT_INVALID(quire_kv_cache_from_packed(&cache, sizeof cache, &whole, kHeadSize, 0, 0),
                 "kv_cache");
  EXPECT_INVALID(quire_kv_cache_from_packed(&cache, sizeof cache, &rows, 0, 0, 0), "head_size");
  EXPECT_INVALID(quire_kv_cache_from_packed(&cache, sizeof cache, &rows, 2 * kHeadSize, 0, 0),
                 "head_size");
}

static void test_dtype_names(void) {
  const char* name = NULL;
  int32_t dtype = -1;
  for (int32_t i = QUIRE_KV_CACHE_AUTO; i <= QUIRE_KV_CACHE_INT4_PER_TOKEN_HEAD; ++i) {
    CHECK(quire_kv_cache_dtype_name(i, &name) == QUIRE_OK);
    CHECK(quire_kv_cache_dtype_from_name(name, &dtype) == QUIRE_OK && dtype == i);
  }
  CHECK(quire_kv_cache_dtype_from_name("fp8", &dtype) == QUIRE_OK);
  CHECK(dtype == QUIRE_KV_CACHE_FP8_E4M3);
  CHECK(quire_kv_cache_dtype_name(QUIRE_KV_CACHE_INT8_PER_TOKEN_HEAD, &name) == QUIRE_OK);
  CHECK(strcmp(name, "int8_per_token_head") == 0);
  EXPECT_INVALID(quire_kv_cache_dtype_from_name("fp4", &dtype), "kv_cache_dtype");
  EXPECT_INVALID(quire_kv_cache_dtype_from_name(NULL, &dtype), "kv_cache_dtype");
  EXPECT_INVALID(quire_kv_cache_dtype_from_name("fp8", NULL), "dtype");
  EXPECT_INVALID(quire_kv_cache_dtype_name(9, &name), "kv_cache_dtype");
  EXPECT_INVALID(quire_kv_cache_dtype_name(0, NULL), "name");

  quire_dtype stored = QUIRE_DTYPE_NONE;
  CHECK(quire_kv_cache_storage_dtype(QUIRE_KV_CACHE_AUTO, QUIRE_DTYPE_FLOAT16, &stored) ==
        QUIRE_OK);
  CHECK(stored == QUIRE_DTYPE_FLOAT16);
  CHECK(quire_kv_cache_storage_dtype(QUIRE_KV_CACHE_INT8_PER_TOKEN_HEAD, QUIRE_DTYPE_FLOAT16,
                                     &stored) == QUIRE_OK);
  CHECK(stored == QUIRE_DTYPE_INT8);
  CHECK(quire_kv_cache_storage_dtype(QUIRE_KV_CACHE_INT4_PER_TOKEN_HEAD, QUIRE_DTYPE_FLOAT16,
                                     &stored) == QUIRE_OK);
  CHECK(stored == QUIRE_DTYPE_UINT8);
  EXPECT_INVALID(quire_kv_cache_storage_dtype(-1, QUIRE_DTYPE_FLOAT16, &stored), "kv_cache_dtype");
  EXPECT_INVALID(quire_kv_cache_storage_dtype(0, 99, &stored), "model_dtype");
  EXPECT_INVALID(quire_kv_cache_storage_dtype(0, 1, NULL), "storage_dtype");
}

void test_kv_caches(void) {
  test_layouts();
  test_bytes();
  test_inline_scales();
  test_layout_errors();
  test_dtype_names();
}
