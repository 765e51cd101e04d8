#include "cuda/state.h"

#include <algorithm>
#include <bit>
#include <cstdio>

#include "cuda/check.h"
#include "cuda/kernels.h"
#include "cuda/limits.h"
#include "cuda/shared_prefix.h"

namespace quire::cuda {

DeviceBuffer::~DeviceBuffer() {
  if (data_ != nullptr) cudaFree(data_);
}

void DeviceBuffer::allocate(std::size_t bytes, cudaStream_t stream) {
  if (is_capturing(stream)) {
    throw Error("ctx.stream",
                "a plan that has run a batch of this size before the capture (warm up first)",
                "a capture that would have to allocate " + std::to_string(bytes) + " bytes");
  }
  check(cudaMalloc(&data_, bytes), "cudaMalloc of a workspace");
  size_ = bytes;
  check(cudaMemset(data_, 0, bytes), "cudaMemset of a workspace");
  check(cudaStreamSynchronize(nullptr), "cudaMemset of a workspace");
}

CudaPlan::CudaPlan(const LayerParams& layer)
    : layer_(layer), info_(device_info(layer.device.index)) {
  const DeviceScope scope(layer_.device);
  choose_kernels(layer);
}

CudaPlan::Stage CudaPlan::make_stage(const LayerParams& layer, const sm80::MmaKernel* kernel,
                                     const sm80::MmaKernel* general) const {
  Stage stage;
  int ctas_per_sm = 0;
  if (kernel != nullptr) {
    stage.mma = kernel;
    stage.general = general;
    stage.mma_launch = sm80::mma_launch(*kernel, info_.shared_bytes_per_block);
    sm80::allow_shared_bytes(*general, info_.shared_bytes_per_block);
    if (stage.mma_launch.stages == 0) return {};
    stage.tile_rows = kernel->rows;
    stage.columns = kernel->columns;
    stage.passes = (layer.head_size_v + kernel->columns - 1) / kernel->columns;
    ctas_per_sm = stage.mma_launch.ctas_per_sm;
    stage.chunks = kernel->key.requests != sm80::Requests::kMany;
  } else {
    stage.fp32_launch = sm80::fp32_launch(layer, info_.shared_bytes_per_block);
    stage.tile_rows = sm80::kFp32Rows;
    stage.columns = (layer.head_size_v + 7) / 8 * 8;
    ctas_per_sm = std::max(stage.fp32_launch.ctas_per_sm, 1);
  }
  stage.grid = std::min(info_.sm_count * ctas_per_sm, kMaxGrid);
  stage.slots_per_cta = layer.batch_invariant && stage.chunks ? 1 + semantics::kMaxChunks : 2;
  return stage;
}

void CudaPlan::choose_kernels(const LayerParams& layer) {
  for (int i = 0; i < kNumRules; ++i) {
    const auto find = [&](bool general) {
      return sm80::find_mma_kernel(layer.dtype, layer.kv_dtype, layer.head_size, layer.head_size_v,
                                   sm80::Requests{i}, general);
    };
    if (find(false) != nullptr && find(true) != nullptr) {
      stages_[i] = make_stage(layer, find(false), find(true));
    }
  }
  if (many().tile_rows == 0) {  // no such instance, or too little shared memory for it
    for (Stage& stage : stages_) stage = {};
    stages_[kNumRules - 1] = make_stage(layer, nullptr, nullptr);
  }
}

// How many of the stages, from the first on, requests of up to so many rows need.
int CudaPlan::stages_for(std::int64_t most_rows) const {
  int used = 0;
  while (used < kNumRules - 1 && stages_[used].tile_rows < most_rows) ++used;
  return used + 1;
}

void CudaPlan::allocate_slots(cudaStream_t stream) {
  if (slots_.data() != nullptr) return;
  // The kernels run one after the other and share the memory.
  std::int64_t floats = 0;
  for (const Stage& stage : stages_) {
    floats = std::max(floats, stage.num_slots() * stage.slot_floats());
  }
  slots_.allocate(static_cast<std::size_t>(floats) * sizeof(float), stream);
  arrivals_.allocate((kMaxGrid + 1) * sizeof(std::int32_t), stream);
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
  std::size_t header, tiles, starts, seq_tiles, buckets;
};

RuleOffsets carve(Carver* carver, const TileRule& rule, std::int32_t max_seqs) {
  RuleOffsets at{};
  at.header = carver->take<ScheduleHeader>(1);
  at.tiles = carver->take<Tile>(rule.max_tiles);
  at.starts = carver->take<CtaStart>(kMaxGrid + 1);
  at.seq_tiles = carver->take<std::int32_t>(max_seqs);
  at.buckets = carver->take<CostBuckets>(1);
  return at;
}

void set_pointers(char* base, const RuleOffsets& at, bool takes_whole_items, TileRule* rule) {
  rule->header = reinterpret_cast<ScheduleHeader*>(base + at.header);
  rule->tiles = reinterpret_cast<Tile*>(base + at.tiles);
  rule->starts = reinterpret_cast<CtaStart*>(base + at.starts);
  rule->seq_tiles = reinterpret_cast<std::int32_t*>(base + at.seq_tiles);
  rule->buckets = takes_whole_items ? reinterpret_cast<CostBuckets*>(base + at.buckets) : nullptr;
}

}  // namespace

