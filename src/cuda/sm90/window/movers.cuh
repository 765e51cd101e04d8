// The fourth warpgroup of the window kernel, a warp a role: finding items, having K and V loaded,
// having queries loaded, having outputs stored.
#pragma once

#include "cuda/ptx/tma.cuh"
#include "cuda/sm90/window/config.cuh"

namespace quire::cuda::sm90 {

// One warp: the items of this CTA into task[], one after the other, and one that does not exist.
template <class C>
__device__ __forceinline__ void find_items(const KernelParams& p, WindowShared<C>& shared) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int rows = step_tokens(p.layer) * p.layer.group;
  WorkQueue& queue = shared.queue;  // not in registers: there are few
  if (lane == 0) {
    queue = WorkQueue(p.schedule, static_cast<std::int32_t>(blockIdx.x),
                      static_cast<std::int32_t>(gridDim.x));
  }
  ptx::RingPosition at;
  for (bool exists = true; exists; at.advance(kWindowTasks)) {
    ptx::mbarrier_wait(barrier_address(shared.task_empty[at.index]), at.parity ^ 1U);
    WindowTask& task = shared.task[at.index];
    Split& split = task.item.split;
    const WorkTile* tile = nullptr;
    if (lane == 0) {
      tile = queue.next(p.schedule, &split.head, &split.kv_tile_begin, &split.kv_tile_end);
    }
    tile = reinterpret_cast<const WorkTile*>(
        __shfl_sync(~0U, reinterpret_cast<std::uintptr_t>(tile), 0));
    exists = tile != nullptr;
    constexpr int kPieces = sizeof(WorkTile) / 16;
    static_assert(sizeof(WorkTile) % 16 == 0 && kPieces <= 32);
    if (exists && lane < kPieces) {
      reinterpret_cast<uint4*>(&split.tile)[lane] = reinterpret_cast<const uint4*>(tile)[lane];
    }
    __syncwarp();
    if (lane == 0) {
      task.item.exists = exists;
      if (exists) {
        task.steps = (split.tile.rows + rows - 1) / rows;
        task.first_key = split.tile.main_first * kPageKeys;
        task.item.keys = loadable_keys(p, split.tile);
        task.partial = unreadable_keys(p, split.tile, task.item.keys, kPageKeys)
                           .are_in(task.item.keys, task.first_key,
                                   split.tile.main_count * kPageKeys, kPageKeys);
      }
    }
    ptx::mbarrier_arrive(barrier_address(shared.task_full[at.index]));  // as in find_tasks
    __syncwarp();
  }
}

// Calls f(task) for one item after the other, and gives each back.
template <class C, class F>
__device__ __forceinline__ void for_each_item(WindowShared<C>& shared, const F& f) {
  ptx::RingPosition at;
  while (true) {
    ptx::mbarrier_wait(barrier_address(shared.task_full[at.index]), at.parity);
    const WindowTask& task = shared.task[at.index];
    if (!task.item.exists) break;
    f(task);
    ptx::mbarrier_arrive(barrier_address(shared.task_empty[at.index]));
    at.advance(kWindowTasks);
  }
}

// One warp: K and V of each item, a lane a box. What no row of the item sees reads as zeros.
template <class C>
__device__ __forceinline__ void load_spans(const KernelParams& p, const KvMaps& maps, char* memory,
                                           WindowShared<C>& shared) {
  constexpr int kBoxes = kSpanKeys / kPageKeys;
  static_assert(kBoxes <= 32);
  constexpr int kBoxBytes = kPageKeys * C::kRowBytes;
  const int lane = static_cast<int>(threadIdx.x % 32);
  ptx::RingPosition span;
  for_each_item(shared, [&](const WindowTask& task) {
    KvBox box{KvBox::kUnread, 0};
    if (lane < task.item.split.tile.main_count) {
      box = kv_box(p, task.item, task.first_key + lane * kPageKeys, kPageKeys);
    }
    const std::uint32_t unmapped = __ballot_sync(~0U, box.block == KvBox::kUnmapped);
    ptx::await_launch();  // K and V may be this step's
    ptx::mbarrier_wait(barrier_address(shared.span_empty[span.index]), span.parity ^ 1U);
    const std::uint32_t full = barrier_address(shared.span_full[span.index]);
    if (lane == 0) {
      shared.unmapped[span.index] = unmapped;
      ptx::mbarrier_arrive_expect(full, 2 * C::kSpanBytes);
    }
    __syncwarp();
    if (lane < kBoxes) {
      const std::uint32_t to = ptx::shared_address(memory) + span.index * 2 * C::kSpanBytes +
                               static_cast<std::uint32_t>(lane * kBoxBytes);
      const std::int32_t head = task.item.split.head;
      ptx::load_box(to, &maps.k.map, full, 0, 0, 0, box.block * maps.k.heads_per_block + head,
                    box.eight, ptx::kEvictNormal);
      ptx::load_box(to + C::kSpanBytes, &maps.v.map, full, 0, 0, 0,
                    box.block * maps.v.heads_per_block + head, box.eight, ptx::kEvictNormal);
    }
    span.advance(C::kSpans);
  });
}

