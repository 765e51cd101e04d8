// A Llama model with random weights that fits a test: 2 layers, 4 heads on 2 kv heads of 16.
#pragma once

#include <cstddef>
#include <memory>
#include <vector>

#include "examples/llm/device_ops.h"
#include "examples/llm/engine.h"
#include "examples/llm/gguf.h"
#include "examples/llm/model.h"
#include "tests/llm/gguf_writer.h"

namespace quire::llm {

constexpr std::int64_t kTinyVocab = 120;
constexpr std::int64_t kTinyContext = 256;

constexpr std::int64_t kTinyTokenizerVocab = 262;

// Without the tensor "token_embd.weight" or others if `leave_out` names one.
GgufWriter tiny_model_writer(std::string_view leave_out = {}, std::int64_t vocab = kTinyVocab);

// A byte-level vocabulary of the 256 bytes, "he", "ll", "hell" and three special tokens:
// kTinyTokenizerVocab.
void add_tiny_tokenizer(GgufWriter& writer, std::string_view pre = "gpt-2");

// The model, what it stands on, and an engine over it.
class TinyEngine {
 public:
  explicit TinyEngine(const ModelOptions& options, DeviceType device = DeviceType::kCpu);

  Engine& operator*() { return engine_; }
  Engine* operator->() { return &engine_; }

  // Runs until all is done.
  void run();
  // What was generated for the request.
  std::vector<std::int32_t> answer(std::int64_t request) const;

 private:
  std::vector<std::byte> bytes_;
  GgufFile file_;
  std::unique_ptr<DeviceOps> ops_;
  Model model_;
  Engine engine_;
};

// A prompt of pseudo-random tokens.
std::vector<std::int32_t> tiny_prompt(std::size_t length, unsigned seed);

}  // namespace quire::llm
