#include "cuda/sm80/instance.cuh"

QUIRE_DECODE_INSTANCE(fp16_128_few, DType::kFloat16, Half, false, 128, 16, false)
