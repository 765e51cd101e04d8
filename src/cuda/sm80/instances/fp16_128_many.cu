#include "cuda/sm80/instance.cuh"

QUIRE_PREFILL_INSTANCE(fp16_128_many, DType::kFloat16, Half, false, 128, false)
