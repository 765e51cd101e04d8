// A row of the kernel table for each instance. CMake writes a translation unit for each line of
// instances.def, which includes the instance.cuh of its kind's folder and names the instance with the
// macro below.
#pragma once

#include <type_traits>

#include "cuda/ptx/mma.cuh"
#include "cuda/sm90/kernels.h"

namespace quire::cuda::sm90 {

// The words of instances.def.
enum class Phase { decode, prefill, window, mixed };
enum class Compute { fp16, bf16 };

template <Phase, class Type, bool kKv8, int kHeadSize, int kRows, bool kScoreMod>
struct Kernel;

// A row of the table. The name is part of the type, so that prepare and launch are plain functions.
template <Phase kPhase, Compute kCompute, bool kKv8, int kHeadSize, int kRows, bool kScoreMod,
          const char* kName>
AttentionKernel make_row() {
  constexpr bool kHalf = kCompute == Compute::fp16;
  using Type = std::conditional_t<kHalf, ptx::Half, ptx::BFloat16>;
  using Row = Kernel<kPhase, Type, kKv8, kHeadSize, kRows, kScoreMod>;
  AttentionKernel row;
  row.key.min_capability = row.key.max_capability = 90;
  row.key.compute = kHalf ? DType::kFloat16 : DType::kBFloat16;
  row.key.kv8 = kKv8;
  row.key.max_head_size = kHeadSize;
  row.key.exact_head_size = true;
  row.key.plain = !kScoreMod;
  row.key.score_mod = kScoreMod;
  row.name = kName;
  Row::describe(&row);
  row.prepare = [](const LayerParams& layer, const DeviceInfo& device, Launch* launch) {
    return Row::takes(layer) && sm90::prepare(Row::instance(kName), layer, device, launch);
  };
  if constexpr (kPhase == Phase::mixed) {
    row.launch_beside = [](const Launch& launch, int grid, const KernelParams& few,
                           const KernelParams& many, cudaStream_t stream) {
      sm90::launch_beside(Row::instance(kName), launch, grid, few, many, stream);
    };
  } else {
    row.launch = [](const Launch& launch, int grid, const KernelParams& params,
                    cudaStream_t stream) {
      sm90::launch(Row::instance(kName), launch, grid, params, stream);
    };
  }
  // Queries and outputs go in whole pieces, outputs in the type of queries, without block scales.
  row.takes = [](const KernelParams& params) {
    return params.query_aligned && params.output_aligned && params.block_output == nullptr &&
           params.output_dtype == params.layer.dtype && Row::takes(params) && maps_fit(params);
  };
  return row;
}

}  // namespace quire::cuda::sm90

#define QUIRE_KERNEL(function, phase, compute, kv8, head_size, rows, score_mod)      \
  namespace quire::cuda::sm90 {                                                      \
  static constexpr char k_##function[] = "sm90::" #function;                         \
  AttentionKernel function() {                                                       \
    return make_row<Phase::phase, Compute::compute, kv8, head_size, rows, score_mod, \
                    k_##function>();                                                 \
  }                                                                                  \
  }
