#include "cuda/sm80/instance.cuh"

QUIRE_PREFILL_INSTANCE(fp16_576_many, DType::kFloat16, Half, false, 576, false)
