#include "cuda/sm80/instance.cuh"

QUIRE_MMA_INSTANCE(bf16_bytes_128_few, DType::kBFloat16, BFloat16, true, 128, true, false)
