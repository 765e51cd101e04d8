#include "cuda/sm80/instance.cuh"

QUIRE_DECODE_INSTANCE(bf16_256_few, DType::kBFloat16, BFloat16, false, 256, 16, false)
