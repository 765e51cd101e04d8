// The C ABI's serving layer: metadata, its builder, the layer with forward.
#include <memory>
#include <optional>
#include <string>

#include "c_api/status.h"
#include "c_api/structs.h"
#include "quire/backend.h"

struct quire_attention_metadata {
  quire::AttentionMetadata metadata;
  quire_plan scheduler_metadata;  // the metadata's plan, as it is handed out
};

struct quire_metadata_builder {
  quire::AttentionMetadataBuilder builder;
};

struct quire_attention_impl {
  quire::AttentionImpl impl;
};

namespace quire::c_api {
namespace {

void fill(quire_attention_metadata* out, AttentionMetadata&& made) {
  out->scheduler_metadata.plan = made.scheduler_metadata;
  out->metadata = std::move(made);
}

// The metadata of a call: null for a profiling run, the handle's own, or a copy in `copy` with the
// layer's slots.
const AttentionMetadata* metadata_of(const quire_forward_args& in, AttentionMetadata* copy) {
  if (in.metadata == nullptr) return nullptr;
  const ConstTensorView slot_mapping = to_view(in.slot_mapping, "slot_mapping");
  if (!slot_mapping) return &in.metadata->metadata;
  *copy = in.metadata->metadata;
  copy->slot_mapping = slot_mapping;
  return copy;
}

void forward(const AttentionImpl& impl, const quire_forward_args* from, const Context& context) {
  const quire_forward_args in = read(from, "args");
  AttentionMetadata copy;
  std::optional<Scale> output_scale;
  if (to_bool(in.has_output_scale, "has_output_scale")) output_scale = to_scale(in.output_scale);
  impl.forward(
      to_layer_scales(in.scales), to_view(in.query, "query"), to_view(in.key, "key"),
      to_view(in.value, "value"), in.kv_cache != nullptr ? to_cache(in.kv_cache) : PagedKvCache(),
      metadata_of(in, &copy), to_view(in.output, "output"), output_scale,
      to_view(in.output_block_scale, "output_block_scale"), to_view(in.lse, "lse"), context);
}

}  // namespace
}  // namespace quire::c_api

using namespace quire::c_api;  // NOLINT(google-build-using-namespace): the folder's own helpers

extern "C" {

quire_status quire_attention_metadata_create(quire_attention_metadata** metadata) {
  return guarded([&] {
    deref(metadata, "metadata") = nullptr;
    *metadata = new quire_attention_metadata;
  });
}

quire_status quire_attention_metadata_destroy(quire_attention_metadata* metadata) {
  return guarded([&] { delete metadata; });
}

quire_status quire_attention_metadata_fields_init(quire_attention_metadata_fields* fields,
                                                  size_t struct_size) {
  return init(fields, struct_size, "fields");
}

quire_status quire_attention_metadata_get(const quire_attention_metadata* metadata,
                                          quire_attention_metadata_fields* fields,
                                          size_t struct_size) {
  return guarded([&] {
    const quire_attention_metadata& from = deref(metadata, "metadata");
    quire_attention_metadata_fields full = from_metadata(from.metadata);
    if (from.metadata.scheduler_metadata != nullptr) {
      full.scheduler_metadata = &from.scheduler_metadata;
    }
    if (from.metadata.prefix_scheduler_metadata != nullptr) {
      full.prefix_scheduler_metadata = &from.scheduler_metadata;  // one plan for both
    }
    return_struct(full, fields, struct_size, "fields");
  });
}

quire_status quire_metadata_builder_create(const quire_attention_config* config,
                                           quire_metadata_builder** builder) {
  return guarded([&] {
    deref(builder, "builder") = nullptr;
    *builder = new quire_metadata_builder{quire::AttentionMetadataBuilder(to_config(config))};
  });
}

quire_status quire_metadata_builder_destroy(quire_metadata_builder* builder) {
  return guarded([&] { delete builder; });
}

quire_status quire_metadata_builder_build(quire_metadata_builder* builder,
                                          int64_t common_prefix_len, const quire_batch* batch,
                                          int32_t fast_build, const quire_context* context,
                                          quire_attention_metadata* metadata) {
  return guarded([&] {
    deref(metadata, "metadata");
    fill(metadata, deref(builder, "builder")
                       .builder.build(common_prefix_len, to_batch(batch),
                                      to_bool(fast_build, "fast_build"), to_context(context)));
  });
}

quire_status quire_metadata_builder_build_for_cudagraph_capture(
    quire_metadata_builder* builder, const quire_batch* batch, const quire_context* context,
    quire_attention_metadata* metadata) {
  return guarded([&] {
    deref(metadata, "metadata");
    fill(metadata, deref(builder, "builder")
                       .builder.build_for_cudagraph_capture(to_batch(batch), to_context(context)));
  });
}

quire_status quire_metadata_builder_plan(quire_metadata_builder* builder,
                                         const quire_attention_metadata_fields* fields,
                                         const quire_context* context,
                                         quire_attention_metadata* metadata) {
  return guarded([&] {
    deref(metadata, "metadata");
    fill(metadata,
         deref(builder, "builder").builder.plan(to_metadata(fields), to_context(context)));
  });
}

quire_status quire_attention_impl_create(const quire_attention_config* config,
                                         const char* kv_sharing_target_layer_name,
                                         quire_attention_impl** impl) {
  return guarded([&] {
    deref(impl, "impl") = nullptr;
    const char* target = kv_sharing_target_layer_name;
    *impl = new quire_attention_impl{
        quire::AttentionImpl(to_config(config), target != nullptr ? target : "")};
  });
}

quire_status quire_attention_impl_destroy(quire_attention_impl* impl) {
  return guarded([&] { delete impl; });
}

quire_status quire_layer_scales_init(quire_layer_scales* scales, size_t struct_size) {
  return init(scales, struct_size, "scales");
}

quire_status quire_forward_args_init(quire_forward_args* args, size_t struct_size) {
  return init(args, struct_size, "args");
}

quire_status quire_attention_impl_forward(const quire_attention_impl* impl,
                                          const quire_forward_args* args,
                                          const quire_context* context) {
  return guarded([&] { forward(deref(impl, "impl").impl, args, to_context(context)); });
}

quire_status quire_attention_impl_do_kv_cache_update(
    const quire_attention_impl* impl, const quire_layer_scales* scales, const quire_tensor* key,
    const quire_tensor* value, const quire_kv_cache* kv_cache, const quire_tensor* slot_mapping,
    const quire_context* context) {
  return guarded([&] {
    deref(impl, "impl")
        .impl.do_kv_cache_update(to_layer_scales(scales), to_view(key, "key"),
                                 to_view(value, "value"), to_cache(kv_cache),
                                 to_view(slot_mapping, "slot_mapping"), to_context(context));
  });
}

}  // extern "C"
