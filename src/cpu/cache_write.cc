// New K and V rows into the cache. Memory-bound copies: plain loops over semantics/, tokens in
// parallel.
#include <algorithm>
#include <bit>
#include <cstring>

#include "cpu/layer_plan.h"
#include "semantics/kv_row.h"

namespace quire::cpu {
namespace {

struct NewRows {
  const void* data;
  std::int64_t token_stride;
  std::int64_t head_stride;
  std::int64_t size;
};

void write_side(const CacheWriteParams& p, const KvParams& kv, const NewRows& x, std::int64_t token,
                std::int64_t slot) {
  const std::int64_t block = slot / p.block_size;
  const std::int64_t offset = slot % p.block_size;
  const float scale = semantics::value_of(kv.scale);
  for (std::int32_t head = 0; head < p.num_kv_heads; ++head) {
    const char* from = static_cast<const char*>(x.data) +
                       (token * x.token_stride + head * x.head_stride) * size_of(p.dtype);
    char* to = static_cast<char*>(kv.data) +
               semantics::cache_offset(kv.strides, block, offset, head) * size_of(kv.dtype);
    if (kv.dtype == p.dtype) {
      std::memcpy(to, from, static_cast<std::size_t>(x.size * size_of(p.dtype)));
      continue;
    }
    float* token_scale = kv.token_scales == nullptr
                             ? nullptr
                             : kv.token_scales + semantics::cache_offset(kv.token_scale_strides,
                                                                         block, offset, head);
    semantics::store_kv_row(from, p.dtype, x.size, to, kv.dtype, scale, token_scale);
  }
}

// K, V and scales of one token, whole.
class TokenWriter {
 public:
  explicit TokenWriter(const CacheWriteParams& p)
      : p_(p),
        key_{p.key, p.key_token_stride, p.key_head_stride, p.head_size},
        value_{p.value, p.value_token_stride, p.value_head_stride, p.head_size_v},
        num_slots_(p.num_blocks * p.block_size) {}

  // Negative slots are padding.
  bool exists(std::int64_t slot) const { return slot >= 0 && slot < num_slots_; }
  void write(std::int64_t token, std::int64_t slot) const {
    write_side(p_, p_.k, key_, token, slot);
    write_side(p_, p_.v, value_, token, slot);
  }

 private:
  const CacheWriteParams& p_;
  const NewRows key_;
  const NewRows value_;
  const std::int64_t num_slots_;
};

std::uint64_t hash(std::int64_t x) { return static_cast<std::uint64_t>(x) * 0x9E3779B97F4A7C15U; }

// Slots seen so far: a hash table of words of 64 slots, with a bit for each. The tokens of a
// prefill have slots in sequence, so that most of them are in the word found last.
class SlotSet {
 public:
  explicit SlotSet(std::int64_t num_tokens)
      : size_(std::bit_ceil(static_cast<std::uint64_t>(std::min(2 * num_tokens, kMost)))),
        shift_(64 - std::countr_zero(size_)) {
    std::fill(words_, words_ + size_, -1);
  }

  // False if the slot was there already, or if there is no room for its word.
  bool add(std::int64_t slot) {
    const std::int64_t word = slot / 64;
    if (words_[at_] != word) {
      at_ = find(word);
      if (words_[at_] < 0) {
        if (++used_ > size_ / 4 * 3) return false;
        words_[at_] = word;
        taken_[at_] = 0;
      }
    }
    const std::uint64_t bit = std::uint64_t{1} << (slot % 64);
    const bool is_new = (taken_[at_] & bit) == 0;
    taken_[at_] |= bit;
    return is_new;
  }

 private:
  // 32 KiB of stack. Enough for 1,536 words: as many decodes, or a prefill of 24,576 tokens in
  // scattered blocks of 16.
  static constexpr std::int64_t kMost = 2048;

  std::uint64_t find(std::int64_t word) const {
    std::uint64_t i = hash(word) >> shift_;
    while (words_[i] >= 0 && words_[i] != word) i = (i + 1) & (size_ - 1);
    return i;
  }

  const std::uint64_t size_;
  const int shift_;
  std::uint64_t at_ = 0;
  std::uint64_t used_ = 0;
  std::int64_t words_[kMost];  // -1: free
  std::uint64_t taken_[kMost];
};

// Also true for batches with more words than a SlotSet has room for.
bool may_have_duplicates(const CacheWriteParams& p, const TokenWriter& writer) {
  SlotSet slots(p.num_slots);
  for (std::int64_t token = 0; token < p.num_slots; ++token) {
    const std::int64_t slot = p.slot_mapping[token];
    if (writer.exists(slot) && !slots.add(slot)) return true;
  }
  return false;
}

// Enough tokens for a task that handing it out costs little beside the copying.
constexpr std::int64_t kTokensPerTask = 16;

}  // namespace

void run_cache_write(const CacheWriteParams& p, ThreadPool& pool) {
  const TokenWriter writer(p);
  const std::int64_t tokens_per_task = pool.num_threads() == 1 ? p.num_slots : kTokensPerTask;
  if (p.num_slots > tokens_per_task && may_have_duplicates(p, writer)) {
    // The last token of a slot must win: each task has slots of its own and goes through all tokens
    // in order.
    const auto num_tasks = static_cast<std::uint64_t>(pool.num_threads());
    auto task = [&](std::int64_t i, int) {
      for (std::int64_t token = 0; token < p.num_slots; ++token) {
        const std::int64_t slot = p.slot_mapping[token];
        if (!writer.exists(slot) || (hash(slot) >> 32) % num_tasks != static_cast<std::uint64_t>(i))
          continue;
        writer.write(token, slot);
      }
    };
    parallel_for(pool, pool.num_threads(), task);
    return;
  }
  auto task = [&](std::int64_t i, int) {
    const std::int64_t end = std::min((i + 1) * tokens_per_task, p.num_slots);
    for (std::int64_t token = i * tokens_per_task; token < end; ++token) {
      const std::int64_t slot = p.slot_mapping[token];
      if (writer.exists(slot)) writer.write(token, slot);
    }
  };
  if (p.num_slots == 0) return;
  parallel_for(pool, (p.num_slots + tokens_per_task - 1) / tokens_per_task, task);
}

}  // namespace quire::cpu
