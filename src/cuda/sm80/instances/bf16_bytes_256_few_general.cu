#include "cuda/sm80/instance.cuh"

QUIRE_DECODE_INSTANCE(bf16_bytes_256_few_general, DType::kBFloat16, BFloat16, true, 256, 16, true)
