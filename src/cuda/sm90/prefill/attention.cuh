// Attention for sequences of many query rows on Hopper: wgmma on tiles that the copy engine brings.
//
//   find_tasks -> task[4] -> KvLoader:  page boxes -> K ring, V ring, of tiles of 128 keys
//                         -> RowCopier: rows -> Q[2]; O over Q -> output
//                         -> consumers: S = Q K^T -> mask, softmax in registers -> O += P V
//
// Roles. Three consumer warpgroups have 64 rows each and all of a tile's keys (consumer.cuh); a fourth
// warpgroup has the warps that find work, load K and V, and copy rows (loaders.cuh). Registers go
// from the fourth (32 a thread) to the first three (160).
//
// Over 8-bit caches page boxes come into a ring of bytes, and a warpgroup widens them into the K and V
// rings (widener.cuh). It takes the place of a consumer, so that there are two, with 128 rows. That costs
// 17 % in a long prompt, over caches of 16 bits too; why is open (docs/experiments.md).
//
// Barriers. task, query, k and v each have "full" (its loader to the consumers), task, k and v
// "empty" (back); output_full gives an item's rows of O to the warps that copy. The loader of K and
// V asks for the next task (task_wanted) when it is nearly done with one. Named barriers hand the
// turn to multiply by V from one consumer to the next: so one's softmax runs while another
// multiplies.
//
// Within a warpgroup nothing overlaps: products are waited for before the softmax. So branches
// between them (masks, rows near the end of fp32's range, tiles cut short) cost nothing but
// themselves, and what a tile takes is the sum of its parts. Two things shorten it:
// - Weights are found by the maximum of the tiles before (PrefillRows::softmax_as_before), without
//   a pass over the scores for theirs. If some weight turns out too large, which is seldom after the
//   first tile, the product with K is done again and then the whole softmax. So K is kept till then.
// - With two consumers (head size 256, 8-bit caches) one keeps its turn from V until it has begun to multiply by
//   the next K: one multiplies while the other is at its softmax. Else they fall into step, wait for
//   each other's products and then for the special function unit (head size 256: 3,500 clocks a tile,
//   not 2,960).
//
// Output. O of a finished item goes over its own queries (each warp its own rows). The warps that
// copy queries bring it to the output in whole rows, while the next item's queries and keys are
// already there.
//
// Shared memory at head size 128: Q 2 x 48 KB, K 2 x 32 KB, V 2 x 32 KB, 3 KB of the rest. Head
// size 256: two consumers with 232 registers, one Q of 64 KB, tiles of 64 keys. 8-bit caches at head
// size 128: Q 2 x 32 KB, K and V as above, bytes 2 x 16 KB.
//
// Why this tile: 192 rows of 128 keys are 12.6 Mflop, 3,072 clocks of the tensor cores, for 64 KB
// of K and V: 21 of the 33 bytes a clock that a multiprocessor gets from L2 when all ask. 128 rows
// need 32 of them, and lost a quarter of their speed beside CTAs that decode (a probe on an H100).
// A tile takes 3,660 clocks (in the profiler, pre_8x2k): of a warpgroup's, 1,420 are softmax, 900 the
// product with K, 770 that with V, each with its wait for the other warpgroups', 290 the turn, 125
// waiting for K.
#pragma once

#include "cuda/sm90/prefill/combine_parts.cuh"
#include "cuda/sm90/prefill/consumer.cuh"
#include "cuda/sm90/prefill/loaders.cuh"
#include "cuda/sm90/prefill/widener.cuh"

namespace quire::cuda::sm90 {

// All threads of a CTA: its part of the work. `place()` tells its PrefillPlace, to the one warp that
// asks.
template <class C, class Place>
__device__ __forceinline__ void prefill(const KernelParams& p, const KvMaps& maps, char* memory,
                                        const Place& place) {
  auto& shared = *reinterpret_cast<PrefillShared<C>*>(memory + C::kSharedAt);
  if (ptx::opaque(threadIdx.x) == 0) init_barriers(shared);
  __syncthreads();
  const int warpgroup = ptx::warpgroup_index();
  if (warpgroup == C::kConsumers) {
    ptx::give_registers<C::kProducerRegisters>();
    const int warp = static_cast<int>(threadIdx.x / 32) % 4;
    if (warp == 0) {
      KvLoader<C>(p, maps, memory, shared).run();
    } else if (warp == 1) {
      find_tasks(p, maps.box_keys, shared, place());
    } else {
      RowCopier<C>(p, memory, shared).run();
    }
  } else if (C::kKv8 && warpgroup == C::kConsumers + 1) {
    ptx::give_registers<C::kProducerRegisters>();
    if constexpr (C::kKv8) KvWidener<C>(p, memory, shared).run();
  } else {
    ptx::take_registers<C::kConsumerRegisters>();
    PrefillConsumer<C>(p, maps, memory, shared, warpgroup).run();
    combine_parts(p, shared);
  }
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    attention_prefill(const __grid_constant__ KernelParams p, const __grid_constant__ KvMaps maps) {
  extern __shared__ __align__(1024) char memory[];
  prefill<C>(p, maps, memory, [] {
    return PrefillPlace{static_cast<std::int32_t>(blockIdx.x),
                        static_cast<std::int32_t>(gridDim.x)};
  });
}

}  // namespace quire::cuda::sm90
