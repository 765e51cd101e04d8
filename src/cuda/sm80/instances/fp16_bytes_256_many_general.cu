#include "cuda/sm80/instance.cuh"

QUIRE_MMA_INSTANCE(fp16_bytes_256_many_general, DType::kFloat16, Half, true, 256, false, true)