CudaPlan::Workspace& CudaPlan::workspace_for(const LayerParams& layer, const BatchParams& batch,
                                             cudaStream_t stream) {
  for (const auto& workspace : workspaces_) {
    if (batch.num_seqs <= workspace->max_seqs && batch.num_tokens <= workspace->max_tokens) {
      return *workspace;
    }
  }
  auto made = std::make_unique<Workspace>();
  made->max_seqs = static_cast<std::int32_t>(
      std::bit_ceil(static_cast<std::uint32_t>(std::max(batch.num_seqs, 64))));
  made->max_tokens = static_cast<std::int64_t>(
      std::bit_ceil(static_cast<std::uint64_t>(std::max<std::int64_t>(batch.num_tokens, 1024))));
  const auto rule_of = [&](const Stage& stage) {
    TileRule rule;
    rule.tile_rows = stage.tile_rows;
    rule.heads = layer.num_kv_heads * stage.passes;
    rule.grid = stage.grid;
    rule.chunks = stage.chunks;
    if (stage.tile_rows == 0) return rule;
    const std::int64_t tiles =
        made->max_seqs + (made->max_tokens * layer.group + stage.tile_rows - 1) / stage.tile_rows;
    rule.max_tiles = static_cast<std::int32_t>(std::min<std::int64_t>(tiles, 1 << 30));
    return rule;
  };
  Carver carver;
  RuleOffsets at[kNumRules];
  for (int i = 0; i < kNumRules; ++i) {
    made->rules[i] = rule_of(stages_[i]);
    at[i] = carve(&carver, made->rules[i], made->max_seqs);
  }
  made->memory.allocate(carver.size(), stream);
  for (int i = 0; i < kNumRules; ++i) {
    const bool takes_whole_items = i == kNumRules - 1 && stages_[i].mma != nullptr;
    set_pointers(made->memory.data(), at[i], takes_whole_items, &made->rules[i]);
  }
  // What no graph refers to and is too small has served its time.
  std::erase_if(workspaces_, [&](const auto& old) {
    return !old->captured && old->max_seqs <= made->max_seqs && old->max_tokens <= made->max_tokens;
  });
  current_ = nullptr;
  workspaces_.push_back(std::move(made));
  return *workspaces_.back();
}

namespace {

// Query tokens of a batch that may share a prefix; more stay plain. Two thousand decode: beyond
// them seeds would take much memory (34 MB here for 32 heads of 128) to little avail.
constexpr std::int64_t kMaxSharedTokens = 2048;

}  // namespace

