// Judges cache writes of many tokens: every written row must be its token's, some are compared to
// the bit, and nothing else may have changed.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <unordered_map>

#include "conformance/number_format.h"
#include "conformance/sampled.h"

namespace quire::conformance {
namespace {

constexpr std::int64_t kExactRows = 200;

class WriteCheck {
 public:
  WriteCheck(const Case& c, Rng* rng) : c_(c), rng_(rng) {
    const std::int64_t tokens = c.slot_mapping.shape[0];
    exact_share_ = static_cast<double>(kExactRows) / static_cast<double>(std::max<std::int64_t>(
                                                         tokens * c.spec.config.num_kv_heads, 1));
    row_.resize(c.spec.config.head_size + c.spec.config.value_head_size());
    stored_.resize(row_.size());
  }

  // Whether the slot holds that token, K, V and scales of all heads, in the case's own buffers.
  bool holds(std::int64_t slot, std::int64_t token) {
    const std::int64_t block_size = c_.spec.config.block_size;
    for (std::int64_t head = 0; head < c_.spec.config.num_kv_heads; ++head) {
      for (const bool is_key : {true, false}) {
        if (!row_is(slot / block_size, slot % block_size, head, token, is_key)) return false;
      }
    }
    return true;
  }

 private:
  bool row_is(std::int64_t block, std::int64_t slot, std::int64_t head, std::int64_t token,
              bool is_key) {
    const Tensor& cache = is_key ? c_.key_cache : c_.value_cache;
    const Tensor& scales = is_key ? c_.k_scale_cache : c_.v_scale_cache;
    const Tensor& fresh = is_key ? c_.key : c_.value;
    const std::int64_t size = fresh.shape[2];
    const std::int64_t bytes = cache.shape[3] * size_of(cache.dtype);
    const std::byte* now = cache.at({block, slot, head, 0});
    const std::byte* row = fresh.at({token, head, 0});
    const KvCacheDType kind = c_.spec.config.kv_cache_dtype;
    if (cache.dtype == fresh.dtype) return std::memcmp(now, row, bytes) == 0;
    const float tensor_scale = is_key ? c_.k_scale() : c_.v_scale();
    const float own_scale = scales ? static_cast<float>(scales.get({block, slot, head})) : 0.0F;
    if (kind == KvCacheDType::kInt4PerTokenHead || rng_->chance(exact_share_)) {
      std::vector<std::byte> wanted(bytes);
      float wanted_scale = 0;
      quantise_row(kind, fresh.dtype, row, size, tensor_scale, cache.dtype, wanted.data(),
                   &wanted_scale);
      return std::memcmp(now, wanted.data(), bytes) == 0 && (!scales || own_scale == wanted_scale);
    }
    // The rest within a step of the stored type. (Not int4, whose rows are all compared.)
    decode_row(fresh.dtype, row, size, row_.data());
    decode_row(cache.dtype, now, size, stored_.data());
    double scale = is_per_tensor_fp8(kind) ? tensor_scale : 1.0;
    if (scales) scale = own_scale;
    const double relative = relative_step(cache.dtype);
    const double absolute = cache.dtype == DType::kInt8 ? 0.51 : smallest_step(cache.dtype);
    bool close = true;
    for (std::int64_t d = 0; d < size; ++d) {
      const double quotient = row_[d] / scale;
      const double error = std::fabs(stored_[d] - quotient);
      close &= error <= relative * std::fabs(quotient) + absolute;
    }
    return close;
  }

  static double relative_step(DType dtype) {
    switch (dtype) {
      case DType::kFloat16: return 0x1p-10;
      case DType::kBFloat16: return 0x1p-7;
      case DType::kFloat8E4M3: return 0x1.1p-4;
      case DType::kFloat8E5M2: return 0x1.1p-3;
      default: return 1e-6;
    }
  }

  const Case& c_;
  Rng* rng_;
  double exact_share_;
  std::vector<double> row_;
  std::vector<double> stored_;
};

// Copies what lies in a slot, K, V and scales of all heads, from one image of the caches to
// another.
void copy_slot(const Case& c, std::int64_t slot, const std::vector<const Tensor*>& buffers,
               const std::vector<std::vector<std::byte>>& from) {
  const std::int64_t block_size = c.spec.config.block_size;
  for (const Tensor* view : {&c.key_cache, &c.value_cache, &c.k_scale_cache, &c.v_scale_cache}) {
    if (!*view) continue;
    const auto which = std::find_if(buffers.begin(), buffers.end(), [&](const Tensor* other) {
      return other->buffer == view->buffer;
    });
    const std::vector<std::byte>& source = from[which - buffers.begin()];
    const bool is_scale = view->shape.size() == 3;
    const std::int64_t bytes = (is_scale ? 1 : view->shape[3]) * size_of(view->dtype);
    for (std::int64_t head = 0; head < view->shape[2]; ++head) {
      std::byte* to = is_scale ? view->at({slot / block_size, slot % block_size, head})
                               : view->at({slot / block_size, slot % block_size, head, 0});
      std::memcpy(to, &source[to - view->buffer->bytes.data()], bytes);
    }
  }
}

}  // namespace

std::vector<const Tensor*> cache_buffers(const Case& c) {
  std::vector<const Tensor*> buffers;
  for (const Tensor* view : {&c.key_cache, &c.value_cache, &c.k_scale_cache, &c.v_scale_cache}) {
    const bool known = std::any_of(buffers.begin(), buffers.end(), [&](const Tensor* other) {
      return other->buffer == view->buffer;
    });
    if (*view && !known) buffers.push_back(view);
  }
  return buffers;
}

std::string adopt_written(Case* c, const std::vector<std::vector<std::byte>>& after,
                          SharedSlot promise, Rng* rng) {
  const std::int64_t slots = c->key_cache.shape[0] * c->spec.config.block_size;
  std::unordered_map<std::int64_t, std::vector<std::int64_t>> tokens;  // of each slot, in order
  for (std::int64_t token = 0; token < c->slot_mapping.shape[0]; ++token) {
    std::int64_t slot = 0;
    std::memcpy(&slot, c->slot_mapping.at({token}), sizeof slot);
    if (slot >= 0 && slot < slots) tokens[slot].push_back(token);
  }
  const std::vector<const Tensor*> buffers = cache_buffers(*c);
  WriteCheck check(*c, rng);
  std::string problem;
  for (const auto& [slot, claims] : tokens) {
    copy_slot(*c, slot, buffers, after);
    const bool unspecified = claims.size() > 1 && promise == SharedSlot::kAnything;
    if (!unspecified && !check.holds(slot, claims.back()) && problem.empty()) {
      problem = "write_kv_cache: slot " + std::to_string(slot) + " does not hold token " +
                std::to_string(claims.back()) +
                (claims.size() > 1 ? ", the last of " + std::to_string(claims.size()) : "");
    }
  }
  for (std::size_t i = 0; i < buffers.size() && problem.empty(); ++i) {
    const std::vector<std::byte>& wanted = buffers[i]->buffer->bytes;
    if (same_bytes(after[i], wanted)) continue;
    const auto place = std::mismatch(after[i].begin(), after[i].end(), wanted.begin()).first;
    problem = "write_kv_cache: changed byte " + std::to_string(place - after[i].begin()) +
              " of the cache, which belongs to no slot of slot_mapping";
  }
  return problem;
}

}  // namespace quire::conformance
