/* Views: row-major ones, those of DLPack's tensors, and the names of element types. */
#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "quire/quire_c.h"
#include "tests/c_api/checks.h"
#include "tests/c_api/parts.h"

/* dlpack.h's structures. */
typedef struct DLDevice {
  int32_t device_type;
  int32_t device_id;
} DLDevice;
typedef struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
} DLDataType;
typedef struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;
  uint64_t byte_offset;
} DLTensor;

enum { kDLCPU = 1, kDLCUDA = 2, kDLCUDAHost = 3, kDLROCM = 10, kDLCUDAManaged = 13 };

static float data[64];
static int64_t shape[7] = {2, 3, 4, 1, 1, 1, 1};
static int64_t strides[7] = {20, 5, 1, 1, 1, 1, 1};

static DLTensor make_dl_tensor(void) {
  const DLTensor made = {data, {kDLCPU, 0}, 3, {2, 32, 1}, shape, strides, 0};
  return made;
}

static void test_init(void) {
  quire_tensor view;
  CHECK(quire_tensor_init(&view, data, QUIRE_DTYPE_FLOAT32, 3, shape) == QUIRE_OK);
  CHECK(view.data == data && view.dtype == QUIRE_DTYPE_FLOAT32 && view.ndim == 3);
  CHECK(view.device.type == QUIRE_DEVICE_CPU && view.device.index == 0);
  CHECK(view.strides[0] == 12 && view.strides[1] == 4 && view.strides[2] == 1);
  CHECK(quire_tensor_init(&view, data, QUIRE_DTYPE_FLOAT32, 0, NULL) == QUIRE_OK);

  const int64_t negative[2] = {2, -1};
  const int64_t huge[3] = {(int64_t)1 << 40, (int64_t)1 << 40, 1};
  EXPECT_INVALID(quire_tensor_init(NULL, data, QUIRE_DTYPE_FLOAT32, 3, shape), "tensor");
  EXPECT_INVALID(quire_tensor_init(&view, data, 11, 3, shape), "dtype");
  EXPECT_INVALID(quire_tensor_init(&view, data, QUIRE_DTYPE_FLOAT32, 7, shape), "ndim");
  EXPECT_INVALID(quire_tensor_init(&view, data, QUIRE_DTYPE_FLOAT32, -1, shape), "ndim");
  EXPECT_INVALID(quire_tensor_init(&view, data, QUIRE_DTYPE_FLOAT32, 3, NULL), "shape");
  EXPECT_INVALID(quire_tensor_init(&view, data, QUIRE_DTYPE_FLOAT32, 2, negative), "shape");
  EXPECT_INVALID(quire_tensor_init(&view, data, QUIRE_DTYPE_FLOAT32, 3, huge), "shape");
}

static void test_dlpack(void) {
  quire_tensor view;
  DLTensor tensor = make_dl_tensor();
  tensor.byte_offset = 12;
  memset(&view, 0xFF, sizeof view);
  CHECK(quire_tensor_from_dlpack(&view, &tensor) == QUIRE_OK);
  CHECK(view.data == data + 3 && view.dtype == QUIRE_DTYPE_FLOAT32 && view.ndim == 3);
  CHECK(memcmp(view.shape, shape, 3 * sizeof *shape) == 0);
  CHECK(memcmp(view.strides, strides, 3 * sizeof *strides) == 0);
  CHECK(view.shape[3] == 0 && view.strides[3] == 0);

  tensor = make_dl_tensor();
  tensor.strides = NULL;
  CHECK(quire_tensor_from_dlpack(&view, &tensor) == QUIRE_OK);
  CHECK(view.strides[0] == 12 && view.strides[1] == 4 && view.strides[2] == 1);
  tensor.ndim = 0;
  tensor.shape = NULL;
  CHECK(quire_tensor_from_dlpack(&view, &tensor) == QUIRE_OK && view.ndim == 0);

  tensor = make_dl_tensor();
  tensor.device.device_type = kDLCUDA;
  tensor.device.device_id = 3;
  CHECK(quire_tensor_from_dlpack(&view, &tensor) == QUIRE_OK);
  CHECK(view.device.type == QUIRE_DEVICE_CUDA && view.device.index == 3);
  tensor.device.device_type = kDLCUDAHost;
  CHECK(quire_tensor_from_dlpack(&view, &tensor) == QUIRE_OK);
  CHECK(view.device.type == QUIRE_DEVICE_CPU && view.device.index == 0);
}

