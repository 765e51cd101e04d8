// Reads safetensors files: an 8-byte length, a JSON header, the tensors' bytes.
#pragma once

#include <map>
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "conformance/tensor.h"

namespace quire::conformance {

struct Safetensors {
  nlohmann::json metadata;  // the header's __metadata__, values are strings
  std::map<std::string, Tensor> tensors;
};

// Every offset, shape and dtype is checked against the file; throws std::runtime_error saying what
// is wrong with which tensor.
Safetensors read_safetensors(const std::string& path);
Safetensors parse_safetensors(const std::string& name, const std::vector<char>& file);

}  // namespace quire::conformance
