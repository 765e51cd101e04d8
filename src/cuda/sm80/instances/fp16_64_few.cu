#include "cuda/sm80/instance.cuh"

QUIRE_DECODE_INSTANCE(fp16_64_few, DType::kFloat16, Half, false, 64, 16, false)
