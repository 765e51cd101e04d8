// From the C ABI's structures (quire/quire_c.h) to the C++ ones, and back. Only what C adds is
// checked here: null pointers, structure sizes, numbers outside an enumeration.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstring>
#include <memory>
#include <string>
#include <string_view>

#include "c_api/status.h"
#include "quire/quire.h"
#include "quire/quire_c.h"

struct quire_thread_pool {
  std::unique_ptr<quire::ThreadPool> pool;
};

namespace quire::c_api {

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

// Fills the caller's structure, which may be older (shorter) or newer (longer) than ours; a newer
// one's additional members become zero.
template <class T>
void return_struct(const T& full, T* out, std::size_t struct_size, std::string_view argument) {
  deref(out, argument);
  if (struct_size < kFirstSize<T>) {
    throw Error("struct_size", "at least " + std::to_string(kFirstSize<T>),
                std::to_string(struct_size));
  }
  std::memset(static_cast<void*>(out), 0, struct_size);
  std::memcpy(static_cast<void*>(out), &full, std::min(struct_size, sizeof full));
  std::memcpy(static_cast<void*>(out), &struct_size, sizeof struct_size);
}

// The body of an _init function.
template <class T>
quire_status init(T* out, std::size_t struct_size, std::string_view argument) noexcept {
  return guarded([&] { return_struct(defaults<T>(), out, struct_size, argument); });
}

TensorView to_view(const quire_tensor& tensor, const std::string& argument);
TensorView to_view(const quire_tensor* tensor, const std::string& argument);
quire_tensor from_view(const TensorView& view);
Context to_context(const quire_context* from);
AttentionConfig to_config(const quire_attention_config* from);
CommonAttentionMetadata to_batch(const quire_batch* from);
PagedKvCache to_cache(const quire_kv_cache* from);
// `score` receives what the arguments' own score points to.
AttentionArgs to_args(const quire_attention_args* from, Score* score);

}  // namespace quire::c_api
