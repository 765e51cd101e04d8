// Attention for sequences of many query rows whose windows are short, on Hopper. All keys that a
// few tokens see are multiplied at once: no running softmax, nothing is rescaled or combined.
//
//   find_items -> task[2] -> load_spans:   page boxes -> K, V of 256 keys, two of each
//                         -> load_queries: boxes -> rows[12]
//                         -> consumers:    S = Q K^T (64 rows of 144 keys) -> mask, softmax in
//                                          registers -> O = P V -> over their queries
//                         -> store_outputs: rows[12] -> boxes
//
// An item is 112 tokens of a kv head, whose windows of 128 keys lie in 16 pages of 16: its span. A
// step is as many of its tokens as are 64 rows with all query heads of the kv head: 8 of 8 heads
// each. With windows of 128 they see 135 keys, which begin at most 7 behind a multiple of 8.
//
// Roles. Four consumer warpgroups take steps by turns and share the span; nothing overlaps within
// one, so they are what hides the latencies of each other. A fifth warpgroup moves everything, a
// warp a role (movers.cuh). Rows are boxes of the copy engine both ways, so no consumer waits for a
// load or store that it has issued.
//
// Barriers. task, span: "full" (from its finder or the copy engine) and "empty" (all that read
// them). A buffer of rows goes round: query_full (the copy engine), output_full (the consumer's
// warps), rows_empty (store_outputs, when the copy engine has read it).
//
// Shared memory at head size 64: spans 2 x 64 KB, rows 12 x 8 KB, 1 KB of the rest.
//
// Why this tile: of a call's bytes nearly all are queries and outputs, each moved once: 16 KB a
// step, 1,650 clocks of a multiprocessor's part of what an H100 copies. A step's products take 576
// clocks of its tensor cores, its exponentials 576 of its special units. So what counts is that
// loads and stores are always under way, and any order of the rest will do. K and V are read twice,
// by two neighbouring items, mostly from L2.
#pragma once

#include "cuda/kernel/partial.cuh"
#include "cuda/ptx/fragment.cuh"
#include "cuda/ptx/math.cuh"
#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/window/movers.cuh"

namespace quire::cuda::sm90 {

template <class C>
class WindowConsumer {
  using Type = typename C::Type;

 public:
  __device__ __forceinline__ WindowConsumer(const KernelParams& p, char* memory,
                                            WindowShared<C>& shared, int warpgroup)
      : p_(p),
        memory_(ptx::shared_address(memory)),
        shared_(shared),
        warpgroup_(warpgroup),
        tokens_(step_tokens(p.layer)),
        window_(static_cast<int>(p.layer.mask.window_size)),
        change_(query_change(p)),
        next_step_(warpgroup) {
    const float scale = p.layer.softmax_scale * value_of(p.q_scale) * value_of(p.k.scale);
    // At 0 a masked -inf would turn into NaN.
    to_log2_ = fmaxf(fabsf(scale), 1e-37F) * kLog2E;
    v_scale_ = value_of(p.v.scale);
    buffer_.index = static_cast<std::uint32_t>(warpgroup);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      token_[h] = row(h) / p.layer.group;
      head_[h] = row(h) - token_[h] * p.layer.group;
    }
  }

  __device__ __forceinline__ void run() {
    // Before anything is stored: an output may lie where the write reads.
    ptx::await_launch();
    for_each_item(shared_, [&](const WindowTask& task) {
      ptx::mbarrier_wait(barrier_address(shared_.span_full[span_.index]), span_.parity);
      if (task.partial) clear_values(task);
      begin_item(task);
      const int steps = ptx::uniform(task.steps);
      int i = next_step_;
#pragma unroll 1
      for (; i < steps; i += C::kConsumers) {
        attend(task, i);
        next_buffer();
      }
      next_step_ = i - steps;
      __syncwarp();
      if (lane() == 0) ptx::mbarrier_arrive(barrier_address(shared_.span_empty[span_.index]));
      span_.advance(C::kSpans);
    });
  }

 private:
  static constexpr float kLog2E = 1.4426950408889634F;
  // From here on rounding the shift would move exponents by more than a sixteenth.
  static constexpr float kHuge = 1e6F;
  // Only the first and last 16 columns of scores are masked where every row's window is whole.
  static constexpr int kEdge = 16;
  static constexpr int kInnerEnd = kStepKeys - kEdge;

