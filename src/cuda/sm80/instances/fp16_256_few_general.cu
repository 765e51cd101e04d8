#include "cuda/sm80/instance.cuh"

QUIRE_DECODE_INSTANCE(fp16_256_few_general, DType::kFloat16, Half, false, 256, 16, true)
