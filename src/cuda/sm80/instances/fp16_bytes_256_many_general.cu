#include "cuda/sm80/instance.cuh"

QUIRE_PREFILL_INSTANCE(fp16_bytes_256_many_general, DType::kFloat16, Half, true, 256, true)
