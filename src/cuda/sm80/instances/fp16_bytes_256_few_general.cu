#include "cuda/sm80/instance.cuh"

QUIRE_DECODE_INSTANCE(fp16_bytes_256_few_general, DType::kFloat16, Half, true, 256, 16, true)
