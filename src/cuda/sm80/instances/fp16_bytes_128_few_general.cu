#include "cuda/sm80/instance.cuh"

QUIRE_DECODE_INSTANCE(fp16_bytes_128_few_general, DType::kFloat16, Half, true, 128, 16, true)
