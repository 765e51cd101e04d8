// What tests that need a GPU share: they are skipped, and say so, where there is none.
#pragma once

#include <cuda_runtime.h>
#include <gtest/gtest.h>

#include "conformance/runner.h"
#include "quire/quire.h"

namespace quire::conformance {

inline void check(cudaError_t error) { ASSERT_EQ(error, cudaSuccess) << cudaGetErrorString(error); }

class CudaTest : public testing::Test {
 protected:
  void SetUp() override {
    if (!backend().available()) GTEST_SKIP() << "no CUDA device";
  }
  static const AttentionBackend& backend() { return attention_backend("cuda"); }
};

// A case with a plan and a stream of its own.
class CudaJob {
 public:
  explicit CudaJob(const CaseSpec& spec)
      : made(build_case(spec)),
        on_device(made, attention_backend("cuda")),
        plan(on_device.config()),
        batch(on_device.batch()),
        args(on_device.args()),
        key_(on_device.buffers().view(made.key)),
        value_(on_device.buffers().view(made.value)) {
    cudaStream_t stream = nullptr;
    check(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    context.stream = stream;
    check(cudaDeviceSynchronize());  // uploads may end after the call; this stream would not wait
  }
  ~CudaJob() { cudaStreamDestroy(stream()); }
  CudaJob(const CudaJob&) = delete;
  CudaJob& operator=(const CudaJob&) = delete;

  cudaStream_t stream() const { return static_cast<cudaStream_t>(context.stream); }

  // A step: plan, cache write, attention. Returns before it is done.
  void launch() {
    plan.update(batch, made.spec.announced_prefix_len, context);
    write_kv_cache(key_, value_, args.kv_cache, batch.slot_mapping, context);
    attention(plan, args, context);
  }

  void poison_outputs() {
    for (const Tensor* output : {&made.output, &made.lse}) on_device.buffers().restore(*output);
    check(cudaDeviceSynchronize());
  }

  // Waits for the step.
  Actual result() {
    check(cudaStreamSynchronize(stream()));
    DeviceBuffers& buffers = on_device.buffers();
    return {buffers.download(made.output), buffers.download(made.lse), {}};
  }

  Case made;
  DeviceCase on_device;
  Plan plan;
  CommonAttentionMetadata batch;
  AttentionArgs args;
  Context context;

 private:
  TensorView key_;
  TensorView value_;
};

}  // namespace quire::conformance
