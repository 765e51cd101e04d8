#include "cuda/sm80/instance.cuh"

QUIRE_DECODE_INSTANCE(fp16_64_some_general, DType::kFloat16, Half, false, 64, 32, true)
