#include "cuda/sm80/instance.cuh"

QUIRE_MMA_INSTANCE(bf16_128_many, DType::kBFloat16, BFloat16, false, 128, false, false)