static void test_dlpack_types(void) {
  static const DLDataType types[] = {{2, 32, 1}, {2, 16, 1}, {4, 16, 1}, {10, 8, 1}, {12, 8, 1},
                                     {0, 8, 1},  {1, 8, 1},  {0, 32, 1}, {0, 64, 1}, {6, 8, 1}};
  for (int i = 0; i < 10; ++i) {
    quire_tensor view;
    DLTensor tensor = make_dl_tensor();
    tensor.dtype = types[i];
    CHECK(quire_tensor_from_dlpack(&view, &tensor) == QUIRE_OK);
    CHECK(view.dtype == QUIRE_DTYPE_FLOAT32 + i);
  }
}

/* The view stays as it was; what is said of the tensor is in its name. */
static void test_dlpack_errors(void) {
  quire_tensor view;
  DLTensor tensor = make_dl_tensor();
  memset(&view, 0, sizeof view);
  EXPECT_INVALID(quire_tensor_from_dlpack(NULL, &tensor), "view");
  EXPECT_INVALID(quire_tensor_from_dlpack(&view, NULL), "tensor");
  tensor.dtype.bits = 64; /* double */
  EXPECT_INVALID(quire_tensor_from_dlpack(&view, &tensor), "tensor");
  tensor = make_dl_tensor();
  tensor.dtype.lanes = 4;
  EXPECT_INVALID(quire_tensor_from_dlpack(&view, &tensor), "tensor");
  tensor = make_dl_tensor();
  tensor.device.device_type = kDLROCM;
  EXPECT_INVALID(quire_tensor_from_dlpack(&view, &tensor), "tensor");
  tensor.device.device_type = kDLCUDAManaged;
  EXPECT_INVALID(quire_tensor_from_dlpack(&view, &tensor), "tensor");
  CHECK(strstr(quire_last_error(), "managed") != NULL);
  tensor = make_dl_tensor();
  tensor.ndim = 7;
  EXPECT_INVALID(quire_tensor_from_dlpack(&view, &tensor), "tensor");
  tensor.ndim = -1;
  EXPECT_INVALID(quire_tensor_from_dlpack(&view, &tensor), "tensor");
  tensor = make_dl_tensor();
  tensor.shape = NULL;
  EXPECT_INVALID(quire_tensor_from_dlpack(&view, &tensor), "tensor");
  tensor = make_dl_tensor();
  int64_t huge[3] = {(int64_t)1 << 40, (int64_t)1 << 40, 1};
  tensor.shape = huge;
  tensor.strides = NULL;
  EXPECT_INVALID(quire_tensor_from_dlpack(&view, &tensor), "tensor");
  CHECK(view.data == NULL && view.dtype == QUIRE_DTYPE_NONE);
}

static void test_names(void) {
  const char* name = NULL;
  CHECK(quire_dtype_name(QUIRE_DTYPE_BFLOAT16, &name) == QUIRE_OK);
  CHECK(strcmp(name, "bfloat16") == 0);
  CHECK(quire_dtype_name(QUIRE_DTYPE_BOOL, &name) == QUIRE_OK && strcmp(name, "bool") == 0);
  EXPECT_INVALID(quire_dtype_name(QUIRE_DTYPE_BOOL + 1, &name), "dtype");
  EXPECT_INVALID(quire_dtype_name(-1, &name), "dtype");
  EXPECT_INVALID(quire_dtype_name(QUIRE_DTYPE_BOOL, NULL), "name");
}

void test_tensors(void) {
  test_init();
  test_dlpack();
  test_dlpack_types();
  test_dlpack_errors();
  test_names();
}
