// The warpgroup of the prefill kernel that makes 16-bit tiles of an 8-bit cache's:
//
//   bytes ring, as the copy engine brought it -> registers -> fp16 or bf16, exactly -> K or V ring
//
// so that all else is as over a cache of 16 bits. The decode kernel widens on the way to the A operand
// instead: here weights would have to go through shared memory then, as the B operand.
#pragma once

#include "cuda/ptx/widen.cuh"
#include "cuda/sm90/prefill/loaders.cuh"

namespace quire::cuda::sm90 {

template <class C>
class KvWidener {
  static constexpr int kPieces = C::kHeadSize / 16;  // of 16 bytes, of a key
  static constexpr int kKeysAtOnce = kWarpgroup / kPieces;
  static constexpr int kGroupBytes = 8 * C::kHeadSize;  // of eight keys, as they are stored
  static_assert(kKeysAtOnce % 8 == 0);

 public:
  __device__ __forceinline__ KvWidener(const KernelParams& p, char* memory,
                                       PrefillShared<C>& shared)
      : p_(p),
        shared_(shared),
        memory_(ptx::shared_address(memory)),
        key_(static_cast<int>(threadIdx.x) % kWarpgroup / kPieces),
        piece_(static_cast<int>(threadIdx.x) % kPieces) {}

  __device__ __forceinline__ void run() {
    ptx::RingPosition task;
    while (true) {
      ptx::mbarrier_wait(barrier_address(shared_.task_full[task.index]), task.parity);
      if (!shared_.task[task.index].exists) break;
      const int count = shared_.task[task.index].count;
      ptx::mbarrier_arrive(barrier_address(shared_.task_empty[task.index]));
      task.advance(kTasks);
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        widen(p_.k.dtype, C::kKeysAt, shared_.k_empty, shared_.k_full);
        widen(p_.v.dtype, C::kValuesAt, shared_.v_empty, shared_.v_full);
        stage_.advance(C::kStages);
      }
    }
  }

 private:
  // The tile at bytes_ to that at stage_ of the ring that begins at `ring`.
  __device__ __forceinline__ void widen(DType dtype, int ring, std::uint64_t (&empty)[C::kStages],
                                        std::uint64_t (&full)[C::kStages]) {
    const std::uint32_t from = memory_ + C::kBytesAt + bytes_.index * C::kByteTileBytes;
    const std::uint32_t to =
        memory_ + static_cast<std::uint32_t>(ring) + stage_.index * C::kTileBytes;
    ptx::mbarrier_wait(barrier_address(shared_.bytes_full[bytes_.index]), bytes_.parity);
    ptx::mbarrier_wait(barrier_address(empty[stage_.index]), stage_.parity ^ 1U);
    if (dtype == DType::kFloat8E4M3) {
      widen_tile<ptx::E4M3>(from, to);
    } else {
      widen_tile<ptx::E5M2>(from, to);
    }
    ptx::mbarrier_arrive(barrier_address(shared_.bytes_empty[bytes_.index]));
    ptx::fence_async_proxy();
    ptx::mbarrier_arrive(barrier_address(full[stage_.index]));
    bytes_.advance(C::kByteStages);
  }

  // A thread has one piece of every kKeysAtOnce-th key. Where its bytes and its elements lie, as the
  // swizzles have it, is the same in each eight keys.
  template <class Stored>
  __device__ __forceinline__ void widen_tile(std::uint32_t from, std::uint32_t to) const {
    const int k = key_ % 8;
    const int place = C::kHeadSize == 128 ? piece_ ^ k : piece_ ^ k / 2;
    from += static_cast<std::uint32_t>(key_ / 8 * kGroupBytes + k * C::kHeadSize + place * 16);
    // The pieces of the second column the other way round: no two lanes write to the same bank.
    const int column = piece_ / 4;
    to += static_cast<std::uint32_t>(key_ / 8 * C::kKeyStride + column * 1024 + k * 128);
    const bool swapped = column == 1;
    const int first = (piece_ % 4 * 2 + column) ^ k;
    const std::uint32_t low = to + static_cast<std::uint32_t>(first << 4);
    const std::uint32_t high = to + static_cast<std::uint32_t>((first ^ 1) << 4);
    // Loads first: one after the other each would wait for the one before.
    constexpr int kAhead = 4;
    constexpr int kTurns = C::kKeys / kKeysAtOnce;
    static_assert(kTurns % kAhead == 0);
#pragma unroll 1
    for (int i = 0; i < kTurns; i += kAhead) {
      uint4 bytes[kAhead];
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        bytes[u] = ptx::load_piece(from + (i + u) * (kKeysAtOnce / 8 * kGroupBytes));
      }
#pragma unroll
      for (int u = 0; u < kAhead; ++u) {
        std::uint32_t x[8];
        ptx::widen_sixteen<typename C::Type, Stored>(bytes[u], x);
        const std::uint32_t at = (i + u) * (kKeysAtOnce / 8 * C::kKeyStride);
        ptx::store_piece(low + at, swapped ? x[4] : x[0], swapped ? x[5] : x[1],
                         swapped ? x[6] : x[2], swapped ? x[7] : x[3]);
        ptx::store_piece(high + at, swapped ? x[0] : x[4], swapped ? x[1] : x[5],
                         swapped ? x[2] : x[6], swapped ? x[3] : x[7]);
      }
    }
  }

  const KernelParams& p_;
  PrefillShared<C>& shared_;
  const std::uint32_t memory_;
  const int key_;    // this thread's first
  const int piece_;  // 16 bytes of it
  ptx::RingPosition stage_;
  ptx::RingPosition bytes_;
};

}  // namespace quire::cuda::sm90
