#include "cuda/workspace.h"

#include <algorithm>
#include <bit>
#include <string>

#include "cuda/check.h"

namespace quire::cuda {

namespace {

// While it lives, this thread may take and give back memory although another stream is being
// captured, in this thread or another. Without it the call would fail, and that capture with it.
class BesideCaptures {
 public:
  BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  ~BesideCaptures() { cudaThreadExchangeStreamCaptureMode(&mode_); }
  BesideCaptures(const BesideCaptures&) = delete;
  BesideCaptures& operator=(const BesideCaptures&) = delete;

 private:
  cudaStreamCaptureMode mode_ = cudaStreamCaptureModeRelaxed;
};

}  // namespace

DeviceBuffer::~DeviceBuffer() {
  if (data_ == nullptr) return;
  const BesideCaptures beside_captures;
  cudaFree(data_);
}

void DeviceBuffer::allocate(std::size_t bytes, cudaStream_t stream, int fill) {
  if (is_capturing(stream)) {
    throw Error("stream",
                "a plan that has run a batch of this size before the capture (warm up first)",
                "a capture that would have to allocate " + std::to_string(bytes) + " bytes");
  }
  const BesideCaptures beside_captures;
  void* memory = nullptr;
  const cudaError_t error = cudaMalloc(&memory, bytes);
  if (error != cudaSuccess) {
    fail("cudaMalloc of a workspace of " + std::to_string(bytes) + " bytes", error);
  }
  data_ = static_cast<char*>(memory);
  size_ = bytes;
  check(cudaMemset(data_, fill, bytes), "cudaMemset of a workspace");
  check(cudaStreamSynchronize(nullptr), "cudaMemset of a workspace");
}

namespace {

// Parts of one allocation, each aligned.
class Carver {
 public:
  template <class T>
  std::size_t take(std::int64_t count) {
    const std::size_t at = size_;
    size_ += (static_cast<std::size_t>(count) * sizeof(T) + 255) / 256 * 256;
    return at;
  }
  std::size_t size() const { return size_; }

