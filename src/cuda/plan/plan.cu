// The plan kernels, once a step, everything read on the device. One CTA makes the plan; before it,
// if sequences may share prefixes, a warp a sequence compares block tables.
//
// Nothing leaves the device, and launch shapes depend on padded sizes only, so a captured graph
// serves every batch up to its size.
#include "cuda/check.h"
#include "cuda/kernels.h"
#include "cuda/plan/steps.h"

namespace quire::cuda {
namespace {

constexpr int kThreads = 1024;
constexpr int kPartnerThreads = 128;

// The CTA that makes the plan.
class Cta {
 public:
  __device__ explicit Cta(std::int64_t* warp_sums) : warp_sums_(warp_sums) {}
  __device__ std::int32_t thread() const { return static_cast<std::int32_t>(threadIdx.x); }
  __device__ std::int32_t size() const { return kThreads; }
  __device__ void sync() const { __syncthreads(); }
  __device__ void add(std::int32_t* at, std::int32_t value) const { atomicAdd(at, value); }
  __device__ std::int32_t take(std::int32_t* at) const { return atomicAdd(at, 1); }
  __device__ void lower(std::int32_t* at, std::int32_t value) const { atomicMin(at, value); }
  __device__ void raise(std::int32_t* at, std::int32_t value) const { atomicMax(at, value); }

  // Exclusive sum over the threads; `*total` is the sum of all.
  __device__ std::int64_t scan(std::int64_t value, std::int64_t* total) const {
    const int lane = threadIdx.x % 32;
    const int warp = threadIdx.x / 32;
    std::int64_t sum = value;
    for (int d = 1; d < 32; d *= 2) {
      const std::int64_t other = __shfl_up_sync(~0U, sum, d);
      if (lane >= d) sum += other;
    }
    if (lane == 31) warp_sums_[warp] = sum;
    __syncthreads();
    if (warp == 0) {
      std::int64_t warp_sum = warp_sums_[lane];
      for (int d = 1; d < 32; d *= 2) {
        const std::int64_t other = __shfl_up_sync(~0U, warp_sum, d);
        if (lane >= d) warp_sum += other;
      }
      warp_sums_[lane] = warp_sum;
    }
    __syncthreads();
    const std::int64_t before = warp == 0 ? 0 : warp_sums_[warp - 1];
    *total = warp_sums_[31];
    __syncthreads();
    return before + sum - value;
  }

 private:
  std::int64_t* warp_sums_;  // [32], shared
};

struct Warp {
  __device__ std::int32_t lane() const { return static_cast<std::int32_t>(threadIdx.x % 32); }
  __device__ std::int32_t size() const { return 32; }
  __device__ std::int32_t least(std::int32_t value) const { return __reduce_min_sync(~0U, value); }
};

__global__ void __launch_bounds__(kPartnerThreads)
    find_partners(const __grid_constant__ PlanArgs args) {
  const auto s = static_cast<std::int32_t>((blockIdx.x * kPartnerThreads + threadIdx.x) / 32);
  if (s < args.batch.num_seqs) cascade::find_partner(Warp(), args, s);
}

__global__ void __launch_bounds__(kThreads) plan(const __grid_constant__ PlanArgs args) {
  __shared__ std::int64_t warp_sums[32];
  make_plan(Cta(warp_sums), args);
}

}  // namespace

void launch_plan(const PlanArgs& args, cudaStream_t stream) {
  if (args.prefixes.rule.min_blocks > 0) {
    constexpr int kWarps = kPartnerThreads / 32;
    const dim3 grid(static_cast<unsigned>((args.batch.num_seqs + kWarps - 1) / kWarps));
    find_partners<<<grid, kPartnerThreads, 0, stream>>>(args);
    check_launch("find_partners", grid, kPartnerThreads, 0);
  }
  plan<<<1, kThreads, 0, stream>>>(args);
  check_launch("plan", dim3(1), kThreads, 0);
}

}  // namespace quire::cuda
