// Whether a backend's capabilities cover a configuration, and if not, why.
#include <algorithm>
#include <cmath>
#include <utility>

#include "api/check.h"
#include "api/lower.h"
#include "backend.h"

namespace quire {
namespace {

struct Reasons {
  std::vector<Unsupported> list;
  template <class Got>
  void require(bool ok, const char* argument, const std::string& expected, const Got& got) {
    if (!ok) list.push_back({argument, expected, check::text_of(got)});
  }
  void feature(bool used, bool supported, const char* argument, const char* got) {
    require(!used || supported, argument, "what this backend supports", got);
  }
};

std::string numbers(std::int64_t least, std::int64_t most, std::int64_t step) {
  std::string text = std::to_string(least) + " to " + std::to_string(most);
  return step == 1 ? text : text + " in steps of " + std::to_string(step);
}

bool is_one_of(std::int64_t value, std::int64_t least, std::int64_t most, std::int64_t step) {
  return value >= least && value <= most && value % step == 0;
}

void check_sizes(const AttentionConfig& c, const BackendCapabilities& caps, Reasons& reasons) {
  reasons.require(c.num_heads >= 1 && c.num_heads <= kMaxHeads, "num_heads",
                  numbers(1, kMaxHeads, 1), c.num_heads);
  reasons.require(
      c.num_kv_heads >= 1 && c.num_heads % std::max<std::int64_t>(c.num_kv_heads, 1) == 0,
      "num_kv_heads", "a divisor of num_heads " + std::to_string(c.num_heads), c.num_kv_heads);
  const auto head_size = [&](const char* argument, std::int64_t size) {
    const std::int64_t least = caps.min_head_size, most = caps.max_head_size;
    const std::int64_t step = caps.head_size_multiple;
    reasons.require(is_one_of(size, least, most, step), argument, numbers(least, most, step), size);
  };
  head_size("head_size", c.head_size);
  if (c.head_size_v != 0) head_size("head_size_v", c.head_size_v);
  const std::int64_t step = caps.block_size_multiple;
  reasons.require(is_one_of(c.block_size, step, caps.max_block_size, step), "block_size",
                  numbers(step, caps.max_block_size, step), c.block_size);
}

template <class T>
std::string names(const std::vector<T>& values) {
  std::string text;
  for (const T value : values) text += (text.empty() ? "" : " or ") + std::string(to_string(value));
  return text;
}

void check_dtypes(const AttentionConfig& c, const BackendCapabilities& caps, Reasons& reasons) {
  reasons.require(check::contains(caps.dtypes, c.dtype), "dtype", names(caps.dtypes),
                  to_string(c.dtype));
  reasons.require(check::contains(caps.kv_cache_dtypes, c.kv_cache_dtype), "kv_cache_dtype",
                  names(caps.kv_cache_dtypes), to_string(c.kv_cache_dtype));
  const bool paged = c.type == AttentionType::kDecoder || c.type == AttentionType::kEncoderDecoder;
  const bool pairs = paged && c.kv_cache_dtype == KvCacheDType::kInt4PerTokenHead;
  reasons.require(!pairs || c.head_size % 2 == 0, "head_size",
                  "an even number with int4_per_token_head", c.head_size);
  reasons.require(!pairs || c.head_size_v % 2 == 0, "head_size_v",
                  "an even number with int4_per_token_head", c.head_size_v);
  if (c.dtype != DType::kFloat8E4M3) return;
  reasons.require(!paged || is_per_tensor_fp8(c.kv_cache_dtype), "kv_cache_dtype",
                  "per-tensor fp8 for an fp8 query", to_string(c.kv_cache_dtype));
  reasons.require(paged, "dtype", "float16, bfloat16 or float32 without a paged cache",
                  to_string(c.dtype));
}

void check_mask(const AttentionConfig& c, const BackendCapabilities& caps, Reasons& reasons) {
  const Mask& mask = c.mask;
  const bool windowed = mask.window != WindowKind::kNone;
  const bool chunked = mask.window == WindowKind::kChunked;
  reasons.require(mask.window <= WindowKind::kChunked, "window", "a WindowKind",
                  static_cast<int>(mask.window));
  reasons.require(!windowed || (mask.window_size >= 1 && mask.window_size < (1LL << 31)),
                  "window_size", "1 to 2^31 - 1 with a window", mask.window_size);
  reasons.require(!chunked || (mask.chunk_lookback >= 0 && mask.chunk_lookback < (1LL << 31)),
                  "chunk_lookback", "0 to 2^31 - 1", mask.chunk_lookback);
  reasons.require(!chunked || !mask.clamp_ranges, "clamp_ranges", "a sliding window or none",
                  "chunks");
  reasons.feature(windowed && !chunked, caps.sliding_window, "window", "a sliding window");
  reasons.feature(chunked, caps.chunked, "window", "chunked attention");
  reasons.require(c.type <= AttentionType::kEncoderDecoder, "type", "an AttentionType",
                  static_cast<int>(c.type));
  const bool cross = c.type == AttentionType::kEncoderDecoder;
  const bool encoder = c.type == AttentionType::kEncoder || c.type == AttentionType::kEncoderOnly;
  reasons.feature(cross, caps.cross_attention, "type", "cross attention");
  reasons.feature(encoder, caps.encoder_attention, "type", "encoder attention");
}

void check_score(const AttentionConfig& c, const BackendCapabilities& caps, Reasons& reasons) {
  const Score& score = c.score;
  reasons.require(std::isfinite(score.softmax_scale), "softmax_scale", "a finite scale",
                  score.softmax_scale);
  reasons.require(std::isfinite(score.soft_cap) && score.soft_cap >= 0, "soft_cap",
                  "a finite cap of at least 0", score.soft_cap);
  reasons.feature(score.soft_cap != 0, caps.soft_cap, "soft_cap", "a soft cap");
  reasons.feature(static_cast<bool>(score.alibi_slopes), caps.alibi, "alibi_slopes", "ALiBi");
  reasons.require(!score.alibi_sqrt || score.alibi_slopes, "alibi_slopes",
                  "slopes to go with alibi_sqrt", "none");
  reasons.feature(static_cast<bool>(score.sinks), caps.sinks, "sinks", "attention sinks");
  reasons.feature(c.batch_invariant, caps.batch_invariant, "batch_invariant", "true");
}

}  // namespace

std::vector<Unsupported> Backend::unsupported(const AttentionConfig& config) const {
  Reasons reasons;
  const BackendCapabilities& caps = capabilities();
  reasons.require(available(), "backend", "one that can run here",
                  std::string(name()) + " (" + (available() ? "" : instruction_set()) + ")");
  reasons.require(config.device.type == device_type(), "device", "a device of this backend",
                  to_string(config.device));
  reasons.require(!available() || (config.device.index >= 0 && config.device.index < num_devices()),
                  "device",
                  "one of the " + std::to_string(num_devices()) + " of its kind, counted from 0",
                  to_string(config.device));
  check_sizes(config, caps, reasons);
  check_dtypes(config, caps, reasons);
  check_mask(config, caps, reasons);
  check_score(config, caps, reasons);
  return reasons.list;
}

std::vector<std::string> Backend::supports(const AttentionConfig& config) const {
  std::vector<std::string> texts;
  for (const Unsupported& reason : unsupported(config)) texts.push_back(reason.text());
  return texts;
}

BackendCapabilities full_capabilities() {
  BackendCapabilities caps;
  caps.dtypes = {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat8E4M3};
  caps.kv_cache_dtypes = {KvCacheDType::kAuto,
                          KvCacheDType::kFloat16,
                          KvCacheDType::kBFloat16,
                          KvCacheDType::kFloat32,
                          KvCacheDType::kFp8E4M3,
                          KvCacheDType::kFp8E5M2,
                          KvCacheDType::kInt8PerTokenHead,
                          KvCacheDType::kFp8E4M3PerTokenHead,
                          KvCacheDType::kInt4PerTokenHead};
  caps.output_dtypes = {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat8E4M3};
  caps.min_head_size = 8;
  caps.max_head_size = 576;
  caps.max_block_size = kMaxBlockSize;
  for (bool BackendCapabilities::*flag :
       {&BackendCapabilities::sinks, &BackendCapabilities::alibi, &BackendCapabilities::soft_cap,
        &BackendCapabilities::sliding_window, &BackendCapabilities::chunked,
        &BackendCapabilities::bidirectional_ranges, &BackendCapabilities::visible_prefix,
        &BackendCapabilities::qq_bias, &BackendCapabilities::cross_attention,
        &BackendCapabilities::encoder_attention, &BackendCapabilities::cascade,
        &BackendCapabilities::lse, &BackendCapabilities::fp8_output,
        &BackendCapabilities::block_scale_output, &BackendCapabilities::batch_invariant}) {
    caps.*flag = true;
  }
  return caps;
}

std::int64_t advised_block_bytes(std::int64_t block_bytes, std::int64_t step) {
  // A few KiB more spread blocks over all channels (an H200: 256 bytes do).
  constexpr std::int64_t kKiB = 1024;
  constexpr std::int64_t kSlow[] = {std::int64_t{5} * 64 * kKiB, std::int64_t{47} * 16 * kKiB};
  constexpr std::int64_t kLeastPadding = 4 * kKiB;
  constexpr std::int64_t kMost = std::int64_t{1} << 48;
  check::that(block_bytes >= 1 && block_bytes <= kMost, "block_bytes", "1 to 2^48", block_bytes);
  check::that(step >= 1 && step <= kMost, "step", "1 to 2^48", step);
  const auto is_slow = [&](std::int64_t bytes) {
    return std::any_of(std::begin(kSlow), std::end(kSlow),
                       [&](std::int64_t slow) { return bytes % slow == 0; });
  };
  const std::int64_t padding = (kLeastPadding + step - 1) / step * step;
  for (std::int64_t bytes = block_bytes; bytes <= block_bytes + 2 * padding; bytes += padding) {
    if (!is_slow(bytes)) return bytes;
  }
  return block_bytes;  // so large a step does not help
}

std::vector<std::int64_t> AttentionBackend::kv_cache_shape(std::int64_t num_blocks,
                                                           std::int64_t block_size,
                                                           std::int64_t num_kv_heads,
                                                           std::int64_t head_size,
                                                           std::string_view cache_dtype_str) const {
  const BackendCapabilities& caps = capabilities();
  const std::int64_t step = caps.block_size_multiple;
  check::that(num_blocks >= 1, "num_blocks", "at least 1", num_blocks);
  check::that(is_one_of(block_size, step, caps.max_block_size, step), "block_size",
              numbers(step, caps.max_block_size, step), block_size);
  check::that(num_kv_heads >= 1 && num_kv_heads <= kMaxHeads, "num_kv_heads",
              numbers(1, kMaxHeads, 1), num_kv_heads);
  validate_head_size(head_size);
  const KvCacheDType dtype = api::parse_cache_dtype(cache_dtype_str, "cache_dtype_str");
  check::capability(check::contains(caps.kv_cache_dtypes, dtype), "cache_dtype_str",
                    cache_dtype_str);
  const std::int64_t scale_bytes = is_per_token_head(dtype) ? sizeof(float) : 0;
  const std::int64_t unit = dtype == KvCacheDType::kInt4PerTokenHead ? 8 : 4;
  check::that(
      scale_bytes == 0 || head_size % unit == 0, "head_size",
      [&] { return "a multiple of " + std::to_string(unit) + " with inline scales"; }, head_size);
  return {num_blocks, 2, block_size, num_kv_heads,
          stored_head_size(dtype, head_size) + scale_bytes};
}

void AttentionBackend::validate_head_size(std::int64_t head_size) const {
  const BackendCapabilities& caps = capabilities();
  const std::int64_t least = caps.min_head_size, most = caps.max_head_size;
  const std::int64_t step = caps.head_size_multiple;
  check::that(is_one_of(head_size, least, most, step), "head_size", numbers(least, most, step),
              head_size);
}

namespace {

AttentionConfig on_backend(AttentionConfig config, const char* name) {
  check::that(
      config.backend.empty() || config.backend == name, "backend",
      [&] { return std::string("none, or ") + name; }, config.backend);
  config.backend = name;
  return config;
}

}  // namespace

AttentionMetadataBuilder AttentionBackend::make_builder(const AttentionConfig& config) const {
  return AttentionMetadataBuilder(on_backend(config, name()));
}

AttentionImpl AttentionBackend::make_impl(const AttentionConfig& config,
                                          std::string kv_sharing_target_layer_name) const {
  return AttentionImpl(on_backend(config, name()), std::move(kv_sharing_target_layer_name));
}

}  // namespace quire