 private:
  std::size_t size_ = 0;
};

struct RuleOffsets {
  std::size_t header, tiles, work_ranges, first_tiles, seq_tiles, buckets;
};

RuleOffsets carve(Carver* carver, const TileRule& rule, std::int32_t max_seqs,
                  const AttentionKernel& kernel) {
  RuleOffsets at{};
  at.header = carver->take<ScheduleHeader>(1);
  at.tiles = carver->take<WorkTile>(rule.max_tiles);
  at.work_ranges = carver->take<WorkRange>(kMaxGrid + 1);
  at.first_tiles = carver->take<WorkTile>(kernel.awaits_partials ? rule.grid : 0);
  at.seq_tiles = carver->take<std::int32_t>(max_seqs);
  at.buckets = carver->take<CostBuckets>(1);
  return at;
}

CostBuckets* buckets_at(char* base, const RuleOffsets& at) {
  return reinterpret_cast<CostBuckets*>(base + at.buckets);
}

void set_pointers(char* base, const RuleOffsets& at, const AttentionKernel& kernel,
                  TileRule* rule) {
  rule->header = reinterpret_cast<ScheduleHeader*>(base + at.header);
  rule->tiles = reinterpret_cast<WorkTile*>(base + at.tiles);
  rule->work_ranges = reinterpret_cast<WorkRange*>(base + at.work_ranges);
  rule->seq_tiles = reinterpret_cast<std::int32_t*>(base + at.seq_tiles);
  rule->first_tiles =
      kernel.awaits_partials ? reinterpret_cast<WorkTile*>(base + at.first_tiles) : nullptr;
  rule->buckets = kernel.whole_items ? buckets_at(base, at) : nullptr;
}

// Of a family: arrivals of each CTA's item, and whole items taken.
constexpr std::size_t kCounters = kMaxGrid + 1;

// Partial results that a CTA may leave: one of the item that it begins, and of the item that it
// found begun one, or in batch-invariant mode one for each chunk.
int partials_per_cta(const LayerParams& layer, const AttentionKernel& kernel) {
  return layer.batch_invariant && kernel.kv_chunks ? 1 + planning::kMaxKvChunks : 2;
}

std::int64_t partial_floats(const TilePolicy& policy, const LayerParams& layer) {
  if (policy.max_uncut == kNeverCut) return 0;
  const std::int32_t columns = std::min(policy.v_columns, (layer.head_size_v + 7) / 8 * 8);
  return std::int64_t{policy.rows} * (columns + 2);
}

}  // namespace

// Of the partials of a family, whose tiles may be those of a kernel beside it.
std::int64_t Workspace::floats_of(const KernelFamily& family) const {
  std::int64_t floats = partial_floats(family.first().policy, layer_);
  for (const KernelFamily& few : families_) {
    for (const FamilyMember& member : few.members) {
      if (member.kernel->beside == nullptr || &family != &families_.back()) continue;
      floats = std::max(floats, partial_floats(member.kernel->beside_policy, layer_));
    }
  }
  return std::int64_t{family.grid} * partials_per_cta(layer_, family.first()) * floats;
}

void Workspace::allocate_partials(cudaStream_t stream) {
  if (arrivals_.data() != nullptr) return;
  // Each family has its own, since two may run side by side; but for those that are waited for,
  // which only kernels have that run one after the other.
  std::int64_t floats = 0;
  std::int64_t awaited_floats = 0;
  for (const KernelFamily& family : families_) {
    floats += floats_of(family);
    if (family.first().awaits_partials && !layer_.batch_invariant) {
      awaited_floats = std::max(awaited_floats, floats_of(family));
    }
  }
  // There already, if memory ran out between the two in an earlier update.
  if (partials_.data() == nullptr && floats > 0) {
    partials_.allocate(static_cast<std::size_t>(floats) * sizeof(float), stream);
  }
  if (awaited_partials_.data() == nullptr && awaited_floats > 0) {
    static_assert(kMissing == 0xFFFFFFFFU);
    awaited_partials_.allocate(static_cast<std::size_t>(awaited_floats) * sizeof(float), stream,
                               0xFF);
  }
  arrivals_.allocate(families_.size() * kCounters * sizeof(std::int32_t), stream);
}

TileRule Workspace::rule_of(const KernelFamily& family, const BatchBuffers& buffers) const {
  const TilePolicy& policy = family.first().policy;
  TileRule rule;
  rule.policy = policy;
  if (policy.tokens > 0) rule.policy.rows = policy.tokens * layer_.group;
  rule.max_rows = family.first().key.max_rows;
  rule.heads = layer_.num_kv_heads * num_passes(layer_, policy);
  rule.grid = family.grid;
  rule.kv_chunks = family.first().kv_chunks;
  const std::int64_t kv_tile_bytes = std::int64_t{policy.kv_tile} *
                                     (layer_.head_size + layer_.head_size_v) *
                                     size_of(layer_.kv_dtype);
  // Whole items' keys are few (a window's): all heads at a time, whose rows are neighbours.
  if (policy.max_uncut != kNeverCut) {
    rule.l2_kv_tiles = static_cast<std::int32_t>(device_.l2_bytes / 2 / kv_tile_bytes);
  }
  const std::int64_t tiles =
      buffers.max_seqs +
      (buffers.max_tokens * layer_.group + rule.policy.rows - 1) / rule.policy.rows;
  rule.max_tiles = static_cast<std::int32_t>(std::min<std::int64_t>(tiles, 1 << 30));
  return rule;
}

BatchBuffers& Workspace::buffers_for(const BatchParams& batch, cudaStream_t stream) {
  for (const auto& buffers : buffers_) {
    if (batch.num_seqs <= buffers->max_seqs && batch.num_tokens <= buffers->max_tokens) {
      return *buffers;
    }
  }
  auto made = std::make_unique<BatchBuffers>();
  made->max_seqs = static_cast<std::int32_t>(
      std::bit_ceil(static_cast<std::uint32_t>(std::max(batch.num_seqs, 64))));
  made->max_tokens = static_cast<std::int64_t>(
      std::bit_ceil(static_cast<std::uint64_t>(std::max<std::int64_t>(batch.num_tokens, 1024))));
  Carver carver;
  RuleOffsets at[kMaxFamilies];
  for (std::size_t i = 0; i < families_.size(); ++i) {
    made->rules[i] = rule_of(families_[i], *made);
    at[i] = carve(&carver, made->rules[i], made->max_seqs, families_[i].first());
  }
  made->memory.allocate(carver.size(), stream);
  for (std::size_t i = 0; i < families_.size(); ++i) {
    set_pointers(made->memory.data(), at[i], families_[i].first(), &made->rules[i]);
    made->buckets[i] = buckets_at(made->memory.data(), at[i]);
  }
  // Smaller buffers that no graph refers to are not needed any more.
  std::erase_if(buffers_, [&](const auto& old) {
    return !old->captured && old->max_seqs <= made->max_seqs && old->max_tokens <= made->max_tokens;
  });
  buffers_.push_back(std::move(made));
  return *buffers_.back();
}

void Workspace::allocate_cascade(BatchBuffers* buffers, cudaStream_t stream) const {
  if (buffers->cascade.data() != nullptr) return;
  const KernelFamily& family = families_.back();
  const TilePolicy& policy = family.first().policy;
  const std::int64_t most_tokens = std::max(policy.rows / 2 / layer_.group, 1);
  SharedPrefixes& prefixes = buffers->prefixes;
  prefixes.max_rows = static_cast<std::int32_t>(
      std::min({buffers->max_tokens, buffers->max_seqs * most_tokens, kMaxSharedTokens}));
  TileRule& rule = buffers->shared;
  rule = buffers->rules[families_.size() - 1];
  rule.max_tiles = static_cast<std::int32_t>(
      (std::int64_t{prefixes.max_rows} * layer_.group + policy.rows - 1) / policy.rows +
      kMaxSharedPrefixes);
  const std::int64_t prefix_rows = std::int64_t{prefixes.max_rows} * layer_.num_heads;
  PrefixPartials& prefix_partials = buffers->prefix_partials;
  prefix_partials.pitch = (layer_.head_size_v + 7) / 8 * 8;
  prefix_partials.columns = policy.v_columns;
  prefix_partials.passes = num_passes(layer_, policy);

  Carver carver;
  std::size_t lists[6];
  for (std::size_t& list : lists) list = carver.take<std::int32_t>(buffers->max_seqs);
  const std::size_t list_at = carver.take<SharedPrefix>(kMaxSharedPrefixes);
  const std::size_t rows = carver.take<SharedRow>(prefixes.max_rows);
  const std::size_t o = carver.take<float>(prefix_rows * prefix_partials.pitch);
  const std::size_t max = carver.take<float>(prefix_rows * prefix_partials.passes);
  const std::size_t sum = carver.take<float>(prefix_rows * prefix_partials.passes);
  const RuleOffsets tiles = carve(&carver, rule, 0, family.first());
  buffers->cascade.allocate(carver.size(), stream);

  char* base = buffers->cascade.data();
  std::int32_t** const pointers[] = {&prefixes.leader, &prefixes.blocks, &prefixes.members,
                                     &prefixes.least,  &prefixes.keys,   &prefixes.first_row};
  for (int i = 0; i < 6; ++i) *pointers[i] = reinterpret_cast<std::int32_t*>(base + lists[i]);
  prefixes.list = reinterpret_cast<SharedPrefix*>(base + list_at);
  prefixes.rows = reinterpret_cast<SharedRow*>(base + rows);
  prefix_partials.o = reinterpret_cast<float*>(base + o);
  prefix_partials.max = reinterpret_cast<float*>(base + max);
  prefix_partials.sum = reinterpret_cast<float*>(base + sum);
  set_pointers(base, tiles, family.first(), &rule);
}

float* Workspace::block_output(BatchBuffers* buffers, cudaStream_t stream) const {
  if (buffers->block_output.data() == nullptr) {
    const std::int64_t floats = buffers->max_tokens * layer_.num_heads * layer_.head_size_v;
    buffers->block_output.allocate(static_cast<std::size_t>(floats) * sizeof(float), stream);
  }
  return reinterpret_cast<float*>(buffers->block_output.data());
}

void Workspace::capture_plan(BatchBuffers* buffers) {
  buffers->captured = buffers->captured_plain = true;
}

void Workspace::capture_attention(BatchBuffers* buffers, bool shares, bool apart,
                                  int num_families) {
  buffers->captured = true;
  buffers->captured_apart = buffers->captured_apart || apart;
  buffers->captured_plain = buffers->captured_plain || !shares;
  families_captured_ = std::min(families_captured_, num_families);
}

ScheduleView Workspace::view_of(const BatchBuffers& buffers, const KernelFamily& family,
                                const TileRule& rule) const {
  ScheduleView view;
  view.header = rule.header;
  view.tiles = rule.tiles;
  view.work_ranges = rule.work_ranges;
  view.first_tiles = rule.first_tiles;
  view.arrivals = reinterpret_cast<std::int32_t*>(arrivals_.data());
  view.partials = reinterpret_cast<float*>(partials_.data());
  for (const KernelFamily* before = families_.data(); before != &family; ++before) {
    view.arrivals += kCounters;
    view.partials += floats_of(*before);
  }
  view.taken = view.arrivals + kMaxGrid;
  view.awaited_partials = reinterpret_cast<float*>(awaited_partials_.data());
  view.partial_floats = partial_floats(rule.policy, layer_);
  view.partials_per_cta = partials_per_cta(layer_, family.first());
  view.heads = rule.heads;
  view.prefix_partials = buffers.prefix_partials;
  return view;
}

std::int64_t Workspace::bytes() const {
  std::size_t bytes = partials_.size() + awaited_partials_.size() + arrivals_.size();
  for (const auto& buffers : buffers_) {
    bytes += buffers->memory.size() + buffers->block_output.size() + buffers->cascade.size();
  }
  return static_cast<std::int64_t>(bytes);
}

}  // namespace quire::cuda
