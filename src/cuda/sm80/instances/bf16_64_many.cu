#include "cuda/sm80/instance.cuh"

QUIRE_MMA_INSTANCE(bf16_64_many, DType::kBFloat16, BFloat16, false, 64, false, false)
