// How an instance of a kernel of this folder becomes a row of the kernel table.
#pragma once

#include "cuda/kernel_table.h"
#include "cuda/sm90/tensor_map.h"

namespace quire::cuda::sm90 {

// What prepare and launch need to know of an instance.
struct Instance {
  const char* name = nullptr;
  const void* function = nullptr;  // of (KernelParams, KvMaps)
  int threads = 0;
  int shared_bytes = 0;
  int tile_keys = 0;  // kv_maps()
  // Not null: the function also takes RowMaps, of boxes of so many tokens.
  int (*box_tokens)(const LayerParams& layer) = nullptr;
  // Of (KernelParams, KvMaps, KernelParams, KvMaps), for two families: of the second.
  int tile_keys_beside = 0;
};

bool prepare(const Instance& instance, const LayerParams& layer, const DeviceInfo& device,
             Launch* launch);
void launch(const Instance& instance, const Launch& launch, int grid, const KernelParams& params,
            cudaStream_t stream);
void launch_beside(const Instance& instance, const Launch& launch, int grid,
                   const KernelParams& few, const KernelParams& many, cudaStream_t stream);

}  // namespace quire::cuda::sm90
