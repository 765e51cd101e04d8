// libFuzzer: arbitrary bytes as a model file, through everything that reads one. Only the
// exceptions that users are told about may come out.
#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "examples/llm/chat_template.h"
#include "examples/llm/dequantize.h"
#include "examples/llm/gguf.h"
#include "examples/llm/model.h"
#include "examples/llm/tokenizer.h"

namespace {

using quire::llm::ModelError;

template <class Read>
void tolerate_model_error(const Read& read) {
  try {
    read();
  } catch (const ModelError&) {
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  using namespace quire::llm;
  tolerate_model_error([&] {
    const GgufFile file = GgufFile::parse(std::as_bytes(std::span(data, size)), "fuzz");
    for (const GgufTensor& tensor : file.tensors()) {
      // A row fits the input many times over only if the file is as large as it claims.
      std::vector<float> row(static_cast<std::size_t>(tensor.row_size()));
      dequantize_rows(tensor, tensor.num_rows() - 1, tensor.num_rows(), row.data());
    }
    tolerate_model_error([&] { ModelConfig::read(file); });
    tolerate_model_error([&] {
      const ChatTemplate chat(file);
      const ChatMessage message{"user", "Hello, world! 123"};
      const std::vector<TextPiece> prompt = chat.render({&message, 1});
      const Tokenizer tokenizer(file);
      for (const std::int32_t token : tokenizer.encode(prompt)) tokenizer.bytes(token);
    });
  });
  return 0;
}
