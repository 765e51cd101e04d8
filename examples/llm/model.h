// A Llama-architecture language model (Touvron et al., 2023) whose attention is Quire's.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <unordered_set>
#include <vector>

#include "device_ops.h"
#include "gguf.h"
#include "quire/quire.h"

namespace quire::llm {

// The sizes of a model, from the metadata of its file.
struct ModelConfig {
  // Throws ModelError if the file is no Llama model, or one with parts that are not known here.
  static ModelConfig read(const GgufFile& file);

  std::int64_t num_layers = 0;
  std::int64_t hidden_size = 0;
  std::int64_t ffn_size = 0;
  std::int64_t num_heads = 0;
  std::int64_t num_kv_heads = 0;
  std::int64_t head_size = 0;
  std::int64_t head_size_v = 0;
  std::int64_t vocab_size = 0;
  std::int64_t context_length = 0;
  std::int64_t rope_size = 0;  // leading elements of a head that are rotated
  double rope_base = 10000.0;
  double rope_scale = 1.0;  // positions are divided by it
  float norm_epsilon = 0.0F;
};

struct ModelOptions {
  std::int64_t num_blocks = 512;
  std::int64_t block_size = 16;
  KvCacheDType kv_cache_dtype = KvCacheDType::kAuto;
  std::string backend{};                // as AttentionConfig::backend
  std::int64_t max_batch_tokens = 512;  // of one forward()
  std::int64_t max_seqs = 64;
};

// One step's work in host memory: the new tokens of all sequences, back to back.
struct Batch {
  std::vector<std::int32_t> tokens;
  std::vector<std::int32_t> positions;
  std::vector<std::int64_t> slot_mapping;     // where each token's K and V go
  std::vector<std::int32_t> query_start_loc;  // [num_seqs + 1]
  std::vector<std::int32_t> seq_lens;         // after this step
  std::vector<std::int32_t> block_table;      // [num_seqs, max_blocks]
  std::int64_t max_blocks = 0;
  std::vector<std::int32_t> logit_rows;  // tokens whose logits are wanted

  std::int64_t num_tokens() const { return static_cast<std::int64_t>(tokens.size()); }
  std::int64_t num_seqs() const { return static_cast<std::int64_t>(seq_lens.size()); }
};

class Model {
 public:
  // Loads the weights and sets up the paged cache of every layer. `ops` must outlive the model.
  Model(const GgufFile& file, DeviceOps& ops, const ModelOptions& options);

  // Writes the batch's K and V into the cache, attends, and returns the logits of logit_rows,
  // [logit_rows, vocab_size], valid until the next call.
  std::span<const float> forward(const Batch& batch);

  const ModelConfig& config() const { return config_; }
  const ModelOptions& options() const { return options_; }
  std::int64_t cache_bytes() const { return cache_bytes_; }
  // Seconds that the device has spent in Quire so far: planning, cache writes and attention.
  double attention_seconds() const { return ops_.timed_seconds(); }
  const char* backend_name() const { return backend_name_; }
  // Blocks of the longest sequence that the model or the cache allows.
  std::int64_t max_blocks_per_seq() const;

 private:
  struct Layer {
    Tensor attention_norm;
    Weight qkv;  // q, k and v below each other: one product for the three
    Weight attention_output;
    Tensor ffn_norm;
    Weight gate_up;
    Weight down;
    std::vector<Tensor> cache_memory;
    PagedKvCache cache;
  };
  // Activations, for the largest batch.
  struct Workspace {
    Tensor hidden, normed, qkv, attention, gate_up, ffn, angles, last_hidden, logits;
    Tensor tokens, positions, slot_mapping, query_start_loc, seq_lens, block_table, logit_rows;
  };

  void load_weights(const GgufFile& file);
  // The tensor `name`, of this size; it counts as used.
  const GgufTensor& use(const GgufFile& file, const std::string& name,
                        const std::vector<std::int64_t>& shape);
  Tensor load_vector(const GgufFile& file, const std::string& name, std::int64_t size);
  Weight load(const GgufFile& file, const std::string& prefix,
              std::initializer_list<std::pair<const char*, std::int64_t>> parts,
              std::int64_t num_columns);
  void load_frequencies(const GgufFile& file);
  void allocate_cache(Layer& layer);
  void allocate_workspace();
  AttentionConfig attention_config() const;

  void upload(const Batch& batch);
  AttentionMetadata plan(const Batch& batch);
  void run_layer(Layer& layer, const AttentionMetadata& metadata, std::int64_t num_tokens);

  ModelConfig config_;
  ModelOptions options_;
  DeviceOps& ops_;
  AttentionImpl attention_;
  AttentionMetadataBuilder metadata_builder_;
  Weight embedding_;
  Tensor output_norm_;
  Weight output_;
  Tensor frequencies_;
  std::vector<Layer> layers_;
  Workspace space_;
  std::vector<float> logits_;
  std::unordered_set<std::string_view> used_tensors_;  // while loading
  std::int64_t cache_bytes_ = 0;
  const char* backend_name_ = "";
};

}  // namespace quire::llm
