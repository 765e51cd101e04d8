#include "cuda/cascade_tensors.h"

#include <bit>

#include "cuda/check.h"
#include "cuda/workspace.h"
#include "plan/cascade_tensors.h"

namespace quire::cuda {
namespace {

constexpr int kThreads = 256;

__global__ void __launch_bounds__(kThreads)
    cascade_tensors(const __grid_constant__ BatchParams batch, std::int64_t count,
                    std::int32_t* out) {
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i < count) out[i] = planning::cascade_entry(batch, i);
}

}  // namespace

CascadeTensors::CascadeTensors() = default;
CascadeTensors::~CascadeTensors() = default;

const std::int32_t* CascadeTensors::write(const BatchParams& batch, cudaStream_t stream) {
  const std::int64_t count = planning::num_cascade_entries(batch);
  const auto bytes = static_cast<std::size_t>(count) * sizeof(std::int32_t);
  if (buffers_.empty() || buffers_.back()->size() < bytes) {
    auto buffer = std::make_unique<DeviceBuffer>();
    buffer->allocate(std::bit_ceil(bytes), stream);
    buffers_.push_back(std::move(buffer));
  }
  auto* const out = reinterpret_cast<std::int32_t*>(buffers_.back()->data());
  const auto grid = static_cast<unsigned>((count + kThreads - 1) / kThreads);
  cascade_tensors<<<grid, kThreads, 0, stream>>>(batch, count, out);
  check_launch("cascade_tensors", dim3(grid), kThreads, 0);
  return out;
}

std::int64_t CascadeTensors::bytes() const {
  std::size_t bytes = 0;
  for (const auto& buffer : buffers_) bytes += buffer->size();
  return static_cast<std::int64_t>(bytes);
}

}  // namespace quire::cuda
