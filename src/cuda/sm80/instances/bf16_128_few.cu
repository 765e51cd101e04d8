#include "cuda/sm80/instance.cuh"

QUIRE_DECODE_INSTANCE(bf16_128_few, DType::kBFloat16, BFloat16, false, 128, 16, false)
