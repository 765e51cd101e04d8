// Whether a backend's capabilities cover a configuration, and if not, why.
#include <algorithm>
#include <cmath>

#include "api/check.h"
#include "backend.h"

namespace quire {
namespace {

template <class T>
bool has(const std::vector<T>& values, T value) {
  return std::find(values.begin(), values.end(), value) != values.end();
}

struct Reasons {
  std::vector<std::string> list;
  void require(bool ok, const std::string& reason) {
    if (!ok) list.push_back(reason);
  }
};

void check_sizes(const AttentionConfig& c, const BackendCapabilities& caps, Reasons& reasons) {
  reasons.require(c.num_heads >= 1 && c.num_heads <= 65536,
                  "num_heads must be 1 to 65536, not " + std::to_string(c.num_heads));
  reasons.require(
      c.num_kv_heads >= 1 && c.num_heads % std::max<std::int64_t>(c.num_kv_heads, 1) == 0,
      "num_kv_heads must divide num_heads " + std::to_string(c.num_heads) + ", not " +
          std::to_string(c.num_kv_heads));
  const auto size_ok = [&](std::int64_t size) {
    return size >= caps.min_head_size && size <= caps.max_head_size &&
           size % caps.head_size_multiple == 0;
  };
  const std::string sizes = " must be " + std::to_string(caps.min_head_size) + " to " +
                            std::to_string(caps.max_head_size) + " in steps of " +
                            std::to_string(caps.head_size_multiple) + ", not ";
  reasons.require(size_ok(c.head_size), "head_size" + sizes + std::to_string(c.head_size));
  reasons.require(size_ok(c.value_head_size()),
                  "head_size_v" + sizes + std::to_string(c.value_head_size()));
  reasons.require(c.block_size >= 1 && c.block_size <= (1 << 20) &&
                      c.block_size % caps.block_size_multiple == 0,
                  "block_size must be a positive multiple of " +
                      std::to_string(caps.block_size_multiple) + ", not " +
                      std::to_string(c.block_size));
}

void check_dtypes(const AttentionConfig& c, const BackendCapabilities& caps, Reasons& reasons) {
  reasons.require(has(caps.dtypes, c.dtype),
                  std::string("dtype ") + to_string(c.dtype) + " is not supported for queries");
  reasons.require(
      has(caps.kv_cache_dtypes, c.kv_cache_dtype),
      std::string("kv_cache_dtype ") + to_string(c.kv_cache_dtype) + " is not supported");
  if (c.dtype != DType::kFloat8E4M3) return;
  const bool paged = c.type == AttentionType::kDecoder || c.type == AttentionType::kEncoderDecoder;
  reasons.require(!paged || is_per_tensor_fp8(c.kv_cache_dtype),
                  std::string("an fp8 query needs a cache of per-tensor fp8, not ") +
                      to_string(c.kv_cache_dtype));
  reasons.require(paged, "an fp8 query needs a paged cache");
}

void check_mask(const AttentionConfig& c, const BackendCapabilities& caps, Reasons& reasons) {
  const Mask& mask = c.mask;
  const bool windowed = mask.window != WindowKind::kNone;
  reasons.require(!windowed || (mask.window_size >= 1 && mask.window_size < (1LL << 31)),
                  "mask.window_size must be 1 to 2^31 - 1 with a window, not " +
                      std::to_string(mask.window_size));
  const bool chunked = mask.window == WindowKind::kChunked;
  reasons.require(
      !chunked || (mask.chunk_lookback >= 0 && mask.chunk_lookback < (1LL << 31)),
      "mask.chunk_lookback must be 0 to 2^31 - 1, not " + std::to_string(mask.chunk_lookback));
  reasons.require(!chunked || !mask.clamp_ranges,
                  "mask.clamp_ranges is about sliding windows, not about chunks");
  reasons.require(!windowed || chunked || caps.sliding_window, "sliding windows are not supported");
  reasons.require(!chunked || caps.chunked, "chunked attention is not supported");
  const bool cross = c.type == AttentionType::kEncoderDecoder;
  reasons.require(!cross || caps.cross_attention, "cross attention is not supported");
  const bool encoder = c.type == AttentionType::kEncoder || c.type == AttentionType::kEncoderOnly;
  reasons.require(!encoder || caps.encoder_attention, "encoder attention is not supported");
}

void check_score(const AttentionConfig& c, const BackendCapabilities& caps, Reasons& reasons) {
  const Score& score = c.score;
  reasons.require(std::isfinite(score.softmax_scale), "score.softmax_scale must be finite");
  reasons.require(std::isfinite(score.soft_cap) && score.soft_cap >= 0,
                  "score.soft_cap must be finite and at least 0");
  reasons.require(score.soft_cap == 0 || caps.soft_cap, "soft caps are not supported");
  reasons.require(!score.alibi_slopes || caps.alibi, "ALiBi is not supported");
  reasons.require(!score.alibi_sqrt || score.alibi_slopes,
                  "score.alibi_sqrt needs score.alibi_slopes");
  reasons.require(!score.sinks || caps.sinks, "sinks are not supported");
  reasons.require(!c.batch_invariant || caps.batch_invariant,
                  "batch-invariant mode is not supported");
}

}  // namespace

std::vector<std::string> Backend::supports(const AttentionConfig& config) const {
  Reasons reasons;
  const BackendCapabilities& caps = capabilities();
  reasons.require(available(), std::string("backend ") + name() +
                                   " cannot run here: " + (available() ? "" : instruction_set()));
  reasons.require(config.device.type == device_type(),
                  "device " + to_string(config.device) + " is not this backend's");
  reasons.require(!available() || (config.device.index >= 0 && config.device.index < num_devices()),
                  "there is no device " + to_string(config.device) + ": " +
                      std::to_string(num_devices()) + " of its kind, counted from 0");
  check_sizes(config, caps, reasons);
  check_dtypes(config, caps, reasons);
  check_mask(config, caps, reasons);
  check_score(config, caps, reasons);
  return reasons.list;
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
                          KvCacheDType::kFp8E4M3PerTokenHead};
  caps.output_dtypes = {DType::kFloat16, DType::kBFloat16, DType::kFloat32, DType::kFloat8E4M3};
  caps.min_head_size = 8;
  caps.max_head_size = 576;
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

std::vector<std::int64_t> AttentionBackend::kv_cache_shape(std::int64_t num_blocks,
                                                           std::int64_t block_size,
                                                           std::int64_t num_kv_heads,
                                                           std::int64_t head_size) const {
  const BackendCapabilities& caps = capabilities();
  check::that(num_blocks >= 0, "num_blocks", "at least 0", num_blocks);
  check::that(block_size >= 1 && block_size % caps.block_size_multiple == 0, "block_size",
              "a positive multiple of " + std::to_string(caps.block_size_multiple), block_size);
  check::that(num_kv_heads >= 1, "num_kv_heads", "at least 1", num_kv_heads);
  check::that(head_size >= caps.min_head_size && head_size <= caps.max_head_size, "head_size",
              std::to_string(caps.min_head_size) + " to " + std::to_string(caps.max_head_size),
              head_size);
  return {num_blocks, 2, block_size, num_kv_heads, head_size};
}

}  // namespace quire
