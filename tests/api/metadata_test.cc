// AttentionMetadata: all its fields as build() fills them, filled by hand, and contradicting ones.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <vector>

#include "tests/api/misuse.h"

namespace quire {
namespace {

using conformance::CaseSpec;
using conformance::DeviceMemory;
using conformance::make_int32;
using conformance::memory_of;
using testing::ElementsAre;

constexpr std::int64_t kPrefix = 36;

// Three sequences behind a prefix, one that is shorter, and padding.
CaseSpec shared_spec() {
  CaseSpec spec = Call::default_spec();
  spec.sequences = {{1, 40}, {1, 50}, {2, 45}, {3, 8}};
  spec.shared_prefix_len = kPrefix;
  spec.padded_sequences = 1;
  return spec;
}

class MetadataTest : public testing::TestWithParam<const AttentionBackend*> {
 protected:
  DeviceMemory& memory() const { return memory_of(GetParam()->device_type()); }

  std::vector<std::int32_t> values(const ConstTensorView& view) const {
    EXPECT_EQ(view.dtype, DType::kInt32);
    EXPECT_EQ(view.ndim, 1);
    EXPECT_EQ(view.device, memory().device());
    std::vector<std::int32_t> data(static_cast<std::size_t>(view.shape[0]));
    memory().synchronize();
    memory().download(data.data(), view.data, data.size() * sizeof(std::int32_t));
    return data;
  }

  static void forward(Call& call, const AttentionMetadata& metadata) {
    AttentionImpl(call.config)
        .forward({}, call.args.query, {}, {}, call.args.kv_cache, &metadata, call.args.output,
                 std::nullopt, {}, call.args.lse);
  }

  // The bytes of output and lse, from poison.
  std::vector<std::byte> result(Call& call, const AttentionMetadata& metadata) {
    conformance::DeviceBuffers& buffers = call.on_device.buffers();
    call.on_device.poison_outputs();
    forward(call, metadata);
    EXPECT_EQ(call.verdict(), "");
    std::vector<std::byte> bytes = buffers.download(call.tensors.output);
    const std::vector<std::byte> lse = buffers.download(call.tensors.lse);
    bytes.insert(bytes.end(), lse.begin(), lse.end());
    return bytes;
  }

  // What a caller fills in.
  static AttentionMetadata by_hand(const Call& call) {
    AttentionMetadata metadata{call.batch};
    metadata.use_cascade = true;
    metadata.common_prefix_len = kPrefix;
    return metadata;
  }