// What batches may share, as far as the host knows: the launch that reads shared prefixes costs
// time on every call, also where the device then finds none.
planning::PrefixRule CudaPlan::cascade_rule(const LayerParams& layer, const BatchParams& batch,
                                            bool capturing) const {
  // Inside a window there is little to share. A graph serves batches of any composition: plain.
  if (layer.mask.window != WindowKind::kNone || capturing || current_->captured_plain) return {};
  // A tile that a request's own rows fill reads its keys once as it is.
  const std::int64_t most_rows = many().tile_rows / 2;
  const planning::PrefixRule rule = planning::prefix_rule(layer, batch, most_rows, most_rows);
  if (layer.group > most_rows || rule.min_blocks == 0) return {};
  std::int64_t longest = batch.table_width * layer.block_size;
  if (batch.max_seq_len > 0) longest = std::min(longest, batch.max_seq_len);
  if (longest < rule.min_blocks * layer.block_size) return {};
  return prefix_pays(rule, batch.num_seqs, longest) ? rule : planning::PrefixRule{};
}

void CudaPlan::allocate_cascade(const LayerParams& layer, Workspace* workspace,
                                cudaStream_t stream) const {
  if (workspace->cascade.data() != nullptr) return;
  const std::int64_t most_tokens = std::max(many().tile_rows / 2 / layer.group, 1);
  SharedPrefixes& prefixes = workspace->prefixes;
  prefixes.max_rows = static_cast<std::int32_t>(
      std::min({workspace->max_tokens, workspace->max_seqs * most_tokens, kMaxSharedTokens}));
  TileRule& rule = workspace->shared;
  rule = workspace->rules[kNumRules - 1];
  rule.max_tiles = static_cast<std::int32_t>(
      (std::int64_t{prefixes.max_rows} * layer.group + rule.tile_rows - 1) / rule.tile_rows +
      kMaxPrefixGroups);
  const std::int64_t seed_rows = std::int64_t{prefixes.max_rows} * layer.num_heads;
  Seeds& seeds = workspace->seeds;
  seeds.pitch = (layer.head_size_v + 7) / 8 * 8;
  seeds.columns = many().columns;
  seeds.passes = many().passes;

  Carver carver;
  std::size_t lists[6];
  for (std::size_t& list : lists) list = carver.take<std::int32_t>(workspace->max_seqs);
  const std::size_t groups = carver.take<PrefixGroup>(kMaxPrefixGroups);
  const std::size_t rows = carver.take<SharedRow>(prefixes.max_rows);
  const std::size_t o = carver.take<float>(seed_rows * seeds.pitch);
  const std::size_t max = carver.take<float>(seed_rows * seeds.passes);
  const std::size_t sum = carver.take<float>(seed_rows * seeds.passes);
  const RuleOffsets tiles = carve(&carver, rule, 0);
  workspace->cascade.allocate(carver.size(), stream);

  char* base = workspace->cascade.data();
  std::int32_t** const pointers[] = {&prefixes.leader, &prefixes.blocks, &prefixes.members,
                                     &prefixes.least,  &prefixes.keys,   &prefixes.first_row};
  for (int i = 0; i < 6; ++i) *pointers[i] = reinterpret_cast<std::int32_t*>(base + lists[i]);
  prefixes.groups = reinterpret_cast<PrefixGroup*>(base + groups);
  prefixes.rows = reinterpret_cast<SharedRow*>(base + rows);
  seeds.o = reinterpret_cast<float*>(base + o);
  seeds.max = reinterpret_cast<float*>(base + max);
  seeds.sum = reinterpret_cast<float*>(base + sum);
  set_pointers(base, tiles, many().mma != nullptr, &rule);
}

