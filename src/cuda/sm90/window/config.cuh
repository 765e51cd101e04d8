// What an instance of the window kernel is made of, and its shared memory.
#pragma once

#include "cuda/kernel/work_queue.cuh"
#include "cuda/ptx/mbarrier.cuh"
#include "cuda/sm90/prefill/loaders.cuh"
#include "cuda/sm90/window/policy.h"

namespace quire::cuda::sm90 {

template <class Type_, int kHeadSize_>
struct WindowConfig {
  using Type = Type_;
  static constexpr int kHeadSize = kHeadSize_;
  static constexpr bool kUnmappedApart = std::is_same_v<Type, ptx::Half>;
  static constexpr int kConsumers = 4;  // warpgroups, a step each
  static constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
  static constexpr int kConsumerRegisters = 112;
  static constexpr int kProducerRegisters = 32;
  static constexpr int kRowBytes = kHeadSize * 2;
  static constexpr int kRowsBytes = kStepRows * kRowBytes;  // a buffer of queries and outputs
  static constexpr int kSpanBytes = kSpanKeys * kRowBytes;  // K or V
  static constexpr int kKeyStride = 8 * kRowBytes;          // from eight keys to the next eight
  static constexpr int kSpans = 2;
  // Of rows. Consumers take them by turns: were they no multiple, one could wait for a phase of a
  // buffer that another has not seen the one before of, and pass early.
  static constexpr int kBuffers = 12;
  static_assert(kBuffers % kConsumers == 0);
  // Where things begin in shared memory.
  static constexpr int kRowsAt = kSpans * 2 * kSpanBytes;
  static constexpr int kSharedAt = kRowsAt + kBuffers * kRowsBytes;
  static_assert(kHeadSize == 64, "wider rows are several columns of the copy engine");
};

// An item as the warps of a CTA see it. No initialisers: it lives in shared memory.
struct WindowTask {
  PrefillTask item;
  std::int32_t steps;
  std::int32_t first_key;  // of its span, a multiple of kPageKeys
  bool partial;            // keys of its boxes may not be read (UnreadableKeys)
};

inline constexpr int kWindowTasks = 2;

// A span is K and V of an item; `unmapped`: a bit a box, its block does not exist.
template <class C>
struct WindowShared {
  std::uint64_t task_full[kWindowTasks];
  std::uint64_t task_empty[kWindowTasks];
  std::uint64_t span_full[C::kSpans];
  std::uint64_t span_empty[C::kSpans];
  std::uint64_t query_full[C::kBuffers];
  std::uint64_t output_full[C::kBuffers];
  std::uint64_t rows_empty[C::kBuffers];
  std::uint32_t unmapped[C::kSpans];
  WindowTask task[kWindowTasks];
  WorkQueue queue;
};

template <class C>
constexpr int window_shared_bytes() {
  return C::kSharedAt + static_cast<int>(sizeof(WindowShared<C>));
}

}  // namespace quire::cuda::sm90
