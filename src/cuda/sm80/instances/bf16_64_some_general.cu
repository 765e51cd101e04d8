#include "cuda/sm80/instance.cuh"

QUIRE_DECODE_INSTANCE(bf16_64_some_general, DType::kBFloat16, BFloat16, false, 64, 32, true)
