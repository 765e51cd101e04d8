#include "cuda/sm80/instance.cuh"

QUIRE_MMA_INSTANCE(fp16_bytes_64_few, DType::kFloat16, Half, true, 64, true, false)
