// Which keys a query may see. Value types; the arithmetic lives in src/semantics/mask.h.
#pragma once

#include <cstdint>

namespace quire {

// What kind of attention a layer does (vLLM's AttentionType).
enum class AttentionType : std::uint8_t {
  kDecoder = 0,         // self-attention over the paged cache
  kEncoder = 1,         // self-attention over this call's own key/value, no cache
  kEncoderOnly = 2,     // the same, in a model that has no decoder
  kEncoderDecoder = 3,  // cross attention over the paged cache that the encoder step filled
};

enum class WindowKind : std::uint8_t {
  kNone = 0,
  kLeft,     // keys j with p - j < size: a decoder's sliding window. Where nothing is causal (the
             // layer or, by its flag, the sequence) it is kBoth, as in vLLM
  kBoth,     // keys j with |p - j| < size: an encoder's sliding window
  kChunked,  // keys j with p / size - j / size <= lookback  (chunked local attention, Llama 4)
};

// The part of a mask that belongs to the layer. A key at position j is visible to a query at
// position p if
//     (base and window) or (p and j lie in one bidirectional range)
// where base is `j <= p` if causal, else true; with clamp_ranges and a sliding window, if
//     window and (base or p and j lie in one bidirectional range)
// What belongs to the batch (causality switched off, bidirectional ranges, visible prefixes,
// positions that are not the keys' indices) is in CommonAttentionMetadata.
struct Mask {
  // Encoder, encoder-only and cross attention are never causal, whatever this says.
  bool causal = true;

  WindowKind window = WindowKind::kNone;
  // kLeft, kBoth: the window size W. kChunked: the chunk size C. In tokens, >= 1.
  std::int64_t window_size = 0;
  // kChunked: how many earlier chunks stay visible (L >= 0; 0 is Llama 4's attention).
  std::int64_t chunk_lookback = 0;

  // Bidirectional ranges end at the sliding window (Gemma 4; Gemma 3 in Hugging Face's
  // transformers; vLLM's mm_prefix_clamp_sliding_window). Without a window it changes nothing; with
  // kChunked it is refused: no model has such a rule.
  bool clamp_ranges = false;

  friend constexpr bool operator==(const Mask&, const Mask&) = default;

  static Mask full() { return {.causal = false}; }
  static Mask sliding_window(std::int64_t size) {
    return {.causal = true, .window = WindowKind::kLeft, .window_size = size};
  }
  static Mask sliding_window_both(std::int64_t size) {
    return {.causal = false, .window = WindowKind::kBoth, .window_size = size};
  }
  static Mask chunked(std::int64_t chunk_size, std::int64_t lookback = 0) {
    return {.causal = true,
            .window = WindowKind::kChunked,
            .window_size = chunk_size,
            .chunk_lookback = lookback};
  }
};

}  // namespace quire
