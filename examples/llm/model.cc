#include "model.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <stdexcept>
#include <utility>

namespace quire::llm {
namespace {

// The first `rows` rows, or elements of a vector.
TensorView first_rows(const Tensor& tensor, std::int64_t rows) {
  return tensor.view.slice(0, 0, rows);
}

// Columns from `column` on of a matrix, seen as [rows, num_heads, head_size].
TensorView heads(const TensorView& matrix, std::int64_t column, std::int64_t num_heads,
                 std::int64_t head_size) {
  return {static_cast<char*>(matrix.data) + column * size_of(matrix.dtype),
          matrix.dtype,
          {matrix.shape[0], num_heads, head_size},
          {matrix.strides[0], head_size, 1},
          matrix.device};
}

template <class T>
void upload_vector(DeviceOps& ops, const std::vector<T>& values, const Tensor& tensor) {
  if (values.empty()) return;  // of a step that wants no logits, and then without an address
  ops.upload(values.data(), values.size() * sizeof(T), tensor.view.data);
}

}  // namespace

Model::Model(const GgufFile& file, DeviceOps& ops, const ModelOptions& options)
    : config_(ModelConfig::read(file)),
      options_(options),
      ops_(ops),
      attention_(attention_config()),
      metadata_builder_(attention_config()) {
  load_weights(file);
  for (Layer& layer : layers_) allocate_cache(layer);
  allocate_workspace();
}

AttentionConfig Model::attention_config() const {
  AttentionConfig config;
  config.device = ops_.device();
  config.dtype = ops_.dtype();
  config.num_heads = config_.num_heads;
  config.num_kv_heads = config_.num_kv_heads;
  config.head_size = config_.head_size;
  config.head_size_v = config_.head_size_v;
  config.block_size = options_.block_size;
  config.kv_cache_dtype = options_.kv_cache_dtype;
  config.backend = options_.backend;
  return config;
}

std::int64_t Model::max_blocks_per_seq() const {
  const std::int64_t longest =
      (config_.context_length + options_.block_size - 1) / options_.block_size;
  return std::min(longest, options_.num_blocks);
}

// ---------------------------------------------------------------------------------------------
// Loading

const GgufTensor& Model::use(const GgufFile& file, const std::string& name,
                             const std::vector<std::int64_t>& shape) {
  const GgufTensor& tensor = file.tensor(name, shape);
  used_tensors_.insert(tensor.name);
  return tensor;
}

Tensor Model::load_vector(const GgufFile& file, const std::string& name, std::int64_t size) {
  return ops_.load_vector(use(file, name, {size}));
}

Weight Model::load(const GgufFile& file, const std::string& prefix,
                   std::initializer_list<std::pair<const char*, std::int64_t>> parts,
                   std::int64_t num_columns) {
  std::vector<const GgufTensor*> tensors;
  for (const auto& [name, num_rows] : parts) {
    tensors.push_back(&use(file, prefix + name, {num_columns, num_rows}));
  }
  return ops_.load_weight(tensors);
}

void Model::load_weights(const GgufFile& file) {
  const ModelConfig& c = config_;
  embedding_ = load(file, "", {{"token_embd.weight", c.vocab_size}}, c.hidden_size);
  output_norm_ = load_vector(file, "output_norm.weight", c.hidden_size);
  // A model without an output matrix uses its embedding again.
  output_ = file.find_tensor("output.weight") == nullptr
                ? embedding_
                : load(file, "", {{"output.weight", c.vocab_size}}, c.hidden_size);
  load_frequencies(file);
  layers_.resize(static_cast<std::size_t>(c.num_layers));
  for (std::size_t i = 0; i < layers_.size(); ++i) {
    const std::string prefix = "blk." + std::to_string(i) + ".";
    Layer& layer = layers_[i];
    layer.attention_norm = load_vector(file, prefix + "attn_norm.weight", c.hidden_size);
    layer.qkv = load(file, prefix,
                     {{"attn_q.weight", c.num_heads * c.head_size},
                      {"attn_k.weight", c.num_kv_heads * c.head_size},
                      {"attn_v.weight", c.num_kv_heads * c.head_size_v}},
                     c.hidden_size);
    layer.attention_output =
        load(file, prefix, {{"attn_output.weight", c.hidden_size}}, c.num_heads * c.head_size_v);
    layer.ffn_norm = load_vector(file, prefix + "ffn_norm.weight", c.hidden_size);
    layer.gate_up =
        load(file, prefix, {{"ffn_gate.weight", c.ffn_size}, {"ffn_up.weight", c.ffn_size}},
             c.hidden_size);
    layer.down = load(file, prefix, {{"ffn_down.weight", c.hidden_size}}, c.ffn_size);
  }
  // A tensor that nobody asked for, a bias for example, means that the model computes something
  // else than what is done here. Tables of rotations are the exception: they can be derived.
  for (const GgufTensor& tensor : file.tensors()) {
    const bool derived =
        tensor.name.ends_with("rot_embd") || tensor.name.ends_with("rot_embd.weight");
    if (!used_tensors_.contains(tensor.name) && !derived) {
      file.fail("expected the tensors of a plain Llama model, got also \"" +
                std::string(tensor.name) + "\"");
    }
  }
  used_tensors_.clear();
}

void Model::load_frequencies(const GgufFile& file) {
  const std::int64_t pairs = config_.rope_size / 2;
  // Llama 3.1 stretches each wavelength by a factor of its own.
  std::vector<float> factors(static_cast<std::size_t>(pairs), 1.0F);
  if (file.find_tensor("rope_freqs.weight") != nullptr) {
    const GgufTensor& tensor = use(file, "rope_freqs.weight", {pairs});
    if (tensor.type != GgmlType::kF32) file.fail("tensor \"rope_freqs.weight\": expected F32");
    std::copy_n(reinterpret_cast<const float*>(tensor.data.data()), pairs, factors.begin());
  }
  std::vector<float> frequencies;
  for (std::int64_t i = 0; i < pairs; ++i) {
    const double exponent = -2.0 * static_cast<double>(i) / static_cast<double>(config_.rope_size);
    frequencies.push_back(static_cast<float>(
        std::pow(config_.rope_base, exponent) /
        (config_.rope_scale * static_cast<double>(factors[static_cast<std::size_t>(i)]))));
  }
  frequencies_ = ops_.allocate(DType::kFloat32, std::array{pairs});
  upload_vector(ops_, frequencies, frequencies_);
}

void Model::allocate_cache(Layer& layer) {
  const DType dtype = storage_dtype(options_.kv_cache_dtype, ops_.dtype());
  const auto add = [&](DType type, std::initializer_list<std::int64_t> tail) {
    std::vector<std::int64_t> shape{options_.num_blocks, options_.block_size, config_.num_kv_heads};
    shape.insert(shape.end(), tail);
    layer.cache_memory.push_back(ops_.allocate(type, shape));
    const TensorView& view = layer.cache_memory.back().view;
    cache_bytes_ += view.num_elements() * size_of(type);
    return view;
  };
  layer.cache.key = add(dtype, {stored_head_size(options_.kv_cache_dtype, config_.head_size)});
  layer.cache.value = add(dtype, {stored_head_size(options_.kv_cache_dtype, config_.head_size_v)});
  layer.cache.dtype = options_.kv_cache_dtype;
  if (is_per_token_head(options_.kv_cache_dtype)) {
    layer.cache.k_scale_cache = add(DType::kFloat32, {});
    layer.cache.v_scale_cache = add(DType::kFloat32, {});
  }
}

void Model::allocate_workspace() {
  const ModelConfig& c = config_;
  const std::int64_t tokens = options_.max_batch_tokens;
  const std::int64_t seqs = options_.max_seqs;
  const auto matrix = [&](std::int64_t rows, std::int64_t cols) {
    return ops_.allocate(ops_.dtype(), std::array{rows, cols});
  };
  const auto vector = [&](DType dtype, std::int64_t size) {
    return ops_.allocate(dtype, std::array{size});
  };
  space_.hidden = matrix(tokens, c.hidden_size);
  space_.normed = matrix(tokens, c.hidden_size);
  space_.qkv = matrix(tokens, layers_.front().qkv.num_rows());
  space_.attention = matrix(tokens, c.num_heads * c.head_size_v);
  space_.gate_up = matrix(tokens, 2 * c.ffn_size);
  space_.ffn = matrix(tokens, c.ffn_size);
  space_.last_hidden = matrix(seqs, c.hidden_size);
  space_.logits = ops_.allocate(DType::kFloat32, std::array{seqs, c.vocab_size});
  space_.angles = ops_.allocate(DType::kFloat32, std::array{tokens, c.rope_size});
  space_.tokens = vector(DType::kInt32, tokens);
  space_.positions = vector(DType::kInt32, tokens);
  space_.slot_mapping = vector(DType::kInt64, tokens);
  space_.query_start_loc = vector(DType::kInt32, seqs + 1);
  space_.seq_lens = vector(DType::kInt32, seqs);
  space_.block_table = vector(DType::kInt32, seqs * max_blocks_per_seq());
  space_.logit_rows = vector(DType::kInt32, seqs);
  logits_.resize(static_cast<std::size_t>(seqs * c.vocab_size));
}

// ---------------------------------------------------------------------------------------------
// A step

void Model::upload(const Batch& batch) {
  if (batch.num_tokens() > options_.max_batch_tokens || batch.num_seqs() > options_.max_seqs ||
      batch.max_blocks > max_blocks_per_seq()) {
    throw std::invalid_argument(
        "batch: expected at most " + std::to_string(options_.max_batch_tokens) + " tokens of " +
        std::to_string(options_.max_seqs) + " sequences, got " +
        std::to_string(batch.num_tokens()) + " of " + std::to_string(batch.num_seqs()));
  }
  upload_vector(ops_, batch.tokens, space_.tokens);
  upload_vector(ops_, batch.positions, space_.positions);
  upload_vector(ops_, batch.slot_mapping, space_.slot_mapping);
  upload_vector(ops_, batch.query_start_loc, space_.query_start_loc);
  upload_vector(ops_, batch.seq_lens, space_.seq_lens);
  upload_vector(ops_, batch.block_table, space_.block_table);
  upload_vector(ops_, batch.logit_rows, space_.logit_rows);
}

AttentionMetadata Model::plan(const Batch& batch) {
  CommonAttentionMetadata common;
  common.query_start_loc = first_rows(space_.query_start_loc, batch.num_seqs() + 1);
  common.seq_lens = first_rows(space_.seq_lens, batch.num_seqs());
  common.block_table = {space_.block_table.view.data,
                        DType::kInt32,
                        {batch.num_seqs(), batch.max_blocks},
                        ops_.device()};
  common.slot_mapping = first_rows(space_.slot_mapping, batch.num_tokens());
  common.num_actual_tokens = batch.num_tokens();
  for (std::size_t i = 0; i < batch.seq_lens.size(); ++i) {
    const std::int64_t query_len = batch.query_start_loc[i + 1] - batch.query_start_loc[i];
    common.max_query_len = std::max(common.max_query_len, query_len);
    common.max_seq_len = std::max(common.max_seq_len, std::int64_t{batch.seq_lens[i]});
  }
  ops_.begin_timed();
  AttentionMetadata metadata = metadata_builder_.build(0, common, false, ops_.context());
  ops_.end_timed();
  backend_name_ = metadata.scheduler_metadata->backend_name();
  return metadata;
}

void Model::run_layer(Layer& layer, const AttentionMetadata& metadata, std::int64_t num_tokens) {
  const ModelConfig& c = config_;
  const TensorView hidden = first_rows(space_.hidden, num_tokens);
  const TensorView normed = first_rows(space_.normed, num_tokens);
  const TensorView qkv = first_rows(space_.qkv, num_tokens);
  const TensorView attention = first_rows(space_.attention, num_tokens);
  const TensorView gate_up = first_rows(space_.gate_up, num_tokens);
  const TensorView ffn = first_rows(space_.ffn, num_tokens);

  ops_.rms_norm(hidden, layer.attention_norm.view, c.norm_epsilon, normed);
  ops_.linear(normed, layer.qkv, qkv);
  ops_.rope(heads(qkv, 0, c.num_heads + c.num_kv_heads, c.head_size),
            first_rows(space_.angles, num_tokens));

  const std::int64_t key_column = c.num_heads * c.head_size;
  const std::int64_t value_column = key_column + c.num_kv_heads * c.head_size;
  ops_.begin_timed();
  attention_.forward({}, heads(qkv, 0, c.num_heads, c.head_size),
                     heads(qkv, key_column, c.num_kv_heads, c.head_size),
                     heads(qkv, value_column, c.num_kv_heads, c.head_size_v), layer.cache,
                     &metadata, heads(attention, 0, c.num_heads, c.head_size_v), std::nullopt, {},
                     {}, ops_.context());
  ops_.end_timed();

  ops_.linear_add(attention, layer.attention_output, hidden);
  ops_.rms_norm(hidden, layer.ffn_norm.view, c.norm_epsilon, normed);
  ops_.linear(normed, layer.gate_up, gate_up);
  ops_.swiglu(gate_up, ffn);
  ops_.linear_add(ffn, layer.down, hidden);
}

std::span<const float> Model::forward(const Batch& batch) {
  upload(batch);
  const AttentionMetadata metadata = plan(batch);
  const std::int64_t num_tokens = batch.num_tokens();
  ops_.embed(embedding_, first_rows(space_.tokens, num_tokens),
             first_rows(space_.hidden, num_tokens));
  ops_.rope_angles(first_rows(space_.positions, num_tokens), frequencies_.view,
                   first_rows(space_.angles, num_tokens));
  for (Layer& layer : layers_) run_layer(layer, metadata, num_tokens);

  const auto wanted = static_cast<std::int64_t>(batch.logit_rows.size());
  if (wanted == 0) return {};
  const TensorView last = first_rows(space_.last_hidden, wanted);
  const TensorView logits = first_rows(space_.logits, wanted);
  ops_.gather_rows(space_.hidden.view, first_rows(space_.logit_rows, wanted), last);
  ops_.rms_norm(last, output_norm_.view, config_.norm_epsilon, last);
  ops_.linear(last, output_, logits);
  const auto count = static_cast<std::size_t>(wanted * config_.vocab_size);
  ops_.download(logits.data, count * sizeof(float), logits_.data());
  return {logits_.data(), count};
}

}  // namespace quire::llm
