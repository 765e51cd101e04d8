#include <cmath>

#include "model.h"

namespace quire::llm {
namespace {

std::int64_t size(const GgufFile& file, const char* key, std::int64_t most) {
  const std::int64_t value = file.integer(key);
  if (value < 1 || value > most) {
    file.fail("key \"" + std::string(key) + "\": expected 1 to " + std::to_string(most) + ", got " +
              std::to_string(value));
  }
  return value;
}

std::int64_t size_or(const GgufFile& file, const char* key, std::int64_t fallback,
                     std::int64_t most) {
  return file.has(key) ? size(file, key, most) : fallback;
}

double positive(const GgufFile& file, const char* key, double value) {
  if (!std::isfinite(value) || value <= 0.0) {
    file.fail("key \"" + std::string(key) + "\": expected a positive number, got " +
              std::to_string(value));
  }
  return value;
}

void read_rope(const GgufFile& file, ModelConfig& config) {
  config.rope_size =
      size_or(file, "llama.rope.dimension_count", config.head_size, config.head_size);
  if (config.rope_size % 2 != 0) {
    file.fail("key \"llama.rope.dimension_count\": expected an even number, got " +
              std::to_string(config.rope_size));
  }
  config.rope_base =
      positive(file, "llama.rope.freq_base", file.number_or("llama.rope.freq_base", 10000.0));
  const std::string_view scaling = file.string_or("llama.rope.scaling.type", "none");
  if (scaling == "linear") {
    config.rope_scale =
        positive(file, "llama.rope.scaling.factor", file.number("llama.rope.scaling.factor"));
  } else if (scaling != "none") {
    file.fail("key \"llama.rope.scaling.type\": expected \"none\" or \"linear\", got \"" +
              std::string(scaling) + "\"");
  } else {
    // The key of older files.
    config.rope_scale =
        positive(file, "llama.rope.scale_linear", file.number_or("llama.rope.scale_linear", 1.0));
  }
}

}  // namespace

// The upper bounds keep every product of sizes far from overflow; the tensors must match them.
ModelConfig ModelConfig::read(const GgufFile& file) {
  constexpr std::int64_t kMaxLayers = 1 << 12;
  constexpr std::int64_t kMaxWidth = 1 << 20;
  constexpr std::int64_t kMaxHeads = 1 << 12;
  constexpr std::int64_t kMaxContext = std::int64_t{1} << 30;
  const std::string_view architecture = file.string("general.architecture");
  if (architecture != "llama") {
    file.fail(
        "key \"general.architecture\": expected \"llama\", the one model family that this "
        "example computes, got \"" +
        std::string(architecture) + "\"");
  }
  if (file.integer_or("llama.expert_count", 0) != 0) {
    file.fail("key \"llama.expert_count\": expected a model without mixture of experts");
  }
  ModelConfig config;
  config.num_layers = size(file, "llama.block_count", kMaxLayers);
  config.hidden_size = size(file, "llama.embedding_length", kMaxWidth);
  config.ffn_size = size(file, "llama.feed_forward_length", kMaxWidth);
  config.num_heads = size(file, "llama.attention.head_count", kMaxHeads);
  config.num_kv_heads =
      size_or(file, "llama.attention.head_count_kv", config.num_heads, config.num_heads);
  config.context_length = size(file, "llama.context_length", kMaxContext);
  if (config.num_heads % config.num_kv_heads != 0) {
    file.fail("key \"llama.attention.head_count_kv\": expected a divisor of " +
              std::to_string(config.num_heads) + ", got " + std::to_string(config.num_kv_heads));
  }
  if (!file.has("llama.attention.key_length") && config.hidden_size % config.num_heads != 0) {
    file.fail("key \"llama.attention.head_count\": expected a divisor of the embedding length " +
              std::to_string(config.hidden_size) + ", got " + std::to_string(config.num_heads));
  }
  config.head_size =
      size_or(file, "llama.attention.key_length", config.hidden_size / config.num_heads, kMaxWidth);
  config.head_size_v = size_or(file, "llama.attention.value_length", config.head_size, kMaxWidth);
  config.norm_epsilon =
      static_cast<float>(positive(file, "llama.attention.layer_norm_rms_epsilon",
                                  file.number("llama.attention.layer_norm_rms_epsilon")));
  const GgufTensor* embedding = file.find_tensor("token_embd.weight");
  if (embedding == nullptr) file.fail("expected a tensor \"token_embd.weight\", got none");
  config.vocab_size = embedding->num_rows();
  read_rope(file, config);
  return config;
}

}  // namespace quire::llm
