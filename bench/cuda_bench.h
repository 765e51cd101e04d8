// The benchmark on a CUDA device. Linked by builds with QUIRE_CUDA.
#pragma once

#include <cstdint>
#include <memory>

#include "bench/bench.h"
#include "bench/limits.h"

namespace quire::bench {

// Free device memory and the size of the L2 cache of device 0.
struct CudaMachine {
  std::int64_t free_bytes = 0;
  std::int64_t l2_bytes = 0;
};
CudaMachine inspect_cuda_machine();

// Reads: a kernel that sums a buffer of 1 GiB. Flops: cuBLAS, bf16, 8192^3 (the library is looked
// up at run time; without it the compute limit is 0 and every workload counts as memory-bound).
std::unique_ptr<LimitMeter> make_cuda_limit_meter();

// Times by CUDA graph replay over `num_caches` caches in turn, each with new tokens of its own: cache
// writes and attention for themselves, and layers of both in a chain where the options ask for it.
// Also the host's time of an eager cache write with attention.
Result measure_cuda(const Workload& workload, const Options& options, std::int64_t num_caches);

}  // namespace quire::bench
