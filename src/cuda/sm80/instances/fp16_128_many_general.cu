#include "cuda/sm80/instance.cuh"

QUIRE_PREFILL_INSTANCE(fp16_128_many_general, DType::kFloat16, Half, false, 128, true)
