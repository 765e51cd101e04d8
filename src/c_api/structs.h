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

struct quire_plan {
  std::shared_ptr<quire::Plan> plan;  // shared with metadata that a plan is handed out of
};

namespace quire::c_api {

// What a structure was in its first release. Members that come later lie behind these sizes.
template <class T>
inline constexpr std::size_t kFirstSize = sizeof(T);
template <>
inline constexpr std::size_t kFirstSize<quire_context> = offsetof(quire_context, backend);
template <>
inline constexpr std::size_t kFirstSize<quire_attention_config> = offsetof(quire_attention_config,
                                                                           clamp_ranges);
template <>
inline constexpr std::size_t kFirstSize<quire_batch> = offsetof(quire_batch, kv_offset);

// What the _init function of a structure sets.
template <class T>
T defaults();

// A caller's structure as this library knows it: members that the caller does not have keep their
// defaults, and members that we do not have must be zero, or we would ignore a wish.
template <class T>
T read(const T* in, std::string_view argument) {
  const std::string size_argument = std::string(argument) + ".struct_size";
  const std::size_t size = deref(in, argument).struct_size;
  if (size < kFirstSize<T>) {
    throw Error(size_argument,
                "at least " + std::to_string(kFirstSize<T>) + ", as the _init function sets it",
                std::to_string(size));
  }
  const unsigned char* bytes = reinterpret_cast<const unsigned char*>(in);
  if (size > sizeof(T) &&
      std::any_of(bytes + sizeof(T), bytes + size, [](unsigned char byte) { return byte != 0; })) {
    throw Error(size_argument,
                "a structure that this version knows (" + std::to_string(sizeof(T)) +
                    " bytes) or zeros behind it",
                std::to_string(size) + " bytes with members set that it does not know");
  }
  T out = defaults<T>();
  std::memcpy(static_cast<void*>(&out), in, std::min(size, sizeof out));
  return out;
}

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
template <>
quire_attention_metadata_fields defaults();
template <>
quire_layer_scales defaults();
template <>
quire_forward_args defaults();

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
quire_tensor from_view(const ConstTensorView& view);
Scale to_scale(const quire_scale& from);
Context to_context(const quire_context* from);
AttentionConfig to_config(const quire_attention_config* from);
CommonAttentionMetadata to_batch(const quire_batch* from);
AttentionMetadata to_metadata(const quire_attention_metadata_fields* from);
// Without the plans, which belong to the handle.
quire_attention_metadata_fields from_metadata(const AttentionMetadata& from);
LayerScales to_layer_scales(const quire_layer_scales* from);
PagedKvCache to_cache(const quire_kv_cache* from);
// `score` receives what the arguments' own score points to.
AttentionArgs to_args(const quire_attention_args* from, Score* score);

}  // namespace quire::c_api
