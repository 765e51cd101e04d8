#include "cuda/sm80/instance.cuh"

QUIRE_PREFILL_INSTANCE(fp16_64_many_general, DType::kFloat16, Half, false, 64, true)
