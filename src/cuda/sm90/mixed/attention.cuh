// Prefill and decode of a batch in one launch.
//
//   CTA --+-- prefills: ../prefill/attention.cuh --> then decodes, as all others do
//         +-- decodes: two teams, each a CTA of ../decode/attention.cuh
//
// Prefill is limited by the tensor cores and decode by memory: side by side they take about as long
// as the longer of them, one after the other as long as both. So each multiprocessor has a CTA, and
// each CTA a role. How many prefill first the plan says, from the costs of both (ctas_beside); they
// lie spread over the grid, since neighbours share a part of the GPU that draws only so much from
// memory: with the first 36 of 132 CTAs, decode had 2.4 TB/s, with each fourth 2.9 (a probe on an H100).
//
// Work. Prefill's is that of as many CTAs as have the role. Decode's is taken by all teams of the
// grid, one item or work range at a time (SplitsOfAll), so that CTAs that have done their prefill
// help to the end. There is no way back: the plan has prefill end first.
//
// Registers. All threads have 128 in a CTA that decodes; prefill moves them (160 and 32) and moves
// them back. Shared memory: the prefill kernel's, or two times the decode kernel's, over each other.
// Barriers: named ones are apart; those in shared memory are made anew for the second role.
//
// Why two teams: the decode kernel has two CTAs a multiprocessor, and 40 multiprocessors draw all
// that an H100's memory gives beside prefill, 2.5 TB/s. Why the prefill kernel's 192 rows: with 128
// it loads 32 bytes a clock from L2, and lost a quarter of its speed beside CTAs that decode; so it
// loses a twentieth (probes).
#pragma once

#include "cuda/sm90/decode/attention.cuh"
#include "cuda/sm90/mixed/config.cuh"
#include "cuda/sm90/prefill/attention.cuh"

namespace quire::cuda::sm90 {

// The role of this CTA.
struct MixedRole {
  bool prefills;
  std::int32_t index;  // among those that prefill
};

__device__ __forceinline__ MixedRole mixed_role(std::int32_t num_prefill) {
  const auto grid = static_cast<std::int32_t>(gridDim.x);
  const auto block = static_cast<std::int32_t>(blockIdx.x);
  const std::int32_t others = max(grid - num_prefill, 0);  // spread evenly among all
  const std::int32_t before = block * others / grid;
  const bool prefills = block * others - before * grid >= others;
  return {prefills, others == 0 ? block : block - before - 1};
}

template <class C>
__device__ __forceinline__ void decode_in_teams(const KernelParams& p, const KvMaps& maps,
                                                char* memory) {
  using D = typename C::Decode;
  const int warpgroup = ptx::warpgroup_index();
  const int team = warpgroup % kDecodeTeams;
  auto& shared = *reinterpret_cast<DecodeShared<D>*>(memory + team * kDecodeSharedBytes<D>);
  if (threadIdx.x % kWarpgroupThreads == 0 && warpgroup < kDecodeTeams) init_barriers(p, shared);
  __syncthreads();
  if (warpgroup < kDecodeTeams) {
    DecodeAttention<D>(p, shared, 31 - __clz(maps.box_keys)).run();
  } else {
    DecodeLoader<D>(p, maps, shared).run(static_cast<int>(threadIdx.x / 32) % kWarpgroupWarps);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    attention_mixed(const __grid_constant__ KernelParams few,
                    const __grid_constant__ KvMaps few_maps,
                    const __grid_constant__ KernelParams many,
                    const __grid_constant__ KvMaps many_maps) {
  using P = typename C::Prefill;
  extern __shared__ __align__(1024) char memory[];
  if (mixed_role(ptx::uniform(many.schedule.header->num_ctas)).prefills) {
    prefill<P>(many, many_maps, memory, [&] {
      const std::int32_t num_prefill = ptx::uniform(many.schedule.header->num_ctas);
      return PrefillPlace{mixed_role(num_prefill).index, num_prefill};
    });
    if (ptx::warpgroup_index() == P::kConsumers) {
      ptx::take_registers<C::kRegisters>();
    } else {
      ptx::give_registers<C::kRegisters>();
    }
    ptx::fence_async_proxy();  // copies will write where this thread has written
    __syncthreads();
  }
  decode_in_teams<C>(few, few_maps, memory);
}

}  // namespace quire::cuda::sm90
