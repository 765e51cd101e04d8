// What "correct" means, runnable: float64, one row at a time, plain loops over semantics/.
//
//   for each sequence, query row, head:  logits -> softmax -> weighted sum of value rows
//
// Slow on purpose: nothing here is tiled, split or vectorised.
#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include "backend.h"
#include "semantics/kv_address.h"
#include "semantics/kv_element.h"
#include "semantics/kv_row.h"
#include "semantics/merge_row.h"
#include "semantics/quant.h"
#include "semantics/softmax_state.h"

namespace quire::reference {
namespace {

using semantics::SoftmaxState;
using semantics::Spans;
using semantics::value_of;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

struct DoubleOps {
  double mul(double a, double b) const { return a * b; }
  double add(double a, double b) const { return a + b; }
  double neg(double a) const { return -a; }
  double max(double a, double b) const { return a > b ? a : b; }
  double sqrt(double a) const { return std::sqrt(a); }
  double tanh(double a) const { return std::tanh(a); }
  double zero() const { return 0.0; }
};

#include "semantics/score.inc"

// K or V of one key: its elements and their scale. int4: rotated.
struct KvRow {
  const void* row = nullptr;  // null: in an unmapped block, reads as zeros
  DType dtype = DType::kNone;
  semantics::KvScale scale;
  double operator[](std::int64_t i) const {
    if (row == nullptr) return 0.0;
    return double{scale.scale} * semantics::load_kv_element(row, dtype, scale.zero, i);
  }
};

class Row {
 public:
  Row(const AttentionParams& p, std::int32_t s, std::int64_t row, std::int32_t head)
      : p_(p),
        layer_(p.layer),
        seq_(sequence_at(layer_, p.batch, p.num_kv_tokens, s)),
        seq_index_(s),
        row_(row),
        head_(head),
        q_pos_(seq_.position(row)) {
    const char* query =
        static_cast<const char*>(p_.query) +
        (row_ * p_.query_token_stride + head_ * p_.query_head_stride) * size_of(layer_.dtype);
    for (std::int64_t i = 0; i < layer_.head_size; ++i) {
      query_.push_back(semantics::load_element(query, layer_.dtype, i));
    }
    if (p_.k.dtype == semantics::kInt4) {
      semantics::rotate_query<semantics::OneThread>(query_.data(), layer_.head_size);
    }
  }

  void run(std::vector<double>* output, double* lse) {
    const Spans visible = semantics::row_spans(seq_.mask, q_pos_);
    SoftmaxState<double> state;
    for (std::int64_t j = 0; j < seq_.mask.kv_len; ++j) {
      if (visible.contains(j)) state.max = std::max(state.max, logit(j));
    }
    const double shift = semantics::softmax_shift(state.max);
    output->assign(static_cast<std::size_t>(layer_.head_size_v), 0.0);
    for (std::int64_t j = 0; j < seq_.mask.kv_len; ++j) {
      if (!visible.contains(j)) continue;
      const double s = logit(j);
      if (s == -kInfinity) continue;
      const double weight = std::exp(s - shift);
      state.sum += weight;
      const KvRow value = side(p_.v, j);
      for (std::int64_t i = 0; i < layer_.head_size_v; ++i) (*output)[i] += weight * value[i];
    }
    const bool has_sink = layer_.sinks != nullptr;
    const auto normalised =
        semantics::normalise(state, has_sink, has_sink ? double{layer_.sinks[head_]} : 0.0);
    for (double& x : *output) x *= normalised.output_scale;
    if (p_.v.dtype == semantics::kInt4) {
      semantics::rotate_output<semantics::OneThread>(output->data(), layer_.head_size_v);
    }
    *lse = normalised.lse;
  }

 private:
  KvRow side(const KvParams& kv, std::int64_t j) const {
    const std::int32_t kv_head = head_ / layer_.group;
    std::int64_t block = 0;
    std::int64_t slot = seq_.first_kv_row + j;
    if (layer_.paged) {
      block = semantics::physical_block(p_.batch.block_table + seq_index_ * p_.batch.table_stride,
                                        p_.batch.table_width, j / layer_.block_size, p_.num_blocks);
      slot = j % layer_.block_size;
      if (block < 0) return {};
    }
    const char* data = static_cast<const char*>(kv.data);
    const std::int64_t offset = semantics::cache_offset(kv.strides, block, slot, kv_head);
    const std::int64_t scale_offset =
        semantics::cache_offset(kv.token_scale_strides, block, slot, kv_head);
    const semantics::KvScale scale =
        kv.token_scales == nullptr
            ? semantics::KvScale{value_of(kv.scale), 0.0F}
            : semantics::KvScale::of_token(kv.token_scales[scale_offset], kv.dtype);
    return {data + offset * size_of(kv.dtype), kv.dtype, scale};
  }