  ConstTensorView int32s(Call& call, const std::vector<std::int32_t>& values) {
    return call.on_device.buffers().view(make_int32(values));
  }
};

TEST_P(MetadataTest, BuildFillsAllFields) {
  Call call(shared_spec(), *GetParam());
  call.batch.max_query_len = 3;
  call.batch.max_seq_len = 50;
  AttentionMetadataBuilder builder(call.config);
  AttentionMetadata metadata = builder.build(kPrefix, call.batch);
  EXPECT_EQ(metadata.num_actual_tokens, 7);
  EXPECT_EQ(metadata.max_query_len, 3);
  EXPECT_EQ(metadata.max_seq_len, 50);
  EXPECT_EQ(metadata.query_start_loc.data, call.batch.query_start_loc.data);
  EXPECT_EQ(metadata.seq_lens.data, call.batch.seq_lens.data);
  EXPECT_EQ(metadata.block_table.data, call.batch.block_table.data);
  EXPECT_EQ(metadata.slot_mapping.data, call.batch.slot_mapping.data);
  EXPECT_TRUE(metadata.use_cascade);
  EXPECT_EQ(metadata.common_prefix_len, kPrefix);
  EXPECT_THAT(values(metadata.cu_prefix_query_lens), ElementsAre(0, 7));
  EXPECT_THAT(values(metadata.prefix_kv_lens), ElementsAre(kPrefix));
  EXPECT_THAT(values(metadata.suffix_kv_lens), ElementsAre(4, 14, 9, 0, 0));
  ASSERT_NE(metadata.scheduler_metadata, nullptr);
  EXPECT_EQ(metadata.prefix_scheduler_metadata, metadata.scheduler_metadata);
  result(call, metadata);

  metadata = builder.build(0, call.batch);
  EXPECT_FALSE(metadata.use_cascade);
  EXPECT_EQ(metadata.common_prefix_len, 0);
  EXPECT_FALSE(metadata.cu_prefix_query_lens);
  EXPECT_FALSE(metadata.prefix_kv_lens);
  EXPECT_FALSE(metadata.suffix_kv_lens);
  EXPECT_NE(metadata.scheduler_metadata, nullptr);
  EXPECT_EQ(metadata.prefix_scheduler_metadata, nullptr);
  result(call, metadata);
}

// A batch-invariant layer has no cascade, whoever asks.
TEST_P(MetadataTest, BatchInvariantLayers) {
  Call call(shared_spec(), *GetParam());
  call.config.batch_invariant = true;
  call.context.check_indices = true;
  AttentionMetadataBuilder builder(call.config);
  AttentionMetadata filled = by_hand(call);
  filled.prefix_kv_lens = int32s(call, {kPrefix});
  for (const AttentionMetadata& metadata :
       {builder.build(kPrefix, call.batch), builder.plan(filled, call.context)}) {
    EXPECT_FALSE(metadata.use_cascade);
    EXPECT_EQ(metadata.common_prefix_len, 0);
    EXPECT_FALSE(metadata.cu_prefix_query_lens);
    EXPECT_FALSE(metadata.prefix_kv_lens);
    EXPECT_EQ(metadata.prefix_scheduler_metadata, nullptr);
  }
}

TEST_P(MetadataTest, FilledByHandComputesTheSame) {
  Call call(shared_spec(), *GetParam());
  AttentionMetadataBuilder builder(call.config);
  const std::vector<std::byte> built = result(call, builder.build(kPrefix, call.batch));

  AttentionMetadata metadata = builder.plan(by_hand(call));
  EXPECT_THAT(values(metadata.cu_prefix_query_lens), ElementsAre(0, 7));
  EXPECT_THAT(values(metadata.prefix_kv_lens), ElementsAre(kPrefix));
  EXPECT_THAT(values(metadata.suffix_kv_lens), ElementsAre(4, 14, 9, 0, 0));
  EXPECT_EQ(metadata.prefix_scheduler_metadata, metadata.scheduler_metadata);
  EXPECT_TRUE(result(call, metadata) == built);

  // Tensors of the caller's own stay; -36 is vLLM's length behind the prefix for padding.
  AttentionMetadata whole = by_hand(call);
  whole.cu_prefix_query_lens = int32s(call, {0, 7});
  whole.prefix_kv_lens = int32s(call, {kPrefix});
  whole.suffix_kv_lens = int32s(call, {4, 14, 9, -28, -36});
  call.context.check_indices = true;
  metadata = builder.plan(whole, call.context);
  EXPECT_EQ(metadata.cu_prefix_query_lens.data, whole.cu_prefix_query_lens.data);
  EXPECT_EQ(metadata.prefix_kv_lens.data, whole.prefix_kv_lens.data);
  EXPECT_EQ(metadata.suffix_kv_lens.data, whole.suffix_kv_lens.data);
  EXPECT_TRUE(result(call, metadata) == built);

  // Without cascade; and planned metadata may be planned again.
  const std::vector<std::byte> plain = result(call, builder.build(0, call.batch));
  metadata = builder.plan(AttentionMetadata{call.batch});
  EXPECT_FALSE(metadata.suffix_kv_lens);
  EXPECT_TRUE(result(call, metadata) == plain);
  metadata = builder.plan(metadata);
  EXPECT_TRUE(result(call, metadata) == plain);
}

// What belongs to Quire's batches travels too.
TEST_P(MetadataTest, MasksAndBiasesOfTheBatchTravel) {
  CaseSpec spec = shared_spec();
  spec.causal_flags = spec.ranges = spec.visible_prefixes = true;
  spec.sequences[1].causal = false;
  spec.sequences[2].ranges = {{37, 44}};
  spec.sequences[0].visible_prefix = 4;
  spec.config.mask = Mask::sliding_window(16);
  spec.qq_bias_size = 3;
  Call call(spec, *GetParam());
  AttentionMetadataBuilder builder(call.config);
  const std::vector<std::byte> built = result(call, builder.build(kPrefix, call.batch));
  EXPECT_TRUE(result(call, builder.plan(by_hand(call))) == built);

  spec = Call::default_spec();
  spec.kv_offsets = spec.kv_strides = spec.q_offsets = true;
  for (conformance::SequenceSpec& seq : spec.sequences) {
    seq.kv_offset = 3;
    seq.kv_stride = 2;
    seq.q_offset = 20;
  }
  Call shard(spec, *GetParam());
  AttentionMetadataBuilder shards(shard.config);
  result(shard, shards.build(0, shard.batch));
  result(shard, shards.plan(AttentionMetadata{shard.batch}));

  spec = Call::default_spec();
  spec.config.type = AttentionType::kEncoder;
  spec.kv_start_loc = true;
  Call encoder(spec, *GetParam());
  AttentionMetadataBuilder encoders(encoder.config);
  const AttentionMetadata metadata = encoders.plan(AttentionMetadata{encoder.batch});
  AttentionImpl(encoder.config)
      .forward({}, encoder.args.query, encoder.args.key, encoder.args.value, {}, &metadata,
               encoder.args.output, std::nullopt, {}, encoder.args.lse);
  EXPECT_EQ(encoder.verdict(), "");
  EXPECT_EQ(argument_named_by([&] { encoders.build(4, encoder.batch); }), "common_prefix_len");
}

TEST_P(MetadataTest, ContradictingFieldsAreRefused) {
  struct Wrong {
    const char* argument;
    std::function<void(AttentionMetadata&)> spoil;
  };
  Call call(shared_spec(), *GetParam());
  AttentionMetadata right = by_hand(call);
  right.cu_prefix_query_lens = int32s(call, {0, 7});
  right.prefix_kv_lens = int32s(call, {kPrefix});
  right.suffix_kv_lens = int32s(call, {4, 14, 9, 0, 0});
  const std::pair<const char*, ConstTensorView AttentionMetadata::*> tensors[] = {
      {"cu_prefix_query_lens", &AttentionMetadata::cu_prefix_query_lens},
      {"prefix_kv_lens", &AttentionMetadata::prefix_kv_lens},
      {"suffix_kv_lens", &AttentionMetadata::suffix_kv_lens}};
  std::vector<Wrong> wrongs{
      {"common_prefix_len", [](AttentionMetadata& m) { m.common_prefix_len = 0; }},
      {"common_prefix_len", [](AttentionMetadata& m) { m.common_prefix_len = -4; }},
      {"common_prefix_len", [](AttentionMetadata& m) { m.common_prefix_len = 1LL << 31; }},
      {"common_prefix_len", [](AttentionMetadata& m) { m.use_cascade = false; }},
      {"seq_lens", [](AttentionMetadata& m) { m.seq_lens = {}; }}};
  for (const auto& [name, tensor] : tensors) {
    const auto member = tensor;
    wrongs.push_back({name, [=](AttentionMetadata& m) { ++(m.*member).shape[0]; }});
    wrongs.push_back({name, [=](AttentionMetadata& m) { (m.*member).ndim = 2; }});
    wrongs.push_back({name, [=](AttentionMetadata& m) { (m.*member).dtype = DType::kInt64; }});
    wrongs.push_back({name, [=](AttentionMetadata& m) { ++(m.*member).device.index; }});
    wrongs.push_back({name, [=](AttentionMetadata& m) { (m.*member).data = nullptr; }});
    wrongs.push_back({name, [=](AttentionMetadata& m) {
                        const ConstTensorView kept = m.*member;
                        m = AttentionMetadata{static_cast<const CommonAttentionMetadata&>(m)};
                        m.*member = kept;
                      }});
    if (member != &AttentionMetadata::prefix_kv_lens) {
      wrongs.push_back({name, [=](AttentionMetadata& m) { (m.*member).strides[0] = 2; }});
    }
  }
  AttentionMetadataBuilder builder(call.config);
  const AttentionMetadata last = builder.plan(right);
  for (const Wrong& wrong : wrongs) {
    AttentionMetadata metadata = right;
    wrong.spoil(metadata);
    EXPECT_EQ(argument_named_by([&] { builder.plan(metadata); }), wrong.argument);
  }
  result(call, last);  // plans that failed leave the last one good
}

TEST_P(MetadataTest, ContentsWhenAskedToLook) {
  Call call(shared_spec(), *GetParam());
  call.context.check_indices = true;
  AttentionMetadataBuilder builder(call.config);
  const auto named = [&](ConstTensorView AttentionMetadata::*member,
                         const std::vector<std::int32_t>& values) {
    AttentionMetadata metadata = by_hand(call);
    metadata.*member = int32s(call, values);
    EXPECT_EQ(argument_named_by([&] { builder.plan(metadata); }), "(no error)");
    return argument_named_by([&] { builder.plan(metadata, call.context); });
  };
  EXPECT_EQ(named(&AttentionMetadata::cu_prefix_query_lens, {0, 6}), "cu_prefix_query_lens[1]");
  EXPECT_EQ(named(&AttentionMetadata::cu_prefix_query_lens, {-1, 7}), "cu_prefix_query_lens[0]");
  EXPECT_EQ(named(&AttentionMetadata::prefix_kv_lens, {32}), "prefix_kv_lens[0]");
  EXPECT_EQ(named(&AttentionMetadata::suffix_kv_lens, {4, 13, 9, 0, 0}), "suffix_kv_lens[1]");
  EXPECT_EQ(named(&AttentionMetadata::suffix_kv_lens, {4, 14, 9, 0, 1}), "suffix_kv_lens[4]");
}

TEST_P(MetadataTest, WithoutAPlanTheErrorSaysWhatToCall) {
  Call call(shared_spec(), *GetParam());
  const AttentionMetadata metadata = by_hand(call);
  EXPECT_EQ(argument_named_by([&] { forward(call, metadata); }), "scheduler_metadata");
  EXPECT_THAT([&] { forward(call, metadata); },
              testing::ThrowsMessage<Error>(testing::HasSubstr("plan()")));
}

// A layer computes what was planned, so fields changed since then would be passed over.
TEST_P(MetadataTest, FieldsChangedAfterThePlanAreRefused) {
  struct Change {
    const char* argument;
    std::function<void(AttentionMetadata&)> make;
  };
  static std::int64_t other[4];
  const auto tensor = [](ConstTensorView CommonAttentionMetadata::*member) {
    return [member](AttentionMetadata& m) { (m.*member).data = other; };
  };
  using Common = CommonAttentionMetadata;
  const std::vector<Change> changes{
      {"query_start_loc", tensor(&Common::query_start_loc)},
      {"seq_lens", tensor(&Common::seq_lens)},
      {"seq_lens", [](AttentionMetadata& m) { --m.seq_lens.shape[0]; }},
      {"block_table", tensor(&Common::block_table)},
      {"causal", tensor(&Common::causal)},
      {"causal", [](AttentionMetadata& m) { m.causal = {}; }},
      {"mm_prefix_range", tensor(&Common::mm_prefix_range)},
      {"visible_prefix_lens", tensor(&Common::visible_prefix_lens)},
      {"qq_bias", tensor(&Common::qq_bias)},
      {"kv_start_loc", tensor(&Common::kv_start_loc)},
      {"kv_offset", tensor(&Common::kv_offset)},
      {"kv_stride", tensor(&Common::kv_stride)},
      {"q_offset", tensor(&Common::q_offset)},
      {"num_actual_tokens", [](AttentionMetadata& m) { --m.num_actual_tokens; }},
      {"max_query_len", [](AttentionMetadata& m) { m.max_query_len = 9; }},
      {"max_seq_len", [](AttentionMetadata& m) { m.max_seq_len = 99; }},
      {"common_prefix_len", [](AttentionMetadata& m) { m.common_prefix_len = 32; }},
      {"prefix_scheduler_metadata", [](AttentionMetadata& m) { m.use_cascade = false; }},
      {"prefix_scheduler_metadata",
       [](AttentionMetadata& m) { m.prefix_scheduler_metadata = nullptr; }},
      {"common_prefix_len", [](AttentionMetadata& m) {
         m.use_cascade = false;
         m.prefix_scheduler_metadata = nullptr;
       }}};
  CaseSpec spec = shared_spec();
  spec.causal_flags = true;
  Call call(spec, *GetParam());
  AttentionMetadataBuilder builder(call.config);
  const AttentionMetadata planned = builder.build(kPrefix, call.batch);
  for (const Change& change : changes) {
    AttentionMetadata metadata = planned;
    change.make(metadata);
    EXPECT_EQ(argument_named_by([&] { forward(call, metadata); }), change.argument);
  }
  AttentionMetadata metadata = planned;
  metadata.slot_mapping = {};  // each layer may write to slots of its own
  result(call, metadata);
}

// A captured build keeps its tensors' addresses, and each replay writes them again, also after a
// larger batch had the builder take more memory.
TEST_P(MetadataTest, GraphsKeepTheTensors) {
  Call call(shared_spec(), *GetParam());
  AttentionMetadataBuilder builder(call.config);
  AttentionMetadata captured;
  const std::function<void()> replay = memory().record([&](const Context& context) {
    captured = builder.build(kPrefix, call.batch, false, context);
  });
  if (!replay) GTEST_SKIP() << "no graphs here";
  CaseSpec larger = shared_spec();
  larger.sequences.assign(300, {1, 40});
  Call other(larger, *GetParam());
  const AttentionMetadata of_other = builder.build(kPrefix, other.batch);
  EXPECT_NE(of_other.suffix_kv_lens.data, captured.suffix_kv_lens.data);
  call.tensors.seq_lens.set({1}, 47);
  call.on_device.buffers().restore(call.tensors.seq_lens);
  replay();
  EXPECT_THAT(values(captured.cu_prefix_query_lens), ElementsAre(0, 7));
  EXPECT_THAT(values(captured.prefix_kv_lens), ElementsAre(kPrefix));
  EXPECT_THAT(values(captured.suffix_kv_lens), ElementsAre(4, 11, 9, 0, 0));
  EXPECT_THAT(values(of_other.prefix_kv_lens), ElementsAre(kPrefix));
}

INSTANTIATE_TEST_SUITE_P(Backends, MetadataTest,
                         testing::ValuesIn(conformance::available_backends()),
                         conformance::backend_name);

}  // namespace
}  // namespace quire
