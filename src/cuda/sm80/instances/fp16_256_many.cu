#include "cuda/sm80/instance.cuh"

QUIRE_PREFILL_INSTANCE(fp16_256_many, DType::kFloat16, Half, false, 256, false)
