#include "cuda/sm80/instance.cuh"

QUIRE_MMA_INSTANCE(fp16_bytes_64_many, DType::kFloat16, Half, true, 64, false, false)
