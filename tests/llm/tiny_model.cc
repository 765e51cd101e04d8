#include "tests/llm/tiny_model.h"

#include <random>
#include <string>

namespace quire::llm {
namespace {

constexpr std::uint64_t kHidden = 64;
constexpr std::uint64_t kFfn = 96;
constexpr std::uint64_t kHeads = 4;
constexpr std::uint64_t kKvHeads = 2;
constexpr std::uint64_t kHeadSize = kHidden / kHeads;

}  // namespace

GgufWriter tiny_model_writer(std::string_view leave_out, std::int64_t vocab) {
  GgufWriter writer;
  writer.add_string("general.architecture", "llama");
  writer.add_uint("llama.block_count", 2);
  writer.add_uint("llama.context_length", kTinyContext);
  writer.add_uint("llama.embedding_length", kHidden);
  writer.add_uint("llama.feed_forward_length", kFfn);
  writer.add_uint("llama.attention.head_count", kHeads);
  writer.add_uint("llama.attention.head_count_kv", kKvHeads);
  writer.add_float("llama.attention.layer_norm_rms_epsilon", 1e-5F);

  const auto vocab_size = static_cast<std::uint64_t>(vocab);
  std::mt19937 random(7);
  const auto add = [&](const std::string& name, std::vector<std::uint64_t> shape, float scale,
                       float mean) {
    std::uint64_t count = 1;
    for (const std::uint64_t size : shape) count *= size;
    std::vector<float> values(count);
    for (float& value : values) {
      const auto uniform = static_cast<float>(random() >> 8) * 0x1p-24F;
      value = mean + scale * (2.0F * uniform - 1.0F);
    }
    if (name != leave_out) writer.add_floats(name, shape, values);
  };
  add("token_embd.weight", {kHidden, vocab_size}, 1.0F, 0.0F);
  add("output_norm.weight", {kHidden}, 0.2F, 1.0F);
  add("output.weight", {kHidden, vocab_size}, 1.0F, 0.0F);
  for (int layer = 0; layer < 2; ++layer) {
    const std::string prefix = "blk." + std::to_string(layer) + ".";
    add(prefix + "attn_norm.weight", {kHidden}, 0.2F, 1.0F);
    add(prefix + "attn_q.weight", {kHidden, kHeads * kHeadSize}, 0.4F, 0.0F);
    add(prefix + "attn_k.weight", {kHidden, kKvHeads * kHeadSize}, 0.4F, 0.0F);
    add(prefix + "attn_v.weight", {kHidden, kKvHeads * kHeadSize}, 0.4F, 0.0F);
    add(prefix + "attn_output.weight", {kHeads * kHeadSize, kHidden}, 0.4F, 0.0F);
    add(prefix + "ffn_norm.weight", {kHidden}, 0.2F, 1.0F);
    add(prefix + "ffn_gate.weight", {kHidden, kFfn}, 0.3F, 0.0F);
    add(prefix + "ffn_up.weight", {kHidden, kFfn}, 0.3F, 0.0F);
    add(prefix + "ffn_down.weight", {kFfn, kHidden}, 0.3F, 0.0F);
  }
  return writer;
}

void add_tiny_tokenizer(GgufWriter& writer, std::string_view pre) {
  std::vector<std::string> tokens;
  std::vector<std::int32_t> types;
  // GPT-2's spelling of bytes: printable ones stand for themselves, the others start at U+0100.
  int next = 0x100;
  for (int byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte != 0xAD);
    const int code = printable ? byte : next++;
    std::string token;
    if (code < 0x80) {
      token += static_cast<char>(code);
    } else {
      token += static_cast<char>(0xC0 | code >> 6);
      token += static_cast<char>(0x80 | (code & 0x3F));
    }
    tokens.push_back(token);
    types.push_back(1);
  }
  for (const char* token : {"he", "ll", "hell"}) {
    tokens.emplace_back(token);
    types.push_back(1);
  }
  for (const char* token : {"<|im_start|>", "<|im_end|>", "<|begin_of_text|>"}) {
    tokens.emplace_back(token);
    types.push_back(3);
  }
  writer.add_string("tokenizer.ggml.model", "gpt2");
  writer.add_string("tokenizer.ggml.pre", pre);
  writer.add_strings("tokenizer.ggml.tokens", tokens);
  writer.add_ints("tokenizer.ggml.token_type", types);
  writer.add_strings("tokenizer.ggml.merges", {"h e", "l l", "he ll"});
  writer.add_uint("tokenizer.ggml.eos_token_id", 260);
  writer.add_uint("tokenizer.ggml.bos_token_id", 261);
}

TinyEngine::TinyEngine(const ModelOptions& options, DeviceType device)
    : bytes_(tiny_model_writer().bytes()),
      file_(GgufFile::parse(bytes_, "tiny")),
      ops_(make_ops(device, 2)),
      model_(file_, *ops_, options),
      engine_(model_, [](std::int32_t token) { return token == 0; }) {}

void TinyEngine::run() {
  while (!engine_.done()) engine_.step();
}

std::vector<std::int32_t> TinyEngine::answer(std::int64_t request) const {
  const Sequence& sequence = engine_.sequence(request);
  return {sequence.tokens.begin() + sequence.num_prompt, sequence.tokens.end()};
}

std::vector<std::int32_t> tiny_prompt(std::size_t length, unsigned seed) {
  std::mt19937 random(seed);
  std::vector<std::int32_t> tokens(length);
  for (std::int32_t& token : tokens) token = static_cast<std::int32_t>(1 + random() % 119);
  return tokens;
}

}  // namespace quire::llm
