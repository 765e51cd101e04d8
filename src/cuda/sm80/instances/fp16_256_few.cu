#include "cuda/sm80/instance.cuh"

QUIRE_DECODE_INSTANCE(fp16_256_few, DType::kFloat16, Half, false, 256, 16, false)