// Where the rows of a step are in the tensors of queries and outputs.
struct StepPlace {
  int head;
  int token;
  __device__ __forceinline__ StepPlace(const KernelParams& p, const WindowTask& task, int step,
                                       int tokens)
      : head(task.item.split.head * p.layer.group),
        token(static_cast<int>(task.item.split.tile.first_token) + step * tokens) {}
};

// One warp: the query rows of each step. A box behind the last token reads as zeros; rows of the
// next sequence are in the buffer, but never stored.
template <class C>
__device__ __forceinline__ void load_queries(const KernelParams& p, const RowMaps& maps,
                                             char* memory, WindowShared<C>& shared) {
  const int tokens = step_tokens(p.layer);
  const int bytes = tokens * p.layer.group * C::kRowBytes;
  const int lane = static_cast<int>(threadIdx.x % 32);
  ptx::RingPosition buffer;
  for_each_item(shared, [&](const WindowTask& task) {
#pragma unroll 1
    for (int i = 0; i < task.steps; ++i) {
      ptx::mbarrier_wait(barrier_address(shared.rows_empty[buffer.index]), buffer.parity ^ 1U);
      if (lane == 0) {
        const std::uint32_t full = barrier_address(shared.query_full[buffer.index]);
        const StepPlace place(p, task, i, tokens);
        ptx::mbarrier_arrive_expect(full, bytes);
        ptx::load_box(ptx::shared_address(memory) + C::kRowsAt + buffer.index * C::kRowsBytes,
                      &maps.query, full, 0, place.head, place.token, ptx::kEvictFirst);
      }
      buffer.advance(C::kBuffers);
    }
  });
}

// The rows of a step that ends behind its sequence's last token, one by one.
template <class C>
__device__ __forceinline__ void store_rows(const KernelParams& p, const WindowTask& task, int step,
                                           int tokens, std::uint32_t from) {
  constexpr int kPieces = C::kRowBytes / 16;
  const int lane = static_cast<int>(threadIdx.x % 32);
  const int group = p.layer.group;
  const StepPlace place(p, task, step, tokens);
  const int rows = task.item.split.tile.rows - step * tokens * group;
  auto* output = static_cast<std::uint16_t*>(p.output);
  const int piece = lane % kPieces;
#pragma unroll 1
  for (int r = lane / kPieces; r < rows; r += 32 / kPieces) {
    const int token = r / group;
    const std::int64_t row = (place.token + token) * p.output_token_stride +
                             (place.head + r - token * group) * p.output_head_stride;
    *reinterpret_cast<uint4*>(output + row + piece * 8) =
        ptx::load_piece(from + static_cast<std::uint32_t>(r * 128 + ((piece ^ (r % 8)) << 4)));
  }
}

// One warp: the output rows of each step, from where its queries were; then the buffer is given
// back to these.
template <class C>
__device__ __forceinline__ void store_outputs(const KernelParams& p, const RowMaps& maps,
                                              char* memory, WindowShared<C>& shared) {
  const int tokens = step_tokens(p.layer);
  const int rows = tokens * p.layer.group;
  const int lane = static_cast<int>(threadIdx.x % 32);
  ptx::await_launch();
  ptx::RingPosition buffer;
  for_each_item(shared, [&](const WindowTask& task) {
#pragma unroll 1
    for (int i = 0; i < task.steps; ++i) {
      ptx::mbarrier_wait(barrier_address(shared.output_full[buffer.index]), buffer.parity);
      const std::uint32_t from =
          ptx::shared_address(memory) + C::kRowsAt + buffer.index * C::kRowsBytes;
      if ((i + 1) * rows > task.item.split.tile.rows) {
        store_rows<C>(p, task, i, tokens, from);
      } else if (lane == 0) {
        const StepPlace place(p, task, i, tokens);
        ptx::store_box(&maps.output, 0, place.head, place.token, from, ptx::kEvictFirst);
        ptx::commit_stores();
        ptx::wait_stores_read<0>();
      }
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(barrier_address(shared.rows_empty[buffer.index]));
      buffer.advance(C::kBuffers);
    }
  });
}

}  // namespace quire::cuda::sm90
