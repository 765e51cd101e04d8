#include "cuda/sm80/instance.cuh"

QUIRE_DECODE_INSTANCE(fp16_bytes_64_few, DType::kFloat16, Half, true, 64, 16, false)