  static __device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % 32); }
  static __device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x / 32 % 4); }
  // Row h of this thread within the step.
  static __device__ __forceinline__ int row(int h) {
    return warp() * 16 + h * 8 + ptx::fragment_row(lane());
  }
  __device__ __forceinline__ std::uint32_t rows() const {
    return memory_ + C::kRowsAt + buffer_.index * C::kRowsBytes;
  }
  __device__ __forceinline__ std::uint32_t keys() const {
    return memory_ + span_.index * 2 * C::kSpanBytes;
  }
  __device__ __forceinline__ void sync_warpgroup() const {
    ptx::sync_threads(1 + warpgroup_, kWarpgroup);
  }
  __device__ __forceinline__ void next_buffer() {
    buffer_.index += C::kConsumers;
    if (buffer_.index >= C::kBuffers) {
      buffer_.index -= C::kBuffers;
      buffer_.parity ^= 1U;
    }
  }

  __device__ __forceinline__ void begin_item(const WindowTask& task) {
    const WorkTile& tile = task.item.split.tile;
    item_pos_ = tile.first_pos;
    item_key_ = task.first_key;
    kv_len_ = tile.kv_len;
    if (p_.layer.sinks == nullptr) return;
    const float* sinks = p_.layer.sinks + task.item.split.head * p_.layer.group;
    sink_log2_[0] = sinks[head_[0]] * kLog2E;
    sink_log2_[1] = sinks[head_[1]] * kLog2E;
  }

  // The first key of the span that a step multiplies: a multiple of eight.
  __device__ __forceinline__ int first_key(int step_pos) const {
    const int begin = max(step_pos, 0) - (window_ - 1) - item_key_;
    return ptx::uniform(min(max(begin, 0) & ~7, kSpanKeys - kStepKeys));
  }

  // What this thread's rows see, as columns of S, which begins at key `first`.
  struct VisibleKeys {
    bool all_whole;  // the window of every row
    int begin[2];
    int end[2];
  };

  __device__ __forceinline__ VisibleKeys visible_keys(int step_pos, int first) const {
    VisibleKeys keys;
    const int offset = step_pos - (window_ - 1) - first;
    keys.all_whole = step_pos >= window_ - 1 && step_pos + tokens_ <= kv_len_ && offset >= 0 &&
                     offset + tokens_ - 1 <= kEdge && offset + window_ >= kInnerEnd;
    const int column = first + ptx::fragment_column(lane());
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int pos = max(step_pos + token_[h], -1);  // the rows of a wild length see nothing
      keys.begin[h] = pos - (window_ - 1) - column;
      keys.end[h] = min(pos + 1, kv_len_) - column;
    }
    return keys;
  }

  __device__ __forceinline__ void attend(const WindowTask& task, int step) {
    // Positions far below 0, of a wild length, must not wrap.
    const int step_pos = max(item_pos_ + step * tokens_, -kStepKeys);
    const int first = first_key(step_pos);
    ptx::mbarrier_wait(barrier_address(shared_.query_full[buffer_.index]), buffer_.parity);
    if (change_.any()) change_queries();
    start_scores(first);
    const VisibleKeys visible = visible_keys(step_pos, item_key_ + first);
    finish_scores();
    if (visible.all_whole) {
      mask_before<0, kEdge>(visible);
      mask_behind<kInnerEnd, kStepKeys>(visible);
    } else {
      mask_before<0, kStepKeys>(visible);
      mask_behind<0, kStepKeys>(visible);
    }
    float unmapped[2] = {0.0F, 0.0F};
    if constexpr (C::kUnmappedApart) {
      const std::uint32_t boxes = shared_.unmapped[span_.index];
      if (boxes != 0) set_unmapped_apart(boxes, first, unmapped);
    }
    std::uint32_t weights[kStepKeys / 4];
    softmax(weights);
    multiply_values(first, weights);
    float factor[2] = {1.0F, 1.0F};
    if constexpr (C::kUnmappedApart) combine_unmapped(unmapped, &factor);
    normalise_rows(task, step, &factor);
    write_rows(factor);
  }

  // ---- products -----------------------------------------------------------------------------

  __device__ __forceinline__ void start_scores(int first) {
    namespace wgmma = ptx::wgmma;
    const std::uint32_t a = wgmma::descriptor_low(rows(), 16);
    const std::uint32_t b =
        wgmma::descriptor_low(keys() + static_cast<std::uint32_t>(first / 8 * C::kKeyStride), 16);
    wgmma::fence();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int k = 0; k < C::kHeadSize / 16; ++k) {
        wgmma::multiply<Type, kStepKeys / 2, 0, 0>(
            s_[half], wgmma::swizzled(a, k * 32, 1024),
            wgmma::swizzled(b, half * (kStepKeys / 16) * C::kKeyStride + k * 32, C::kKeyStride),
            k > 0);
      }
    }
    wgmma::commit();
  }
  __device__ __forceinline__ void finish_scores() {
    ptx::wgmma::wait<0>();
    ptx::wgmma::keep(s_[0]);
    ptx::wgmma::keep(s_[1]);
  }

  __device__ __forceinline__ void multiply_values(int first,
                                                  const std::uint32_t (&weights)[kStepKeys / 4]) {
    namespace wgmma = ptx::wgmma;
    const std::uint32_t b = wgmma::descriptor_low(
        keys() + C::kSpanBytes + static_cast<std::uint32_t>(first / 8 * C::kKeyStride), 1024);
    wgmma::fence();
#pragma unroll
    for (int k = 0; k < kStepKeys / 16; ++k) {
      wgmma::multiply<Type, C::kHeadSize, 1>(
          o_, weights + 4 * k, wgmma::swizzled(b, k * 2 * C::kKeyStride, C::kKeyStride), k > 0);
    }
    wgmma::commit();
    wgmma::wait<0>();
    wgmma::keep(o_);
  }

  // ---- scores -------------------------------------------------------------------------------

  __device__ __forceinline__ float& score(int i) {
    return s_[i / (kStepKeys / 4)][i % (kStepKeys / 4)];
  }

  // Scores of keys before a row's window, and behind its own key, to -inf.
  template <int kFrom, int kTo>
  __device__ __forceinline__ void mask_before(const VisibleKeys& visible) {
#pragma unroll
    for (int i = kFrom / 2; i < kTo / 2; ++i) {
      if (i / 4 * 8 + i % 2 < visible.begin[i / 2 % 2]) score(i) = -INFINITY;
    }
  }
  template <int kFrom, int kTo>
  __device__ __forceinline__ void mask_behind(const VisibleKeys& visible) {
#pragma unroll
    for (int i = kFrom / 2; i < kTo / 2; ++i) {
      if (i / 4 * 8 + i % 2 >= visible.end[i / 2 % 2]) score(i) = -INFINITY;
    }
  }

  // As PrefillRows::set_unmapped_apart(): `count` of the keys of blocks that do not exist, which
  // must not set the maximum in fp16.
  __device__ __forceinline__ void set_unmapped_apart(std::uint32_t boxes, int first,
                                                     float (&count)[2]) {
#pragma unroll
    for (int n = 0; n < kStepKeys / 8; ++n) {
      if ((boxes >> ((first / 8 + n) / 2) & 1U) == 0) continue;
#pragma unroll
      for (int i = n * 4; i < n * 4 + 4; ++i) {
        count[i / 2 % 2] += ptx::exp2_approx(score(i) * to_log2_);
        score(i) = -INFINITY;
      }
    }
    sum_of_quads(count);
  }

  static __device__ __forceinline__ void sum_of_quads(float (&x)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      x[h] += __shfl_xor_sync(~0U, x[h], 1);
      x[h] += __shfl_xor_sync(~0U, x[h], 2);
    }
  }

  // S -> P, the A operand of the next product (16 keys are four words); max_ and sum_.
  __device__ __forceinline__ void softmax(std::uint32_t (&weights)[kStepKeys / 4]) {
    // Two chains a row: one would be 36 dependent instructions.
    float tops[4] = {score(0), score(1), score(2), score(3)};
#pragma unroll
    for (int i = 4; i < kStepKeys / 2; ++i) tops[i % 4] = fmaxf(tops[i % 4], score(i));
    float shift[2];
    bool huge = false;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      max_[h] = fmaxf(tops[2 * h], tops[2 * h + 1]);
      max_[h] = fmaxf(max_[h], __shfl_xor_sync(~0U, max_[h], 1));
      max_[h] = fmaxf(max_[h], __shfl_xor_sync(~0U, max_[h], 2));
      shift[h] = max_[h] * to_log2_;
      huge = huge || !(fabsf(shift[h]) < kHuge);
    }
    if (__any_sync(~0U, huge)) subtract_huge(shift);
    sum_[0] = sum_[1] = 0.0F;
