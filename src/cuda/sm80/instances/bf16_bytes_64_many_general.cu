#include "cuda/sm80/instance.cuh"

QUIRE_PREFILL_INSTANCE(bf16_bytes_64_many_general, DType::kBFloat16, BFloat16, true, 64, true)