  double logit(std::int64_t j) const {
    const DoubleOps ops;
    const KvRow key = side(p_.k, j);
    double dot = 0.0;
    for (std::int64_t i = 0; i < layer_.head_size; ++i) dot += query_[i] * key[i];
    double s = double{layer_.softmax_scale} * value_of(p_.q_scale) * dot;
    if (layer_.soft_cap > 0) {
      s = soft_cap(ops, s, double{layer_.soft_cap}, 1.0 / layer_.soft_cap);
    }
    if (layer_.alibi_slopes != nullptr) {
      const double slope = layer_.alibi_slopes[head_];
      const auto distance = static_cast<double>(seq_.mask.position(j) - q_pos_);
      s = layer_.alibi_sqrt ? alibi_sqrt(ops, s, slope, distance) : alibi(ops, s, slope, distance);
    }
    // A bias of -inf hides the key, as the mask does, whatever its score.
    const double bias = qq_bias(j);
    return bias == -kInfinity ? bias : s + bias;
  }

  double qq_bias(std::int64_t j) const {
    const BatchParams& batch = p_.batch;
    const std::int64_t i = row_ - seq_.first_row;
    const std::int64_t n = j - seq_.context_len;
    if (batch.qq_bias == nullptr || i >= batch.qq_size || n < 0 || n >= batch.qq_size) return 0.0;
    return batch.qq_bias[seq_index_ * batch.qq_seq_stride + i * batch.qq_row_stride + n];
  }

