// Whether a device's output is right: a few rows of it against the CPU backend over the same keys.
#pragma once

#include <cstdint>
#include <functional>

#include "bench/bench.h"
#include "bench/paged_batch.h"
#include "bench/workload.h"
#include "quire/quire.h"

namespace quire::bench {

// Copies from memory of the layer's device into host memory.
using ReadBytes = std::function<void(void* to, const void* from, std::int64_t bytes)>;

// The largest difference in the first and the last row of a few sequences, relative to the largest
// value of its row and head; infinity if a value is not finite. `cache` is of CacheLayout, `batch` in host
// memory, the rest in the memory that `read` reads.
double largest_row_error(const Workload& workload, const Options& options, const PagedBatch& batch,
                         const PagedKvCache& cache, const TensorView& query,
                         const TensorView& output, const ReadBytes& read);

}  // namespace quire::bench
