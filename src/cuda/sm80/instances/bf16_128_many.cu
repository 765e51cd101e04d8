#include "cuda/sm80/instance.cuh"

QUIRE_PREFILL_INSTANCE(bf16_128_many, DType::kBFloat16, BFloat16, false, 128, false)
