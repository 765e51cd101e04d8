// From the C ABI's structures (quire/quire_c.h) to the C++ ones. Only what C adds is checked here:
// null pointers, structure sizes, numbers outside an enumeration.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>

#include "quire/quire.h"
#include "quire/quire_c.h"

struct quire_thread_pool {
  std::unique_ptr<quire::ThreadPool> pool;
};

namespace quire::c_abi {

template <class T>
T& deref(T* pointer, std::string_view argument) {
  if (pointer == nullptr) throw Error(argument, "a pointer", "null");
  return *pointer;
}

template <class Enum>
Enum to_enum(std::int32_t value, Enum last, std::string_view argument,
             const std::string& what = "") {
  if (value < 0 || value > static_cast<std::int32_t>(last)) {
    throw Error(argument, what + "0 to " + std::to_string(static_cast<std::int32_t>(last)),
                std::to_string(value));
  }
  return static_cast<Enum>(value);
}

// What a structure was in its first release. Members that come later lie behind these sizes.
template <class T>
inline constexpr std::size_t kFirstSize = sizeof(T);
template <>
inline constexpr std::size_t kFirstSize<quire_attention_config> = offsetof(quire_attention_config,
                                                                           clamp_ranges);
template <>
inline constexpr std::size_t kFirstSize<quire_batch> = offsetof(quire_batch, kv_offset);

// What the _init function of a structure sets.
template <class T>
T defaults();

template <>
quire_context defaults();
template <>
quire_attention_config defaults();
template <>
quire_score defaults();
template <>
quire_batch defaults();
template <>
quire_kv_cache defaults();
template <>
quire_attention_args defaults();

TensorView to_view(const quire_tensor& tensor, const std::string& argument);
TensorView to_view(const quire_tensor* tensor, const std::string& argument);
Context to_context(const quire_context* from);
AttentionConfig to_config(const quire_attention_config* from);
CommonAttentionMetadata to_batch(const quire_batch* from);
PagedKvCache to_cache(const quire_kv_cache* from);
// `score` receives what the arguments' own score points to.
AttentionArgs to_args(const quire_attention_args* from, Score* score);

}  // namespace quire::c_abi