void CudaPlan::update(const BatchParams& batch, const Context& ctx) {
  const LayerParams& layer = layer_;
  const cudaStream_t stream = stream_of(ctx);
  const DeviceScope scope(layer.device);
  if (batch.num_seqs == 0 || batch.num_tokens == 0) return;
  allocate_slots(stream);
  current_ = &workspace_for(layer, batch, stream);
  const bool capturing = is_capturing(stream);
  const planning::PrefixRule rule = cascade_rule(layer, batch, capturing);
  shares_ = rule.min_blocks > 0;
  if (shares_) allocate_cascade(layer, current_, stream);
  if (capturing) current_->captured = current_->captured_plain = true;
  num_used_ =
      batch.max_query_len > 0 ? stages_for(batch.max_query_len * layer.group) : num_captured_;
  PlanArgs args;
  args.layer = layer;
  args.batch = batch;
  std::copy(current_->rules, current_->rules + kNumRules, args.rules);
  share_out(args.rules, num_used_);
  // Requests of one length are one kernel's: the others need not be launched. Not in a graph, which
  // serves batches of any composition, nor where bits must not depend on padding, which can make
  // other batches look like this.
  first_used_ = 0;
  if (!capturing && !layer.batch_invariant &&
      batch.num_tokens == batch.num_seqs * batch.max_query_len) {
    first_used_ = num_used_ - 1;
    for (int i = 0; i < first_used_; ++i) args.rules[i].up_to_rows = 0;
    args.rules[first_used_].above_rows = 0;
  }
  args.shared = current_->shared;
  args.prefixes = current_->prefixes;
  args.prefixes.rule = rule;
  launch_plan(args, stream);
}

namespace {

// The largest power of two up to 16 that divides every address of a row.
std::int32_t row_alignment(const KvParams& kv) {
  const auto element = static_cast<std::uint64_t>(size_of(kv.dtype));
  const std::uint64_t bits = reinterpret_cast<std::uintptr_t>(kv.data) |
                             static_cast<std::uint64_t>(kv.strides.block) * element |
                             static_cast<std::uint64_t>(kv.strides.slot) * element |
                             static_cast<std::uint64_t>(kv.strides.head) * element | 16U;
  return 1 << std::countr_zero(bits);
}

bool is_aligned(const void* data, std::int64_t stride_a, std::int64_t stride_b, DType dtype,
                std::int64_t bytes) {
  return reinterpret_cast<std::intptr_t>(data) % bytes == 0 &&
         stride_a * size_of(dtype) % bytes == 0 && stride_b * size_of(dtype) % bytes == 0;
}

}  // namespace

void CudaPlan::attention(const AttentionParams& params, const Context& ctx) {
  const cudaStream_t stream = stream_of(ctx);
  const DeviceScope scope(layer_.device);
  Workspace& workspace = *current_;
  KernelParams p{params};
  const auto block_size = static_cast<std::uint32_t>(p.layer.block_size);
  p.block_shift = std::has_single_bit(block_size) ? std::countr_zero(block_size) : -1;
  p.k_block_bytes = params.k.strides.block * size_of(params.k.dtype);
  p.k_slot_bytes = params.k.strides.slot * size_of(params.k.dtype);
  p.v_block_bytes = params.v.strides.block * size_of(params.v.dtype);
  p.v_slot_bytes = params.v.strides.slot * size_of(params.v.dtype);
  p.k_head_bytes = params.k.strides.head * size_of(params.k.dtype);
  p.v_head_bytes = params.v.strides.head * size_of(params.v.dtype);
  p.k_copy_bytes = row_alignment(params.k);
  p.v_copy_bytes = row_alignment(params.v);
  const bool regular = !p.layer.paged || p.layer.block_size % 16 == 0;
  p.k_simple =
      regular && p.k_copy_bytes >= 16 && p.layer.head_size * size_of(params.k.dtype) % 16 == 0;
  p.v_simple =
      regular && p.v_copy_bytes >= 16 && p.layer.head_size_v * size_of(params.v.dtype) % 16 == 0;
  p.num_blocks = static_cast<std::uint32_t>(std::min<std::int64_t>(params.num_blocks, 1LL << 31));
  p.query_aligned =
      size_of(p.layer.dtype) == 2 && is_aligned(params.query, params.query_token_stride,
                                                params.query_head_stride, p.layer.dtype, 16);
  p.output_aligned =
      is_aligned(params.output, params.output_token_stride, params.output_head_stride,
                 params.output_dtype, size_of(params.output_dtype) == 1 ? 8 : 16);
  if (params.block_scales != nullptr) {
    if (workspace.block_output.data() == nullptr) {
      workspace.block_output.allocate(
          static_cast<std::size_t>(workspace.max_tokens * p.layer.num_heads * p.layer.head_size_v) *
              sizeof(float),
          stream);
    }
    p.block_output = reinterpret_cast<float*>(workspace.block_output.data());
  }
  const bool capturing = is_capturing(stream);
  if (capturing) {
    workspace.captured = true;
    workspace.captured_plain = workspace.captured_plain || !shares_;
    num_captured_ = std::min(num_captured_, num_used_);
  }
  if (shares_) {
    ScheduleView shared = view_of(many(), workspace.shared);
    shared.shared_rows = workspace.prefixes.rows;
    launch(many(), shared, p, stream);
  }
  for (int i = capturing ? 0 : first_used_; i < num_used_; ++i) {
    const Stage& stage = stages_[i];
    if (stage.tile_rows > 0) launch(stage, view_of(stage, workspace.rules[i]), p, stream);
  }
  if (p.block_output != nullptr) {
    launch_block_quantize(
        p, static_cast<int>(std::min(p.batch.num_tokens, std::int64_t{info_.sm_count} * 4)),
        stream);
  }
}

