#include "cuda/sm80/instance.cuh"

QUIRE_DECODE_INSTANCE(bf16_bytes_128_some, DType::kBFloat16, BFloat16, true, 128, 32, false)
