// Model files that are sound GGUF but not a Llama model that can be computed here.
#include "examples/llm/model.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "examples/llm/cpu_ops.h"
#include "tests/llm/gguf_writer.h"
#include "tests/llm/tiny_model.h"

namespace quire::llm {
namespace {

using testing::HasSubstr;
using testing::ThrowsMessage;

void load(const GgufWriter& writer, const ModelOptions& options = {.num_blocks = 4}) {
  const auto bytes = writer.bytes();
  const GgufFile file = GgufFile::parse(bytes, "tiny");
  CpuOps ops(1);
  const Model model(file, ops, options);
}

void expect_refused(const GgufWriter& writer, const std::string& text) {
  EXPECT_THAT([&] { load(writer); }, ThrowsMessage<ModelError>(HasSubstr(text))) << text;
}

TEST(Model, LoadsTheTinyOne) { load(tiny_model_writer()); }

TEST(Model, TiesTheOutputToTheEmbedding) { load(tiny_model_writer("output.weight")); }

TEST(Model, RefusesOtherArchitectures) {
  GgufWriter writer;
  writer.add_string("general.architecture", "qwen2");
  expect_refused(writer, "expected \"llama\"");
}

TEST(Model, RefusesMissingTensors) {
  expect_refused(tiny_model_writer("token_embd.weight"), "\"token_embd.weight\"");
  expect_refused(tiny_model_writer("output_norm.weight"), "\"output_norm.weight\"");
  expect_refused(tiny_model_writer("blk.1.attn_k.weight"), "\"blk.1.attn_k.weight\"");
}

TEST(Model, RefusesTensorsItWouldIgnore) {
  GgufWriter writer = tiny_model_writer();
  writer.add_floats("blk.0.attn_q.bias", {64}, std::vector<float>(64));
  expect_refused(writer, "got also \"blk.0.attn_q.bias\"");
}

TEST(Model, RefusesTensorsOfAnotherShape) {
  GgufWriter writer = tiny_model_writer("blk.1.attn_k.weight");
  writer.add_floats("blk.1.attn_k.weight", {64, 64}, std::vector<float>(64 * 64));
  expect_refused(writer, "\"blk.1.attn_k.weight\": expected shape [64, 32], got [64, 64]");
}

TEST(Model, RefusesUnknownRopeScaling) {
  GgufWriter writer = tiny_model_writer();
  writer.add_string("llama.rope.scaling.type", "yarn");
  expect_refused(writer, "expected \"none\" or \"linear\", got \"yarn\"");
}

TEST(Model, RefusesExperts) {
  GgufWriter writer = tiny_model_writer();
  writer.add_uint("llama.expert_count", 8);
  expect_refused(writer, "mixture of experts");
}

TEST(Model, RefusesAbsurdSizes) {
  // The metadata of the writer with one value replaced in its bytes.
  const auto refuse = [](const std::string& key, std::uint32_t value) {
    auto bytes = tiny_model_writer().bytes();
    poke(bytes, find_text(bytes, key) + key.size() + 4, value);
    const GgufFile file = GgufFile::parse(bytes, "tiny");
    CpuOps ops(1);
    EXPECT_THROW(Model(file, ops, {.num_blocks = 4}), ModelError) << key << " " << value;
  };
  for (const char* key : {"llama.block_count", "llama.context_length", "llama.embedding_length",
                          "llama.feed_forward_length", "llama.attention.head_count"}) {
    refuse(key, 0);
    refuse(key, 0xFFFFFFFFU);
    refuse(key, 0x7FFFFFFFU);
  }
  refuse("llama.attention.head_count_kv", 3);
  refuse("llama.attention.head_count_kv", 0);
}

TEST(Model, QuireRefusesItsOwn) {
  EXPECT_THROW(load(tiny_model_writer(), {.num_blocks = 4, .backend = "nonsense"}), Error);
}

TEST(Model, SaysWhenMemoryIsNotEnough) {
  EXPECT_THAT([] { load(tiny_model_writer(), {.num_blocks = std::int64_t{1} << 55}); },
              ThrowsMessage<std::runtime_error>(HasSubstr("out of memory")));
}

}  // namespace
}  // namespace quire::llm