#pragma unroll
    for (int i = 0; i < kStepKeys / 2; i += 2) {
      const float x = ptx::exp2_approx(fmaf(score(i), to_log2_, -shift[i / 2 % 2]));
      const float y = ptx::exp2_approx(fmaf(score(i + 1), to_log2_, -shift[i / 2 % 2]));
      sum_[i / 2 % 2] += x + y;
      weights[i / 2] = Type::pack(x, y);
    }
    sum_of_quads(sum_);
  }

  // Rows near the end of fp32's range: subtracted before anything can overflow. A row that sees
  // nothing (-inf) is left as it is.
  __device__ __forceinline__ void subtract_huge(float (&shift)[2]) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (fabsf(shift[h]) < kHuge) continue;
      shift[h] = 0.0F;
      if (max_[h] == -INFINITY) continue;
#pragma unroll
      for (int n = 0; n < kStepKeys / 4; ++n) score(n / 2 * 4 + 2 * h + n % 2) -= max_[h];
    }
  }

  // ---- before and behind --------------------------------------------------------------------

  // The state of the keys that were set apart, to that of the rows.
  __device__ __forceinline__ void combine_unmapped(const float (&count)[2], float (*factor)[2]) {
    const float to_natural = kLn2 * to_log2_;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (count[h] == 0.0F) continue;
      Combine combine{max_[h] * to_natural, sum_[h]};
      combine.add(0.0F, count[h]);
      max_[h] = combine.max / to_natural;
      sum_[h] = combine.sum;
      (*factor)[h] = combine.weight_before;
    }
  }

  // Multiplies the factors of O by what divides it by the sum; writes lse.
  __device__ __forceinline__ void normalise_rows(const WindowTask& task, int step,
                                                 float (*factor)[2]) const {
    if (p_.lse != nullptr) {
#pragma unroll
      for (int h = 0; h < 2; ++h) (*factor)[h] *= normalise_with_lse(task, step, h);
      return;
    }
    // As semantics::normalise(), in a few instructions.
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float above = sink_log2_[h] - max_[h] * to_log2_;
      const float weight = ptx::exp2_approx(-fabsf(above));
      const float sum = above > 0 ? fmaf(sum_[h], weight, 1.0F) : sum_[h] + weight;
      const float scale = v_scale_ * (above > 0 ? weight : 1.0F) * ptx::reciprocal_approx(sum);
      (*factor)[h] *= max_[h] == -INFINITY && sum_[h] == sum_[h] ? 0.0F : scale;
    }
  }

  __device__ __forceinline__ float normalise_with_lse(const WindowTask& task, int step,
                                                      int h) const {
    const bool has_sink = p_.layer.sinks != nullptr;
    const WorkTile& tile = task.item.split.tile;
    const std::int64_t head = task.item.split.head * p_.layer.group + head_[h];
    const auto normalised =
        semantics::normalise(semantics::SoftmaxState<float>{max_[h] * (kLn2 * to_log2_), sum_[h]},
                             has_sink, has_sink ? p_.layer.sinks[head] : 0.0F);
    const int token = step * tokens_ + token_[h];
    if (ptx::is_first_of_row(lane()) && token_[h] < tokens_ && token * p_.layer.group < tile.rows) {
      p_.lse[head * p_.lse_head_stride + (tile.first_token + token) * p_.lse_token_stride] =
          normalised.lse;
    }
    return normalised.output_scale * v_scale_;
  }

  // O, normalised, over its queries.
  __device__ __forceinline__ void write_rows(const float (&factor)[2]) {
    const std::uint32_t own = rows() + static_cast<std::uint32_t>(warp()) * 16 * 128;
    sync_warpgroup();           // its products have read the queries
    const int r = lane() % 16;  // the row whose address this lane gives to stmatrix
#pragma unroll
    for (int n = 0; n < C::kHeadSize / 8; n += 2) {
      const int piece = n + lane() / 16;
      std::uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        words[i] =
            Type::pack(o_[n * 4 + 2 * i] * factor[i % 2], o_[n * 4 + 2 * i + 1] * factor[i % 2]);
      }
      ptx::store_matrices(own + static_cast<std::uint32_t>(r * 128 + ((piece ^ (r % 8)) << 4)),
                          words);
    }
    ptx::fence_async_proxy();
    __syncwarp();
    if (lane() == 0) ptx::mbarrier_arrive(barrier_address(shared_.output_full[buffer_.index]));
  }

  // Each warp its own rows.
  __device__ __forceinline__ void change_queries() {
    const std::uint32_t at = rows() + static_cast<std::uint32_t>((warp() * 32 + lane()) * 64);
#pragma unroll 1
    for (int i = 0; i < 64; i += 16) {
      const uint4 x = ptx::load_piece(at + static_cast<std::uint32_t>(i));
      ptx::store_piece(at + static_cast<std::uint32_t>(i), change_(x.x), change_(x.y), change_(x.z),
                       change_(x.w));
    }
    ptx::fence_async_proxy();
    sync_warpgroup();
  }

  // V rows that may not be read, in boxes that others are read of, to zero: what they hold may be
  // NaN, which a weight of 0 does not hide. Each consumer does this for itself.
  __device__ __forceinline__ void clear_values(const WindowTask& task) {
    const LoadableKeys& loadable = task.item.keys;
    const int thread = static_cast<int>(threadIdx.x % kWarpgroup);
#pragma unroll 1
    for (int k = thread; k < kSpanKeys; k += kWarpgroup) {
      const int key = task.first_key + k;
      if (key < loadable.kv_len &&
          (key < loadable.out_of_window_begin || key >= loadable.out_of_window_end)) {
        continue;
      }
      const std::uint32_t at =
          keys() + C::kSpanBytes + static_cast<std::uint32_t>(k / 8 * C::kKeyStride + k % 8 * 128);
#pragma unroll
      for (int i = 0; i < C::kRowBytes; i += 16) {
        ptx::store_piece(at + static_cast<std::uint32_t>(i), 0, 0, 0, 0);
      }
    }
    ptx::fence_async_proxy();
    sync_warpgroup();
  }

  static constexpr float kLn2 = 0.6931471805599453F;

  const KernelParams& p_;
  const std::uint32_t memory_;
  WindowShared<C>& shared_;
  const int warpgroup_;
  const int tokens_;  // of a step
  const int window_;
  const QueryChange change_;
  int next_step_;  // of the next item
  // Of the item: its first row's position, the first key of its span, the sequence's keys.
  int item_pos_;
  int item_key_;
  int kv_len_;
  float to_log2_;  // from products to exponents of 2
  float v_scale_;
  int token_[2];                                 // of this thread's rows, within the step
  int head_[2];                                  // within the group
  float sink_log2_[2] = {-INFINITY, -INFINITY};  // no sink
  float s_[2][kStepKeys / 4];
  float o_[C::kHeadSize / 2];
  float max_[2];  // of products
  float sum_[2];
  ptx::RingPosition span_;
  ptx::RingPosition buffer_;
};

