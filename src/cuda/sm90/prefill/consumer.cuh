// A consumer warpgroup of the prefill kernel: its 64 rows through all kv tiles of an item, and out.
#pragma once

#include "cuda/ptx/wgmma.cuh"
#include "cuda/sm90/prefill/loaders.cuh"
#include "cuda/sm90/prefill/rows.cuh"

namespace quire::cuda::sm90 {

template <class C>
class PrefillConsumer {
  using Type = typename C::Type;
  static constexpr int kHalf = C::kKeys / 2;

 public:
  __device__ __forceinline__ PrefillConsumer(const KernelParams& p, const KvMaps& maps,
                                             char* memory, PrefillShared<C>& shared, int warpgroup)
      : p_(p),
        maps_(maps),
        memory_(ptx::shared_address(memory)),
        shared_(shared),
        warpgroup_(warpgroup) {
    // At 0 a masked -inf would turn into NaN.
    const float scale =
        fmaxf(fabsf(p.layer.softmax_scale * value_of(p.q_scale) * value_of(p.k.scale)), 1e-37F);
    scale_ = __shfl_sync(
        ~0U, C::kSoftCap ? SoftCap::factor(p.layer.soft_cap, scale) : scale * kLog2E, 0);
  }

  __device__ __forceinline__ void run() {
    // Before anything is stored: an output may lie where the write reads.
    ptx::await_launch();
    if (warpgroup_ == C::kConsumers - 1) pass_turn();  // the first turn is warpgroup 0's
    while (true) {
      ptx::mbarrier_wait(barrier_address(shared_.task_full[task_.index<kTasks>()]),
                         task_.parity<kTasks>());
      const PrefillTask& task = shared_.task[task_.index<kTasks>()];
      if (ptx::uniform(task.exists ? 1 : 0) == 0) break;
      attend(task);
      finish(task);
      ptx::mbarrier_arrive(
          barrier_address(shared_.output_full[task_.index<C::kQueryBuffers>()][warpgroup_]));
      ptx::mbarrier_arrive(barrier_address(shared_.task_empty[task_.index<kTasks>()]));
      task_.advance();
    }
  }

