/* Backends by number: their names, what they can do, their kernels. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "quire/quire_c.h"
#include "tests/c_api/checks.h"
#include "tests/c_api/layer.h"
#include "tests/c_api/parts.h"

static void test_properties(void) {
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

static void test_find(void) {
  int32_t count = 0;
  CHECK(quire_backend_count(&count) == QUIRE_OK);
  for (int32_t i = 0; i < count; ++i) {
    const char* name = NULL;
    int32_t found = -1;
    int32_t device_type = -1;
    CHECK(quire_backend_name(i, &name) == QUIRE_OK);
    CHECK(quire_backend_find(name, &found) == QUIRE_OK && found == i);
    CHECK(quire_backend_device_type(i, &device_type) == QUIRE_OK);
    CHECK(device_type == (strcmp(name, "cuda") == 0 ? QUIRE_DEVICE_CUDA : QUIRE_DEVICE_CPU));
  }
  EXPECT_INVALID(quire_backend_find("abacus", &count), "name");
  EXPECT_INVALID(quire_backend_find(NULL, &count), "name");
  EXPECT_INVALID(quire_backend_find("cpu", NULL), "backend");
  EXPECT_INVALID(quire_backend_device_type(count, &count), "backend");
  EXPECT_INVALID(quire_backend_device_type(0, NULL), "device_type");
}

static int has(uint64_t set, int32_t number) { return (int)(set >> number & 1); }

static void test_capabilities(void) {
  struct {
    quire_capabilities known;
    int64_t added;
  } later; /* of a caller with a later header */
  quire_capabilities capabilities;
  int32_t cpu = -1;
  CHECK(quire_backend_find("cpu", &cpu) == QUIRE_OK);
  memset(&capabilities, 0xFF, sizeof capabilities);
  CHECK(quire_backend_capabilities(cpu, &capabilities, sizeof capabilities) == QUIRE_OK);
  CHECK(capabilities.struct_size == sizeof capabilities);
  CHECK(has(capabilities.dtypes, QUIRE_DTYPE_BFLOAT16));
  CHECK(!has(capabilities.dtypes, QUIRE_DTYPE_INT8));
  CHECK(!has(capabilities.dtypes, QUIRE_DTYPE_NONE));
  CHECK(has(capabilities.kv_cache_dtypes, QUIRE_KV_CACHE_FP8_E4M3_PER_TOKEN_HEAD));
  CHECK(has(capabilities.kv_cache_dtypes, QUIRE_KV_CACHE_INT4_PER_TOKEN_HEAD));
  CHECK(has(capabilities.output_dtypes, QUIRE_DTYPE_FLOAT8_E4M3));
  CHECK(capabilities.min_head_size == 8 && capabilities.max_head_size == 576);
  CHECK(capabilities.head_size_multiple >= 1 && capabilities.block_size_multiple >= 1);
  CHECK(capabilities.max_block_size == 1 << 20);
  CHECK(capabilities.sinks == 1 && capabilities.batch_invariant == 1);
  CHECK(capabilities.graph_capture == 0);

  memset(&later, 0xFF, sizeof later);
  CHECK(quire_backend_capabilities(cpu, &later.known, sizeof later) == QUIRE_OK);
  CHECK(later.known.struct_size == sizeof later && later.added == 0);
  EXPECT_INVALID(quire_backend_capabilities(cpu, &capabilities, 8), "struct_size");
  EXPECT_INVALID(quire_backend_capabilities(cpu, NULL, sizeof capabilities), "capabilities");
  EXPECT_INVALID(quire_backend_capabilities(-1, &capabilities, sizeof capabilities), "backend");
}

static void test_kernels(void) {
  int32_t num_backends = 0;
  int32_t num_kernels = -1;
  const char* name = NULL;
  const char* serves = NULL;
  CHECK(quire_backend_count(&num_backends) == QUIRE_OK);
  for (int32_t i = 0; i < num_backends; ++i) {
    CHECK(quire_backend_kernel_count(i, &num_kernels) == QUIRE_OK && num_kernels >= 0);
    for (int32_t k = 0; k < num_kernels; ++k) {
      CHECK(quire_backend_kernel(i, k, &name, &serves) == QUIRE_OK);
      CHECK(strlen(name) > 0 && strlen(serves) > 0);
      CHECK(quire_backend_kernel(i, k, &name, NULL) == QUIRE_OK);
    }
    EXPECT_INVALID(quire_backend_kernel(i, num_kernels, &name, &serves), "kernel");
    EXPECT_INVALID(quire_backend_kernel(i, -1, &name, &serves), "kernel");
  }
  EXPECT_INVALID(quire_backend_kernel_count(0, NULL), "count");
  EXPECT_INVALID(quire_backend_kernel_count(num_backends, &num_kernels), "backend");
}

static void test_shapes(void) {
  int64_t shape[QUIRE_MAX_DIMS] = {0};
  int32_t ndim = 0;
  CHECK(quire_backend_kv_cache_shape(0, 10, 16, 8, 128, NULL, shape, &ndim) == QUIRE_OK);
  CHECK(ndim == 5 && shape[0] == 10 && shape[1] == 2 && shape[2] == 16);
  CHECK(shape[3] == 8 && shape[4] == 128);
  CHECK(quire_backend_kv_cache_shape(0, 10, 16, 8, 128, "fp8_per_token_head", shape, &ndim) ==
        QUIRE_OK);
  CHECK(ndim == 5 && shape[4] == 132);
  CHECK(quire_backend_kv_cache_shape(0, 10, 16, 8, 128, "int4_per_token_head", shape, &ndim) ==
        QUIRE_OK);
  CHECK(ndim == 5 && shape[4] == 68);
  EXPECT_INVALID(quire_backend_kv_cache_shape(0, 0, 16, 8, 128, NULL, shape, &ndim), "num_blocks");
  EXPECT_INVALID(quire_backend_kv_cache_shape(0, 10, 16, 8, 128, "fp4", shape, &ndim),
                 "cache_dtype_str");
  EXPECT_INVALID(quire_backend_kv_cache_shape(0, 10, 16, 8, 128, NULL, NULL, &ndim), "shape");
  EXPECT_INVALID(quire_backend_kv_cache_shape(0, 10, 16, 8, 128, NULL, shape, NULL), "ndim");
  EXPECT_INVALID(quire_backend_kv_cache_shape(-1, 10, 16, 8, 128, NULL, shape, &ndim), "backend");
  CHECK(quire_backend_validate_head_size(0, 80) == QUIRE_OK);
  EXPECT_INVALID(quire_backend_validate_head_size(0, 7), "head_size");
  CHECK(strstr(quire_last_error(), "8 to 576") != NULL);
  EXPECT_INVALID(quire_backend_validate_head_size(99, 80), "backend");
}

void test_backends(void) {
  test_properties();
  test_find();
  test_capabilities();
  test_kernels();
  test_shapes();
}
