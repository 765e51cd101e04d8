// How a score is made from a dot product. Value type.
#pragma once

#include "quire/types.h"

namespace quire {

// The part of the score that belongs to the layer. In this order (see docs/guide/semantics.md):
//   S = softmax_scale * q_scale * k_scale * dot(q, k)
//   S = soft_cap * tanh(S / soft_cap)                               if soft_cap > 0   (Gemma 2)
//   mask
//   S += slope[h] * (j - p), or slope[h] * (j <= p ? -sqrt(p - j) : 0)                 (ALiBi)
//   S += qq_bias[i][j - context_len]                    for this step's own keys, see metadata.h
// Then softmax over j, with one extra logit sinks[h] in the maximum and the denominator.
struct Score {
  // Multiplies the dot product. 0 means 1 / sqrt(head_size). Must be finite.
  float softmax_scale = 0.0F;

  // Logits soft cap; 0 means none. Must be finite and >= 0.
  float soft_cap = 0.0F;

  // ALiBi slopes, float32 [num_heads], on the layer's device; absent means none. The memory must
  // stay valid as long as the plans and layers built from it.
  ConstTensorView alibi_slopes{};
  // Use the square-root form of ALiBi. Needs alibi_slopes.
  bool alibi_sqrt = false;

  // Attention sinks, float32 [num_heads], on the layer's device; absent means none. Each head's
  // logit takes part in the softmax and has no value row (gpt-oss; Xiao et al., 2023).
  ConstTensorView sinks{};
};

}  // namespace quire
