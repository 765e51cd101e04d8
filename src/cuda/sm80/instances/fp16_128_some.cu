#include "cuda/sm80/instance.cuh"

QUIRE_DECODE_INSTANCE(fp16_128_some, DType::kFloat16, Half, false, 128, 32, false)
