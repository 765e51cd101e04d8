#include "cuda/sm80/instance.cuh"

QUIRE_DECODE_INSTANCE(bf16_64_few, DType::kBFloat16, BFloat16, false, 64, 16, false)
