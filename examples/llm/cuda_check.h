// CUDA errors as exceptions.
#pragma once

#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

namespace quire::llm {

inline void check(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  throw std::runtime_error("CUDA: " + std::string(what) + ": " + cudaGetErrorString(error));
}

}  // namespace quire::llm
