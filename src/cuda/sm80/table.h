// The tensor-core kernels of this build: one explicit list, one entry an instance.
#pragma once

#include <cuda_runtime.h>

#include <string>
#include <vector>

#include "cuda/work.h"
#include "quire/types.h"

namespace quire::cuda::sm80 {

// By query rows: up to 16, up to 32, more.
enum class Requests { kFew, kSome, kMany };

// Smaller head_size_v: served by the fp32 kernel.
inline constexpr int kLeastHeadSizeV = 16;

// What the kernel multiplies in, how K and V are stored, which heads fit, which requests.
struct MmaKey {
  DType compute = DType::kNone;  // fp16 or bf16
  bool bytes = false;            // K and V in 8 bits, else in `compute`
  int head = 0;                  // bucket: 64, 128, 256, 576
  Requests requests = Requests::kMany;
  // Soft cap, ALiBi, query-query bias: kernels of their own, since their code would take registers
  // from the plain loop.
  bool general = false;

  friend bool operator==(const MmaKey&, const MmaKey&) = default;
};

struct MmaKernel {
  MmaKey key;
  const char* name = nullptr;
  const void* function = nullptr;
  int threads = 128;
  int rows = 0;        // of a query tile
  int columns = 0;     // of V a pass
  int max_stages = 0;  // of the K and V pipeline
  int (*shared_bytes)(int stages) = nullptr;
};

struct MmaLaunch {
  int stages = 0;  // 0: does not fit on this device
  int shared_bytes = 0;
  int ctas_per_sm = 0;
};

const std::vector<MmaKernel>& mma_kernels();
// Which calls a kernel serves, for people.
std::string describe(const MmaKernel& kernel);
// Null if there is none: the fp32 kernel serves then.
const MmaKernel* find_mma_kernel(DType query, DType kv, int head_size, int head_size_v,
                                 Requests requests, bool general);

// The pipeline depth that suits the current device.
MmaLaunch mma_launch(const MmaKernel& kernel, int shared_bytes_per_block);
// Lets a kernel take whatever a block may. The limit belongs to the process, not to a plan: set to
// what one plan needs, it made launches of another plan fail, or of another thread meanwhile.
void allow_shared_bytes(const MmaKernel& kernel, int shared_bytes_per_block);
void launch_attention_mma(const MmaKernel& kernel, const MmaLaunch& launch,
                          const KernelParams& params, int grid, cudaStream_t stream);

}  // namespace quire::cuda::sm80