template <class C>
__device__ __forceinline__ void init_barriers(WindowShared<C>& shared) {
  constexpr int kConsumerWarps = C::kConsumers * kWarpgroup / 32;
  for (int i = 0; i < kWindowTasks; ++i) {
    ptx::mbarrier_init(barrier_address(shared.task_full[i]), 32);
    // Consumers, and the three warps that move rows, K and V.
    ptx::mbarrier_init(barrier_address(shared.task_empty[i]), C::kConsumers * kWarpgroup + 3 * 32);
  }
  for (int i = 0; i < C::kSpans; ++i) {
    ptx::mbarrier_init(barrier_address(shared.span_full[i]), 1);
    ptx::mbarrier_init(barrier_address(shared.span_empty[i]), kConsumerWarps);
  }
  for (int i = 0; i < C::kBuffers; ++i) {
    ptx::mbarrier_init(barrier_address(shared.query_full[i]), 1);
    ptx::mbarrier_init(barrier_address(shared.output_full[i]), kWarpgroup / 32);
    ptx::mbarrier_init(barrier_address(shared.rows_empty[i]), 1);
  }
  ptx::mbarrier_fence_init();
}

template <class C>
__global__ void __launch_bounds__(C::kThreads, 1)
    attention_window(const __grid_constant__ KernelParams p, const __grid_constant__ KvMaps maps,
                     const __grid_constant__ RowMaps row_maps) {
  extern __shared__ __align__(1024) char memory[];
  auto& shared = *reinterpret_cast<WindowShared<C>*>(memory + C::kSharedAt);
  if (threadIdx.x == 0) init_barriers(shared);
  __syncthreads();
  const int warpgroup = ptx::warpgroup_index();
  if (warpgroup == C::kConsumers) {
    ptx::give_registers<C::kProducerRegisters>();
    const int warp = static_cast<int>(threadIdx.x / 32) % 4;
    if (warp == 0) {
      find_items(p, shared);
    } else if (warp == 1) {
      load_spans(p, maps, memory, shared);
    } else if (warp == 2) {
      load_queries(p, row_maps, memory, shared);
    } else {
      store_outputs(p, row_maps, memory, shared);
    }
  } else {
    ptx::take_registers<C::kConsumerRegisters>();
    WindowConsumer<C>(p, memory, shared, warpgroup).run();
  }
}

}  // namespace quire::cuda::sm90