  const AttentionParams& p_;
  const LayerParams& layer_;
  const Sequence seq_;
  const std::int32_t seq_index_;
  const std::int64_t row_;
  const std::int32_t head_;
  const std::int64_t q_pos_;
  std::vector<double> query_;
};

void* output_row(const AttentionParams& p, std::int64_t row, std::int32_t head) {
  return static_cast<char*>(p.output) +
         (row * p.output_token_stride + head * p.output_head_stride) * size_of(p.output_dtype);
}

// One token's heads, [num_heads, head_size_v], to the output's dtype.
void store_token(const AttentionParams& p, std::int64_t row, const std::vector<double>& token) {
  const std::int64_t size = p.layer.head_size_v;
  const std::int64_t total = static_cast<std::int64_t>(token.size());
  const double fixed = p.has_output_scale ? value_of(p.output_scale) : 1.0;
  for (std::int64_t begin = 0; begin < total; begin += semantics::kOutputGroup) {
    const std::int64_t end = std::min(begin + semantics::kOutputGroup, total);
    double scale = fixed;
    if (p.block_scales != nullptr) {
      float absmax = 0.0F;
      for (std::int64_t i = begin; i < end; ++i) {
        absmax = std::max(absmax, static_cast<float>(std::fabs(token[i])));
      }
      const float group_scale = semantics::block_output_scale(absmax);
      p.block_scales[row * p.block_scales_token_stride +
                     begin / semantics::kOutputGroup * p.block_scales_group_stride] = group_scale;
      scale = group_scale;
    }
    for (std::int64_t i = begin; i < end; ++i) {
      semantics::store_element(output_row(p, row, static_cast<std::int32_t>(i / size)),
                               p.output_dtype, i % size, static_cast<float>(token[i] / scale));
    }
  }
}

void run_attention(const AttentionParams& p) {
  const LayerParams& layer = p.layer;
  std::vector<double> token;
  std::vector<double> head_output;
  std::int64_t next_row = 0;  // where wild row offsets overlap, a row is the first sequence's
  for (std::int32_t s = 0; s < p.batch.num_seqs; ++s) {
    const Sequence seq = sequence_at(layer, p.batch, p.num_kv_tokens, s);
    if (seq.query_len == 0) continue;  // whatever its offset says, it has no row
    const std::int64_t first_row = std::max(seq.first_row, next_row);
    next_row = std::max(next_row, seq.first_row + seq.query_len);
    for (std::int64_t row = first_row; row < seq.first_row + seq.query_len; ++row) {
      token.clear();
      for (std::int32_t head = 0; head < layer.num_heads; ++head) {
        double lse = -kInfinity;
        Row(p, s, row, head).run(&head_output, &lse);
        token.insert(token.end(), head_output.begin(), head_output.end());
        if (p.lse != nullptr) {
          p.lse[head * p.lse_head_stride + row * p.lse_token_stride] = static_cast<float>(lse);
        }
      }
      store_token(p, row, token);
    }
  }
}

void write_side(const CacheWriteParams& p, const KvParams& kv, const void* x,
                std::int64_t token_stride, std::int64_t head_stride, std::int64_t size,
                std::int64_t token, std::int64_t slot) {
  for (std::int32_t head = 0; head < p.num_kv_heads; ++head) {
    const std::int64_t block = slot / p.block_size;
    const std::int64_t offset = slot % p.block_size;
    float* token_scale = kv.token_scales == nullptr
                             ? nullptr
                             : kv.token_scales + semantics::cache_offset(kv.token_scale_strides,
                                                                         block, offset, head);
    semantics::store_kv_row(
        static_cast<const char*>(x) +
            (token * token_stride + head * head_stride) * size_of(p.dtype),
        p.dtype, size,
        static_cast<char*>(kv.data) +
            semantics::cache_offset(kv.strides, block, offset, head) * size_of(kv.dtype),
        kv.dtype, value_of(kv.scale), token_scale);
  }
}

// Nothing to plan: cascade and splits change how outputs are computed, not what they are.
class ReferencePlan final : public LayerPlan {
 public:
  void update(const BatchParams&, const Context&) override {}
  void attention(const AttentionParams& params, const Context&) override { run_attention(params); }
  std::int64_t workspace_bytes() const override { return 0; }
  std::string to_string() const override { return "reference: one row at a time\n"; }
};

class ReferenceBackend final : public Backend {
 public:
  const char* name() const override { return "reference"; }
  DeviceType device_type() const override { return DeviceType::kCpu; }
  int num_devices() const override { return 1; }
  std::string instruction_set() const override { return "float64"; }
  const BackendCapabilities& capabilities() const override {
    static const BackendCapabilities caps = full_capabilities();
    return caps;
  }
  std::unique_ptr<LayerPlan> make_plan(const LayerParams&) const override {
    return std::make_unique<ReferencePlan>();
  }

  void cache_write(const CacheWriteParams& p, const Context&) const override {
    for (std::int64_t token = 0; token < p.num_slots; ++token) {
      const std::int64_t slot = p.slot_mapping[token];
      if (slot < 0 || slot >= p.num_blocks * p.block_size) continue;
      write_side(p, p.k, p.key, p.key_token_stride, p.key_head_stride, p.head_size, token, slot);
      write_side(p, p.v, p.value, p.value_token_stride, p.value_head_stride, p.head_size_v, token,
                 slot);
    }
  }

  void merge(const MergeParams& p, const Context&) const override {
    for (std::int64_t token = 0; token < p.num_tokens; ++token) {
      for (std::int32_t head = 0; head < p.num_heads; ++head) merge_row(p, token, head);
    }
  }

 private:
  static void merge_row(const MergeParams& p, std::int64_t token, std::int32_t head) {
    const auto merged =
        semantics::merge_rows<double>(*p.a.lse_at(token, head), *p.b.lse_at(token, head));
    const void* a = p.a.row(p.dtype, token, head);
    const void* b = p.b.row(p.dtype, token, head);
    void* result = const_cast<void*>(p.result.row(p.dtype, token, head));
    for (std::int64_t i = 0; i < p.head_size_v; ++i) {
      semantics::store_element(result, p.dtype, i, merged.element(a, b, p.dtype, i));
    }
    if (p.result.lse != nullptr) {
      *const_cast<float*>(p.result.lse_at(token, head)) = static_cast<float>(merged.lse);
    }
  }
};

}  // namespace

const Backend& backend() {
  static const ReferenceBackend instance;
  return instance;
}

}  // namespace quire::reference
