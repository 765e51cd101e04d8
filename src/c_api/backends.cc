// The C ABI's backends: what a build has and what it can do.
#include <algorithm>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "c_api/status.h"
#include "c_api/structs.h"
#include "quire/backend.h"

namespace quire::c_api {
namespace {

std::size_t checked_index(std::int32_t index, std::size_t count, std::string_view argument) {
  if (index < 0 || static_cast<std::size_t>(index) >= count) {
    throw Error(argument, "a number below " + std::to_string(count), std::to_string(index));
  }
  return static_cast<std::size_t>(index);
}

const AttentionBackend& backend_at(std::int32_t index) {
  const std::vector<const AttentionBackend*>& backends = attention_backends();
  return *backends[checked_index(index, backends.size(), "backend")];
}

// Kept, so that their texts can be handed out.
const std::vector<KernelInfo>& kernels_of(std::int32_t backend) {
  static const std::vector<std::vector<KernelInfo>> tables = [] {
    std::vector<std::vector<KernelInfo>> made;
    for (const AttentionBackend* each : attention_backends()) made.push_back(each->kernel_table());
    return made;
  }();
  return tables[checked_index(backend, tables.size(), "backend")];
}

template <class Enum>
std::uint64_t set_of(const std::vector<Enum>& values) {
  std::uint64_t bits = 0;
  for (const Enum value : values) bits |= std::uint64_t{1} << static_cast<unsigned>(value);
  return bits;
}

quire_capabilities from_capabilities(const BackendCapabilities& from) {
  quire_capabilities to{};
  to.dtypes = set_of(from.dtypes);
  to.kv_cache_dtypes = set_of(from.kv_cache_dtypes);
  to.output_dtypes = set_of(from.output_dtypes);
  to.min_head_size = from.min_head_size;
  to.max_head_size = from.max_head_size;
  to.head_size_multiple = from.head_size_multiple;
  to.block_size_multiple = from.block_size_multiple;
  to.max_block_size = from.max_block_size;
  to.sinks = from.sinks;
  to.alibi = from.alibi;
  to.soft_cap = from.soft_cap;
  to.sliding_window = from.sliding_window;
  to.chunked = from.chunked;
  to.bidirectional_ranges = from.bidirectional_ranges;
  to.visible_prefix = from.visible_prefix;
  to.qq_bias = from.qq_bias;
  to.cross_attention = from.cross_attention;
  to.encoder_attention = from.encoder_attention;
  to.cascade = from.cascade;
  to.lse = from.lse;
  to.fp8_output = from.fp8_output;
  to.block_scale_output = from.block_scale_output;
  to.batch_invariant = from.batch_invariant;
  to.graph_capture = from.graph_capture;
  return to;
}

}  // namespace
}  // namespace quire::c_api

using namespace quire::c_api;  // NOLINT(google-build-using-namespace): the folder's own helpers

extern "C" {

quire_status quire_backend_count(int32_t* count) {
  return guarded([&] {
    deref(count, "count") = static_cast<std::int32_t>(quire::attention_backends().size());
  });
}

quire_status quire_backend_name(int32_t backend, const char** name) {
  return guarded([&] { deref(name, "name") = backend_at(backend).name(); });
}

quire_status quire_backend_find(const char* name, int32_t* backend) {
  return guarded([&] {
    deref(name, "name");
    const quire::AttentionBackend* found = &quire::attention_backend(name);
    const auto& backends = quire::attention_backends();
    std::int32_t index = 0;
    while (backends[static_cast<std::size_t>(index)] != found) ++index;
    deref(backend, "backend") = index;
  });
}

quire_status quire_backend_device_type(int32_t backend, int32_t* device_type) {
  return guarded([&] {
    deref(device_type, "device_type") =
        static_cast<std::int32_t>(backend_at(backend).device_type());
  });
}

quire_status quire_backend_available(int32_t backend, int32_t* available) {
  return guarded([&] { deref(available, "available") = backend_at(backend).available() ? 1 : 0; });
}

quire_status quire_backend_instruction_set(int32_t backend, char* text, size_t capacity,
                                           size_t* length) {
  return guarded(
      [&] { return_text(backend_at(backend).instruction_set(), text, capacity, length); });
}

quire_status quire_backend_supports(int32_t backend, const quire_attention_config* config,
                                    char* text, size_t capacity, size_t* length) {
  return guarded([&] {
    std::string lines;
    for (const std::string& reason : backend_at(backend).supports(to_config(config))) {
      if (!lines.empty()) lines += '\n';
      lines += reason;
    }
    return_text(lines, text, capacity, length);
  });
}

quire_status quire_backend_capabilities(int32_t backend, quire_capabilities* capabilities,
                                        size_t struct_size) {
  return guarded([&] {
    return_struct(from_capabilities(backend_at(backend).capabilities()), capabilities, struct_size,
                  "capabilities");
  });
}

quire_status quire_backend_kernel_count(int32_t backend, int32_t* count) {
  return guarded(
      [&] { deref(count, "count") = static_cast<std::int32_t>(kernels_of(backend).size()); });
}

quire_status quire_backend_kernel(int32_t backend, int32_t kernel, const char** name,
                                  const char** serves) {
  return guarded([&] {
    const std::vector<quire::KernelInfo>& kernels = kernels_of(backend);
    const quire::KernelInfo& info = kernels[checked_index(kernel, kernels.size(), "kernel")];
    deref(name, "name") = info.name.c_str();
    if (serves != nullptr) *serves = info.serves.c_str();
  });
}

quire_status quire_backend_validate_head_size(int32_t backend, int64_t head_size) {
  return guarded([&] { backend_at(backend).validate_head_size(head_size); });
}

quire_status quire_backend_kv_cache_shape(int32_t backend, int64_t num_blocks, int64_t block_size,
                                          int64_t num_kv_heads, int64_t head_size,
                                          const char* cache_dtype_str, int64_t* shape,
                                          int32_t* ndim) {
  return guarded([&] {
    const std::vector<std::int64_t> sizes =
        backend_at(backend).kv_cache_shape(num_blocks, block_size, num_kv_heads, head_size,
                                           cache_dtype_str != nullptr ? cache_dtype_str : "auto");
    deref(shape, "shape");
    deref(ndim, "ndim") = static_cast<std::int32_t>(sizes.size());
    std::copy(sizes.begin(), sizes.end(), shape);
  });
}

}  // extern "C"
