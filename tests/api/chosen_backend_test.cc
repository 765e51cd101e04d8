// Calls run on the backend that the caller chose: by Context::backend, by a layer's configuration,
// by QUIRE_BACKEND. The CPU backend runs on the context's threads, the reference never does.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <functional>
#include <string>
#include <vector>

#include "tests/api/misuse.h"

namespace quire {
namespace {

class CountingPool final : public ThreadPool {
 public:
  int num_threads() const override { return 1; }
  void run(std::int64_t num_tasks, Task task, void* context) override {
    ++runs;
    for (std::int64_t i = 0; i < num_tasks; ++i) task(context, i, 0);
  }
  int runs = 0;
};

// A decoder's step, its calls on a counting pool.
class ChosenBackend : public testing::Test {
 protected:
  ChosenBackend() {
    call_.config.backend.clear();
    call_.context.threads = &pool_;
  }
  ~ChosenBackend() override { unsetenv("QUIRE_BACKEND"); }

  TensorView view(const conformance::Tensor& tensor) {
    return call_.on_device.buffers().view(tensor);
  }
  void write() {
    write_kv_cache(view(call_.tensors.key), view(call_.tensors.value), call_.args.kv_cache,
                   call_.batch.slot_mapping, call_.context);
  }
  void merge() {
    const TensorView o(o_.data(), DType::kFloat32, {1, 1, 8});
    const TensorView lse(lse_.data(), DType::kFloat32, {1, 1});
    merge_states(o, lse, o, lse, o, lse, call_.context);
  }
  // "cpu" or "reference"
  std::string backend_of(const std::function<void()>& work) {
    pool_.runs = 0;
    work();
    return pool_.runs > 0 ? "cpu" : "reference";
  }

  std::vector<float> o_ = std::vector<float>(8), lse_ = std::vector<float>(1);
  CountingPool pool_;
  Call call_;
};

TEST_F(ChosenBackend, OfCallsWithoutAPlan) {
  for (const std::function<void()>& work :
       std::vector<std::function<void()>>{[&] { write(); }, [&] { merge(); }}) {
    call_.context.backend = "";
    EXPECT_EQ(backend_of(work), "cpu");
    for (const char* name : {"reference", "cpu"}) {
      call_.context.backend = name;
      EXPECT_EQ(backend_of(work), name);
    }
    setenv("QUIRE_BACKEND", "reference", 1);
    EXPECT_EQ(backend_of(work), "cpu");  // the caller's word counts
    call_.context.backend = "";
    EXPECT_EQ(backend_of(work), "reference");
    setenv("QUIRE_BACKEND", "none such", 1);
    EXPECT_THAT([&] { work(); },
                testing::ThrowsMessage<Error>(testing::HasSubstr("QUIRE_BACKEND")));
    unsetenv("QUIRE_BACKEND");
    call_.context.backend = "none such";
    EXPECT_EQ(argument_named_by(work), "backend");
  }
}

TEST_F(ChosenBackend, OfALayer) {
  for (const char* name : {"cpu", "reference"}) {
    call_.config.backend = name;
    AttentionMetadataBuilder builder(call_.config);
    const AttentionImpl impl(call_.config);
    const AttentionMetadata metadata = builder.build(0, call_.batch);
    const auto forward = [&](const TensorView& key, const TensorView& value) {
      impl.forward({}, call_.args.query, key, value, call_.args.kv_cache, &metadata,
                   call_.args.output, std::nullopt, {}, {}, call_.context);
    };
    const TensorView key = view(call_.tensors.key);
    const TensorView value = view(call_.tensors.value);
    EXPECT_EQ(backend_of([&] {
                impl.do_kv_cache_update({}, key, value, call_.args.kv_cache,
                                        call_.batch.slot_mapping, call_.context);
              }),
              name);
    EXPECT_EQ(backend_of([&] { forward({}, {}); }), name);
    const int attention_only = pool_.runs;
    EXPECT_EQ(backend_of([&] { forward(key, value); }), name);
    EXPECT_EQ(pool_.runs > attention_only, std::string(name) == "cpu");
  }
}

// Nor does a context move a call off the plan's backend.
TEST_F(ChosenBackend, OfAPlanIsThePlans) {
  call_.config.backend = "reference";
  Plan plan(call_.config);
  plan.update(call_.batch, 0, call_.context);
  call_.context.backend = "reference";
  EXPECT_EQ(backend_of([&] { attention(plan, call_.args, call_.context); }), "reference");
  EXPECT_EQ(call_.verdict(), "");
  call_.context.backend = "cpu";
  EXPECT_EQ(argument_named_by([&] { plan.update(call_.batch, 0, call_.context); }), "backend");
  EXPECT_EQ(argument_named_by([&] { attention(plan, call_.args, call_.context); }), "backend");
  const AttentionImpl impl(call_.config);
  EXPECT_EQ(argument_named_by([&] {
              impl.do_kv_cache_update({}, view(call_.tensors.key), view(call_.tensors.value),
                                      call_.args.kv_cache, call_.batch.slot_mapping, call_.context);
            }),
            "backend");
}

TEST_F(ChosenBackend, MetadataOfAnotherBackendIsRefused) {
  AttentionMetadataBuilder builder(call_.config);
  const AttentionMetadata metadata = builder.build(0, call_.batch);
  const auto forward = [&] {
    AttentionImpl(call_.config)
        .forward({}, call_.args.query, {}, {}, call_.args.kv_cache, &metadata, call_.args.output);
  };
  EXPECT_EQ(argument_named_by(forward), "(no error)");
  call_.config.backend = "cpu";  // the same, by name
  EXPECT_EQ(argument_named_by(forward), "(no error)");
  call_.config.backend = "reference";
  EXPECT_EQ(argument_named_by(forward), "metadata");
}

}  // namespace
}  // namespace quire