ScheduleView CudaPlan::view_of(const Stage& stage, const TileRule& rule) const {
  ScheduleView view;
  view.header = rule.header;
  view.tiles = rule.tiles;
  view.starts = rule.starts;
  view.arrivals = reinterpret_cast<std::int32_t*>(arrivals_.data());
  view.taken = view.arrivals + kMaxGrid;
  view.slots = reinterpret_cast<float*>(slots_.data());
  view.slot_floats = stage.slot_floats();
  view.slots_per_cta = stage.slots_per_cta;
  view.heads = rule.heads;
  view.seeds = current_->seeds;
  return view;
}

void CudaPlan::launch(const Stage& stage, const ScheduleView& schedule, KernelParams params,
                      cudaStream_t stream) const {
  params.schedule = schedule;
  params.columns = stage.columns;
  params.passes = stage.passes;
  if (stage.mma != nullptr) {
    params.stages = stage.mma_launch.stages;
    const LayerParams& layer = params.layer;
    const bool general =
        layer.soft_cap > 0 || layer.alibi_slopes != nullptr || params.batch.qq_bias != nullptr;
    sm80::launch_attention_mma(general ? *stage.general : *stage.mma, stage.mma_launch, params,
                               stage.grid, stream);
  } else {
    sm80::launch_attention_fp32(params, stage.fp32_launch, stage.grid, stream);
  }
}

std::int64_t CudaPlan::workspace_bytes() const {
  std::size_t bytes = slots_.size() + arrivals_.size();
  for (const auto& workspace : workspaces_) {
    bytes += workspace->memory.size() + workspace->block_output.size() + workspace->cascade.size();
  }
  return static_cast<std::int64_t>(bytes) + cascade_tensors_.bytes();
}

// The plan proper lives on the device and is not read back.
std::string CudaPlan::to_string() const {
  std::string text;
  for (const Stage& stage : stages_) {
    if (stage.tile_rows == 0) continue;
    char line[240];
    std::snprintf(line, sizeof line, "%s: tiles of %d rows, %d CTAs, %d stages, %d column passes\n",
                  stage.mma != nullptr ? stage.mma->name : "sm80::attention_fp32", stage.tile_rows,
                  stage.grid, stage.mma_launch.stages, stage.passes);
    text += line;
  }
  if (shares_) text += "find_partners: shared prefixes are looked for\n";
  return text;
}

}  // namespace quire::cuda
