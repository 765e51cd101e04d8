#include "cuda/sm80/instance.cuh"

QUIRE_DECODE_INSTANCE(bf16_bytes_64_few_general, DType::kBFloat16, BFloat16, true, 64, 16, true)