 private:
  // Found anew each time: kept over the loop, they would take its registers.
  static __device__ __forceinline__ int lane() {
    return static_cast<int>(ptx::opaque(threadIdx.x) % 32);
  }
  // Thread and warp within the warpgroup.
  static __device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x % 128); }
  static __device__ __forceinline__ int warp() {
    return static_cast<int>(ptx::opaque(threadIdx.x) / 32 % 4);
  }
  // Row h of this thread within the tile.
  __device__ __forceinline__ int row(int h) const {
    return warpgroup_ * 64 + warp() * 16 + h * 8 + ptx::fragment_row(lane());
  }
  __device__ __forceinline__ int warp_row() const { return warpgroup_ * 64 + warp() * 16; }
  __device__ __forceinline__ std::uint32_t queries() const {
    return memory_ + task_.index<C::kQueryBuffers>() * C::kQueryBytes +
           static_cast<std::uint32_t>(warpgroup_) * 64 * C::kRowBytes;
  }
  __device__ __forceinline__ void sync_warpgroup() const {
    ptx::sync_threads(kWarpgroupBarrier + warpgroup_, kWarpgroup);
  }
  __device__ __forceinline__ void await_turn() {
    if (C::kKeepsTurn) pass_kept_turn();
    ptx::sync_threads(kTurnBarrier + warpgroup_, 2 * kWarpgroup);
  }
  __device__ __forceinline__ void pass_kept_turn() {
    if (keeps_turn_) pass_turn();
    keeps_turn_ = false;
  }
  __device__ __forceinline__ void pass_turn() const {
    const int next = warpgroup_ + 1 < C::kConsumers ? warpgroup_ + 1 : 0;
    ptx::arrive_threads(kTurnBarrier + next, 2 * kWarpgroup);
  }
  __device__ __forceinline__ void release(const std::uint64_t& barrier) const {
    if (thread() == 0) ptx::mbarrier_arrive(barrier_address(barrier));
  }

  // From what rows_.s holds when the softmax begins to exponents of 2 and to natural logits.
  __device__ __forceinline__ float to_log2() const { return C::kSoftCap ? kLog2E : scale_; }
  __device__ __forceinline__ float to_natural() const {
    constexpr float kLn2 = 0.6931471805599453F;
    return C::kSoftCap ? 1.0F : scale_ * kLn2;
  }
  __device__ __forceinline__ const TileInfo& tile_info() const {
    return shared_.tile[stage_.index<2 * C::kStages>()];
  }
  __device__ __forceinline__ void wait_keys() const {
    ptx::mbarrier_wait(barrier_address(shared_.k_full[stage_.index<C::kStages>()]),
                       stage_.parity<C::kStages>());
  }
  __device__ __forceinline__ void wait_values() const {
    ptx::mbarrier_wait(barrier_address(shared_.v_full[stage_.index<C::kStages>()]),
                       stage_.parity<C::kStages>());
  }

  // ---- the loop -----------------------------------------------------------------------------

  // A task's kv tiles into rows_, the last first.
  __device__ __forceinline__ void attend(const PrefillTask& task) {
    rows_.clear();
    if (task.split.whole() && task.split.tile.prefix_row >= 0 &&
        p_.schedule.shared_rows == nullptr) {
      start_behind_prefix(task.split);
    }
    if constexpr (C::kUnmappedApart) {
      __syncwarp();  // all have read those of the task before
      if (lane() < 16) shared_.unmapped[warp_row() + lane()] = 0.0F;
      __syncwarp();
    }
    ptx::mbarrier_wait(barrier_address(shared_.query_full[task_.index<C::kQueryBuffers>()]),
                       task_.parity<C::kQueryBuffers>());
    const int plain_begin = ptx::uniform(task.plain_begin);
    int plain_end = 0;  // of those whose maximum is expected to be known: not the first
#pragma unroll 1
    for (int i = ptx::uniform(task.count) - 1; i >= 0; --i) {
      wait_keys();
      if (i >= plain_begin && i < plain_end && !has_unmapped()) {
        step();
      } else {
        VisibleColumns visible[2];
        const int keys = see(task, visible);
        if (keys > 0) {
          masked_step(task, keys, visible);
          plain_end = ptx::uniform(task.plain_end);
        } else {
          skip();
        }
      }
      stage_.advance();
    }
    if (C::kKeepsTurn) pass_kept_turn();
  }

  // Of the tile at stage_.
  __device__ __forceinline__ bool has_unmapped() const {
    return C::kUnmappedApart && __any_sync(~0U, tile_info().unmapped != 0);
  }

  // The state of rows that have seen a shared prefix's keys.
  __device__ __forceinline__ void start_behind_prefix(const Split& split) {
    const float to_scores = ptx::reciprocal_approx(to_natural());
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const PrefixRow from(p_, split, row(h));
      rows_.load(h, from.o);
      rows_.max[h] = *from.max * to_scores;
      rows_.sum[h] = ptx::is_first_of_row(lane()) ? *from.sum : 0.0F;
    }
  }

  // What this thread's rows see of the tile at stage_. Returns how many keys, from its first on, the
  // warpgroup's rows need: rounded up to all, a half or a quarter; 0: none.
  __device__ __forceinline__ int see(const PrefillTask& task, VisibleColumns (&visible)[2]) const {
    const int first = tile_info().first;
    const int column = ptx::fragment_column(lane());
    int end;
    if (ptx::uniform(task.plain_causal ? 1 : 0) != 0) {
      const int begin = task.split.tile.kv_begin - first;
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        visible[h] = VisibleColumns(begin, causal_end(p_, task, row(h)) - first, column);
      }
      const int rows = task.split.tile.rows;
      end = warpgroup_ * 64 < rows
                ? causal_end(p_, task, min(warpgroup_ * 64 + 63, rows - 1)) - first
                : 0;
    } else {
      // The four threads of a row share the work: even ones look at row 0, odd ones at row 1.
      const int odd = lane() % 2;
      const int4 own = visible_of_row(p_, task, row(odd));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int from = lane() - odd + h;
        visible[h] =
            VisibleColumns(make_int4(__shfl_sync(~0U, own.x, from), __shfl_sync(~0U, own.y, from),
                                     __shfl_sync(~0U, own.z, from), __shfl_sync(~0U, own.w, from)),
                           first, column);
      }
      end = own.w > own.z && own.w > first ? own.w - first : (own.y > own.x ? own.y - first : 0);
      const auto any = [&](bool value) {
        return ptx::any_of_threads(kWarpgroupBarrier + warpgroup_, kWarpgroup, value);
      };
      end = any(end > kHalf) ? C::kKeys : (any(end > kHalf / 2) ? kHalf : (any(end > 0) ? 1 : 0));
    }
    return ptx::uniform(end > kHalf ? C::kKeys
                                    : (end > kHalf / 2 ? kHalf : (end > 0 ? kHalf / 2 : 0)));
  }

  // The tile at stage_, whose K has arrived, without a look at it. It is given back where all warps
  // of the warpgroup have met: one that has not waited for it yet would miss its phase when the next
  // tile is there first. (Elsewhere products keep the warps together.)
  __device__ __forceinline__ void skip() {
    const std::uint32_t s = stage_.index<C::kStages>();
    wait_values();
    await_turn();
    release(shared_.k_empty[s]);
    release(shared_.v_empty[s]);
    pass_turn();
  }

  // A tile that all rows see, and not their first.
  __device__ __forceinline__ void step() {
    const std::uint32_t s = stage_.index<C::kStages>();
    const std::uint32_t tile = stage_.count() + 1;
    std::uint32_t weights[C::kKeys / 4];
    multiply_keys();
    cap();
    if (rows_.softmax_as_before(to_log2(), weights)) shared_.rare[warpgroup_] = tile;
    wait_values();
    await_turn();  // and for what the other threads have found
    if (__any_sync(~0U, shared_.rare[warpgroup_] == tile)) {
      multiply_keys();
      cap();
      rows_.softmax_again(to_log2(), weights);
    } else {
      rows_.keep_sums();
    }
    release(shared_.k_empty[s]);
    multiply_values<C::kKeys>(weights);
    release(shared_.v_empty[s]);
  }

  // Any other. `keys`: those to multiply V of.
  __device__ __forceinline__ void masked_step(const PrefillTask& task, int keys,
                                              const VisibleColumns (&visible)[2]) {
    const std::uint32_t s = stage_.index<C::kStages>();
    multiply_keys();
    release(shared_.k_empty[s]);
    cap();
    rows_.mask(visible);
    set_unmapped_apart();
    std::uint32_t weights[C::kKeys / 4];
    rows_.softmax(to_log2(), weights);
    wait_values();
    if (tile_info().partial) clear_values(task.keys, tile_info().first);
    await_turn();
    // Each a whole fence to wait of its own: no product crosses a branch.
    if (keys == C::kKeys) {
      multiply_values<C::kKeys>(weights);
    } else if (keys == kHalf) {
      multiply_values<kHalf>(weights);
    } else {
      multiply_values<kHalf / 2>(weights);
    }
    release(shared_.v_empty[s]);
  }

  __device__ __forceinline__ void cap() {
    if constexpr (C::kSoftCap) rows_.apply(SoftCap(p_.layer.soft_cap, scale_));
  }

  __device__ __forceinline__ void set_unmapped_apart() {
    if constexpr (C::kUnmappedApart) {
      const std::uint32_t unmapped = tile_info().unmapped;
      if (unmapped != 0) {
        rows_.set_unmapped_apart(unmapped, maps_.box_keys, to_log2(),
                                 shared_.unmapped + warp_row());
      }
    }
  }

  // S = Q K^T of the tile at stage_.
  __device__ __forceinline__ void multiply_keys() {
    namespace wgmma = ptx::wgmma;
    const std::uint32_t a = wgmma::descriptor_low(queries(), 16);
    const std::uint32_t b = wgmma::descriptor_low(
        memory_ + C::kKeysAt + stage_.index<C::kStages>() * C::kTileBytes, 16);
    wgmma::fence();
#pragma unroll
    for (int k = 0; k < C::kHeadSize / 16; ++k) {
      wgmma::multiply<Type, C::kKeys, 0, 0>(
          rows_.s, wgmma::swizzled(a, k / 4 * 64 * 128 + k % 4 * 32, 1024),
          wgmma::swizzled(b, k / 4 * 1024 + k % 4 * 32, C::kKeyStride), k > 0);
    }
    wgmma::commit();
    if (C::kKeepsTurn) pass_kept_turn();
    wgmma::wait<0>();
    wgmma::keep(rows_.s);
  }

  // O += P V of the first kCount keys.
  template <int kCount>
  __device__ __forceinline__ void multiply_values(const std::uint32_t (&weights)[C::kKeys / 4]) {
    namespace wgmma = ptx::wgmma;
    const std::uint32_t b = wgmma::descriptor_low(
        memory_ + C::kValuesAt + stage_.index<C::kStages>() * C::kTileBytes, 1024);
    wgmma::fence();
#pragma unroll
    for (int k = 0; k < kCount / 16; ++k) {
      wgmma::multiply<Type, C::kHeadSize, 1>(
          rows_.o, weights + 4 * k, wgmma::swizzled(b, k * 2 * C::kKeyStride, C::kKeyStride), true);
    }
    wgmma::commit();
    if (C::kKeepsTurn) {
      keeps_turn_ = true;
    } else {
      pass_turn();
    }
    wgmma::wait<0>();
    wgmma::keep(rows_.o);
  }

  // V rows that may not be read, in blocks that others are read of, to zero: what they hold may be
  // NaN, which a weight of 0 does not hide. Each consumer does this for itself, before it
  // multiplies.
  __device__ __forceinline__ void clear_values(const LoadableKeys& keys, int first) {
    for (int k = thread(); k < C::kKeys; k += kWarpgroup) {
      const int key = first + k;
      if (key < keys.kv_len && (key < keys.out_of_window_begin || key >= keys.out_of_window_end)) {
        continue;
      }
      const std::uint32_t at = memory_ + C::kValuesAt + stage_.index<C::kStages>() * C::kTileBytes +
                               static_cast<std::uint32_t>(k / 8 * C::kKeyStride + k % 8 * 128);
#pragma unroll
      for (int i = 0; i < C::kRowBytes / 16; ++i) {
        ptx::store_piece(at + i / 8 * 1024 + i % 8 * 16, 0, 0, 0, 0);
      }
    }
    ptx::fence_async_proxy();
    sync_warpgroup();
  }

  // ---- the end ------------------------------------------------------------------------------

  __device__ __forceinline__ void finish(const PrefillTask& task) {
    rows_.add_up();
    rows_.max[0] *= to_natural();
    rows_.max[1] *= to_natural();
    if constexpr (C::kUnmappedApart) {
      __syncwarp();
      rows_.combine_unmapped(shared_.unmapped + warp_row());
    }
    if (!task.split.whole()) {
      store_partial(task);
    } else if (p_.schedule.shared_rows != nullptr) {
      store_prefix(task.split);
    } else {
      leave_rows(task.split);
    }
  }

  // Rows of a shared prefix's tile, as they are, for the tiles behind it.
  __device__ __forceinline__ void store_prefix(const Split& split) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      if (row(h) >= split.tile.rows) continue;
      const PrefixRow to(p_, split, row(h));
      if (ptx::is_first_of_row(lane())) {
        *to.max = rows_.max[h];
        *to.sum = rows_.sum[h];
      }
      rows_.store(h, to.o);
    }
  }

  // Normalises the rows of a whole item and leaves them over their queries, for RowCopier.
  __device__ __forceinline__ void leave_rows(const Split& split) {
    const std::uint32_t own = queries() + static_cast<std::uint32_t>(warp()) * 16 * 128;
    float scale[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      scale[h] = normalise_row(p_, split, row(h), rows_.max[h], rows_.sum[h],
                               ptx::is_first_of_row(lane()));
    }
    sync_warpgroup();           // its products have read the queries
    const int r = lane() % 16;  // the row whose address this lane gives to stmatrix
#pragma unroll
    for (int n = 0; n < C::kHeadSize / 8; n += 2) {
      const int piece = n + lane() / 16;
      std::uint32_t words[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float x = rows_.o[n * 4 + 2 * i] * scale[i % 2];
        const float y = rows_.o[n * 4 + 2 * i + 1] * scale[i % 2];
        words[i] = Type::pack(x, y);
      }
      ptx::store_matrices(own + static_cast<std::uint32_t>(piece / 8 * 64 * 128 + r * 128 +
                                                           (((piece % 8) ^ (r % 8)) << 4)),
                          words);
    }
  }

  // Rows of a part of an item: as a partial to global memory.
  __device__ __forceinline__ void store_partial(const PrefillTask& task) {
    const Split& split = task.split;
    const int part = split.kv_tile_begin > 0 ? 1 : 0;
    const PartialRows to = partial_rows<C::kRows>(p_.schedule, shared_.queue.cta(), part);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int r = row(h);
      if (r >= split.tile.rows) continue;
      if (ptx::is_first_of_row(lane())) {
        to.max[r] = rows_.max[h];
        to.sum[r] = rows_.sum[h];
      }
      rows_.store(h, to.o + std::int64_t{r} * to.pitch);
    }
    if (threadIdx.x == 0) shared_.part[part] = task;
  }

  const KernelParams& p_;
  const KvMaps& maps_;
  const std::uint32_t memory_;
  PrefillShared<C>& shared_;
  const int warpgroup_;
  // Of products: to exponents of 2, or what SoftCap needs.
  float scale_;
  PrefillRows<C> rows_;
  bool keeps_turn_ = false;  // with C::kKeepsTurn
  ptx::RingCounter stage_;   // of K and V
  ptx::RingCounter task_;    // of tasks and of queries
};

}  // namespace quire::cuda::sm90
