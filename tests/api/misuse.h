// A correct call, ready to be spoilt: each test makes one mistake and expects quire::Error to name
// the argument, with nothing written.
#pragma once

#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "tests/conformance/fixture.h"

namespace quire {

// Runs `call` and returns the argument its Error names; "(no error)" if it throws none. The name
// must follow the rule at quire::Error, the text too.
std::string argument_named_by(const std::function<void()>& call);

using conformance::best_backends;

// Devices that memory on `device` is not on.
inline std::vector<Device> other_devices(Device device) {
  const bool cpu = device.type == DeviceType::kCpu;
  return {{cpu ? DeviceType::kCuda : DeviceType::kCpu, 0}, {device.type, device.index + 1}};
}

// One layer, one batch and their tensors.
class Call {
 public:
  explicit Call(const conformance::CaseSpec& spec = default_spec(),
                const AttentionBackend& backend = attention_backend("cpu"))
      : Call(conformance::build_case(spec), backend) {}
  Call(conformance::Case made, const AttentionBackend& backend)
      : tensors(std::move(made)),
        on_device(tensors, backend),
        config(on_device.config()),
        batch(on_device.batch()),
        args(on_device.args()) {}
  Call(const Call&) = delete;
  Call& operator=(const Call&) = delete;

  static conformance::CaseSpec default_spec() {
    conformance::CaseSpec spec;
    spec.seed = 3;
    spec.config.dtype = DType::kFloat32;
    spec.config.num_heads = 4;
    spec.config.num_kv_heads = 2;
    spec.config.head_size = 16;
    spec.config.block_size = 4;
    spec.layout = conformance::CacheLayout::kSeparate;
    spec.sequences = {{3, 10}, {1, 7}};
    return spec;
  }

  void run() {
    Plan plan(config);
    plan.update(batch, common_prefix_len, context);
    attention(plan, args, context);
  }

  // What the call leaves changed: "" after an error.
  std::string damage() { return on_device.buffers().damage({}); }

  // What is wrong with the result, "" if nothing.
  std::string verdict() {
    conformance::Actual actual;
    actual.output = on_device.buffers().download(tensors.output);
    if (tensors.lse) actual.lse = on_device.buffers().download(tensors.lse);
    if (tensors.output_block_scale) {
      actual.output_block_scale = on_device.buffers().download(tensors.output_block_scale);
    }
    return conformance::compare(tensors, actual, conformance::literal_attention(tensors));
  }

  conformance::Case tensors;
  conformance::DeviceCase on_device;
  AttentionConfig config;
  CommonAttentionMetadata batch;
  AttentionArgs args;
  std::int64_t common_prefix_len = 0;
  Context context;
};

struct Mistake {
  const char* name;
  const char* argument;
  std::function<void(Call&)> make;
};

inline void expect_named(const std::vector<Mistake>& mistakes,
                         const conformance::CaseSpec& spec = Call::default_spec()) {
  for (const AttentionBackend* backend : best_backends()) {
    Call correct(spec, *backend);
    EXPECT_EQ(argument_named_by([&] { correct.run(); }), "(no error)") << backend->name();
    for (const Mistake& mistake : mistakes) {
      Call call(spec, *backend);
      mistake.make(call);
      EXPECT_EQ(argument_named_by([&] { call.run(); }), mistake.argument)
          << mistake.name << " on " << backend->name();
      EXPECT_EQ(call.damage(), "") << mistake.name << " on " << backend->name();
    }
  }
}

// Mistakes that any tensor argument can have. `dtype` is one that it must not have.
// `view` is a function from a Call to a reference to the tensor.
template <class View>
std::vector<Mistake> mistakes_of_a_tensor(const char* argument, const View& view, DType dtype,
                                          bool unit_last_stride = true) {
  std::vector<Mistake> mistakes{
      {"absent", argument, [view](Call& call) { view(call) = {}; }},
      {"dtype", argument, [view, dtype](Call& call) { view(call).dtype = dtype; }},
      {"number of dimensions", argument, [view](Call& call) { ++view(call).ndim; }},
      {"negative size", argument, [view](Call& call) { view(call).shape[0] = -1; }},
      {"another kind of device", argument,
       [view](Call& call) { view(call).device = other_devices(call.config.device)[0]; }},
      {"another device of the kind", argument,
       [view](Call& call) { view(call).device = other_devices(call.config.device)[1]; }},
      {"null data", argument, [view](Call& call) { view(call).data = nullptr; }}};
  if (unit_last_stride) {
    mistakes.push_back({"last stride", argument, [view](Call& call) {
                          auto& tensor = view(call);
                          tensor.strides[tensor.ndim - 1] = 2;
                        }});
  }
  return mistakes;
}

template <class View>
Mistake wrong_size(const char* argument, const View& view, int dim, std::int64_t change) {
  return {"size", argument, [view, dim, change](Call& call) { view(call).shape[dim] += change; }};
}

}  // namespace quire
