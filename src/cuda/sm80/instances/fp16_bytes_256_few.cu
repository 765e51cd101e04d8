#include "cuda/sm80/instance.cuh"

QUIRE_DECODE_INSTANCE(fp16_bytes_256_few, DType::kFloat16, Half, true, 256, 16, false)
