#include "cuda/sm80/instance.cuh"

QUIRE_PREFILL_INSTANCE(fp16_bytes_64_many_general, DType::kFloat16, Half, true, 64, true)
