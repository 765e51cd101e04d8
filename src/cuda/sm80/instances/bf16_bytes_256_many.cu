#include "cuda/sm80/instance.cuh"

QUIRE_MMA_INSTANCE(bf16_bytes_256_many, DType::kBFloat16, BFloat16, true, 256, false, false)
