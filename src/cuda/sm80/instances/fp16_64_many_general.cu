#include "cuda/sm80/instance.cuh"

QUIRE_MMA_INSTANCE(fp16_64_many_general, DType::kFloat16, Half, false, 64, false, true)
