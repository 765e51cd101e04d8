// The attention kernels of this build, of every architecture: one row a kernel, one table, and the
// one place that chooses from it. An architecture is a folder (sm80/, fp32/) whose kernels() lists
// its rows; CMake finds the folders.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "cuda/device.h"
#include "cuda/kernel_params.h"
#include "cuda/plan/schedule.h"

namespace quire::cuda {

inline constexpr std::int32_t kAnyRows = 0x7FFFFFFF;

// Which layers and calls a kernel takes.
struct KernelKey {
  int min_capability = 80;  // compute capability, 80 for 8.0
  int max_capability = 999;
  // What Q and K are multiplied in. fp16 and bf16: of queries in that dtype, over K and V stored in
  // it or, with `kv8`, in 8 bits; fp16 with kv8 takes fp8 queries too, which it holds exactly.
  // fp32: everything.
  DType compute = DType::kNone;
  bool kv8 = false;
  bool token_scales = true;        // also caches with scales of their own for each token and head
  std::int32_t max_head_size = 0;  // of K and V
  bool exact_head_size = false;    // K and V of just that size
  std::int32_t min_head_size_v = 0;
  // Meant for sequences of up to so many query rows (query_len * group).
  std::int32_t max_rows = kAnyRows;
  // Calls without and with soft cap, ALiBi or query-query bias. Where these have kernels of their
  // own, it is because their code would take registers from the plain loop.
  bool plain = true;
  bool score_mod = false;
};

// What a kernel needs of a device, found once a layer.
struct Launch {
  int pipeline_stages = 0;
  int shared_bytes = 0;
  int ctas_per_sm = 0;
};

// One row of the table.
struct AttentionKernel {
  KernelKey key;
  const char* name = nullptr;
  TilePolicy policy;
  bool whole_items = false;      // knows ScheduleHeader::whole
  bool shared_prefix = false;    // may be given the tiles of shared prefixes
  bool kv_chunks = false;        // batch-invariant mode: leaves a partial for each kv chunk
  bool awaits_partials = false;  // uses ScheduleView::awaited_partials and first_tiles
  // Pipeline depth, shared memory, CTAs of a multiprocessor for a layer, on the current device.
  // False: the device has too little shared memory, or the layer is none of the kernel's.
  bool (*prepare)(const LayerParams& layer, const DeviceInfo& device, Launch* launch) = nullptr;
  void (*launch)(const Launch& launch, int grid, const KernelParams& params,
                 cudaStream_t stream) = nullptr;
  // Not null: does its family's work beside that of the kernels for any rows whose names begin with
  // `beside`, both in one launch of as many CTAs as there are multiprocessors. `launch` is null then.
  // Of the others' work it takes any tiles, best those of `beside_policy`.
  void (*launch_beside)(const Launch& launch, int grid, const KernelParams& few,
                        const KernelParams& many, cudaStream_t stream) = nullptr;
  const char* beside = nullptr;
  TilePolicy beside_policy;
  // Whether it takes the strides and addresses of a call; null: any.
  bool (*takes)(const KernelParams& params) = nullptr;
};

// The kernels of each architecture, in the order of preference: the newest first, fp32 last.
using KernelTable = std::vector<std::span<const AttentionKernel>>;
const KernelTable& kernel_table();
// Which calls a kernel serves, for people.
std::string describe(const AttentionKernel& kernel);

// A kernel chosen for a layer.
struct FamilyMember {
  const AttentionKernel* kernel = nullptr;
  Launch launch;
};

// Kernels of a layer that work on the same tiles: the layer is planned once for all of them, and
// each call goes to the first that takes it.
struct KernelFamily {
  std::vector<FamilyMember> members;
  int grid = 0;  // CTAs of each launch
  const AttentionKernel& first() const { return *members.front().kernel; }
  // Null: no member takes the call.
  const FamilyMember* member_for(const KernelParams& params) const;
  // Whether each call has a member that takes it, whatever its scores and strides.
  bool is_complete() const;
};

// Which calls of a layer kernels are chosen for: any, or those that the best kernels take.
enum class Calls { kAny, kSome };

// Most families of a layer, by the rows that they are meant for.
inline constexpr int kMaxFamilies = kNumRules;

// The families of a layer on the current device, which `device` is: by the rows that they are meant
// for, from few to any number. An architecture's kernels are used for the rows that no newer one
// has a kernel for, and one for any number of rows leaves few rows to older ones that are meant for
// few; of several of one architecture for the same rows the first in the table. Calls::kAny: of
// complete families only.
std::vector<KernelFamily> choose_kernels(const KernelTable& table, const LayerParams& layer,
                                         const DeviceInfo& device, Calls calls);

}  // namespace quire::cuda
