#include "cuda/sm80/instance.cuh"

QUIRE_PREFILL_INSTANCE(bf16_bytes_576_many, DType::kBFloat16, BFloat16, true, 576, false)
