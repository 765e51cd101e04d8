// What an instance's translation unit consists of.
#pragma once

#include "cuda/sm80/attention_decode.cuh"
#include "cuda/sm80/attention_prefill.cuh"
#include "cuda/sm80/table.h"

namespace quire::cuda::sm80 {

template <class C>
MmaKernel describe_decode(DType compute, const char* name) {
  MmaKernel kernel;
  kernel.key = {compute, C::kBytes, C::kHead, C::kRows == 16 ? Requests::kFew : Requests::kSome,
                C::kGeneral};
  kernel.name = name;
  kernel.function = reinterpret_cast<const void*>(&attention_decode<C>);
  kernel.rows = C::kRows;
  kernel.columns = C::kHead;
  kernel.max_stages = C::kMaxStages;
  kernel.shared_bytes = [](int stages) { return decode_shared_bytes<C>(stages); };
  return kernel;
}

template <class C>
MmaKernel describe_prefill(DType compute, const char* name) {
  MmaKernel kernel;
  kernel.key = {compute, C::kBytes, C::kHeadK, Requests::kMany, C::kGeneral};
  kernel.name = name;
  kernel.function = reinterpret_cast<const void*>(&attention_prefill<C>);
  kernel.threads = C::kThreads;
  kernel.rows = C::kRows;
  kernel.columns = C::kHeadV;
  kernel.max_stages = C::kMaxStages;
  kernel.shared_bytes = [](int stages) { return prefill_shared_bytes<C>(stages); };
  return kernel;
}

}  // namespace quire::cuda::sm80

// Each defines the function that table.cc lists, and with it the kernel.
#define QUIRE_DECODE_INSTANCE(function, dtype, type, bytes, head, rows, general)  \
  namespace quire::cuda::sm80 {                                                   \
  MmaKernel function() {                                                          \
    return describe_decode<DecodeConfig<tile::type, bytes, head, rows, general>>( \
        dtype, "sm80::attention_decode<" #function ">");                          \
  }                                                                               \
  }
#define QUIRE_PREFILL_INSTANCE(function, dtype, type, bytes, head, general)   \
  namespace quire::cuda::sm80 {                                               \
  MmaKernel function() {                                                      \
    return describe_prefill<PrefillConfig<tile::type, bytes, head, general>>( \
        dtype, "sm80::attention_prefill<" #function ">");                     \
  }                                                                           \
  }
