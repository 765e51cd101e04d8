#include "cuda/sm80/instance.cuh"

QUIRE_PREFILL_INSTANCE(bf16_64_many, DType::kBFloat16, BFloat16, false, 64, false)
