// Turns stored weights into float32.
#pragma once

#include <cstdint>

#include "gguf.h"

namespace quire::llm {

// Writes rows [begin, end) of `tensor` to `out`, row after row, exactly: each result is the float32
// nearest to scale * quant (+ minimum) as ggml computes it.
void dequantize_rows(const GgufTensor& tensor, std::int64_t begin, std::int64_t end, float* out);

}  // namespace quire::llm
