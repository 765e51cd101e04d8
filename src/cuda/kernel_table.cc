#include "cuda/kernel_table.h"

#include <algorithm>
#include <span>

#include "semantics/int4.h"

namespace quire::cuda {

// X(folder) for each architecture of this build, the newest first, fp32 last; written by CMake.
#define X(architecture)                       \
  namespace architecture {                    \
  std::span<const AttentionKernel> kernels(); \
  }
#include "cuda_architectures.inc"
#undef X

const KernelTable& kernel_table() {
#define X(architecture) architecture::kernels(),
  static const KernelTable table = {
#include "cuda_architectures.inc"
  };
#undef X
  return table;
}

std::string describe(const AttentionKernel& kernel) {
  const KernelKey& key = kernel.key;
  std::string text;
  if (key.compute == DType::kFloat32) {
    text = "everything, in fp32 arithmetic";
  } else {
    const std::string compute = to_string(key.compute);
    // Those of single head sizes take 16-bit queries.
    const bool takes_fp8 = key.kv8 && key.compute == DType::kFloat16 && !key.exact_head_size;
    text = compute + (takes_fp8 ? " and fp8" : "") + " queries; K and V in " +
           (key.kv8 ? "8 bits" : compute) + (key.token_scales ? "" : " without tokens' scales");
  }
  text += (key.exact_head_size ? "; head size " : "; head sizes up to ") +
          std::to_string(key.max_head_size);
  if (key.max_rows != kAnyRows) {
    text += "; sequences of up to " + std::to_string(key.max_rows) + " query rows";
  }
  if (!key.plain) text += "; soft cap, ALiBi or query-query bias";
  if (kernel.beside != nullptr) text += std::string("; in one launch with ") + kernel.beside;
  if (kernel.takes != nullptr) text += "; caches that tensor maps fit";
  return text;
}

namespace {

bool is_fp8(DType dtype) { return dtype == DType::kFloat8E4M3 || dtype == DType::kFloat8E5M2; }

bool takes_dtypes(const KernelKey& key, DType query, DType kv) {
  if (key.compute == DType::kFloat32) return true;
  const bool is_kv8 = size_of(kv) == 1 && kv != semantics::kInt4;
  if (query == key.compute) return key.kv8 ? is_kv8 : kv == key.compute;
  return query == DType::kFloat8E4M3 && is_fp8(kv) && key.kv8 && key.compute == DType::kFloat16;
}

bool takes_layer(const KernelKey& key, const LayerParams& layer, const DeviceInfo& device) {
  const int capability = device.major * 10 + device.minor;
  return capability >= key.min_capability && capability <= key.max_capability &&
         takes_dtypes(key, layer.dtype, layer.kv_dtype) &&
         (key.token_scales || !layer.token_scales) &&
         std::max(layer.head_size, layer.head_size_v) <= key.max_head_size &&
         layer.head_size_v >= key.min_head_size_v &&
         (!key.exact_head_size ||
          (layer.head_size == key.max_head_size && layer.head_size_v == key.max_head_size));
}

bool share_tiles(const AttentionKernel& a, const AttentionKernel& b) {
  return a.key.max_rows == b.key.max_rows && a.policy == b.policy &&
         a.whole_items == b.whole_items && a.shared_prefix == b.shared_prefix &&
         a.kv_chunks == b.kv_chunks && a.awaits_partials == b.awaits_partials;
}

// Whether some member takes the layer's usual calls: its own scores, the strides of its caches.
bool serves(const KernelFamily& family, const LayerParams& layer) {
  const bool score_mod = layer.soft_cap > 0 || layer.alibi_slopes != nullptr;
  return std::any_of(family.members.begin(), family.members.end(), [&](const FamilyMember& m) {
    return score_mod ? m.kernel->key.score_mod : m.kernel->key.plain;
  });
}

// The family that the kernel `first` leads, of the rows `candidates`; no members if one of them
// does not fit the device or calls are left that none of them takes but one should.
KernelFamily family_of(const AttentionKernel& first,
                       const std::vector<const AttentionKernel*>& candidates,
                       const LayerParams& layer, const DeviceInfo& device, Calls calls) {
  KernelFamily family;
  for (const AttentionKernel* kernel : candidates) {
    if (!share_tiles(*kernel, first)) continue;
    FamilyMember member{kernel, {}};
    if (!kernel->prepare(layer, device, &member.launch)) return {};
    family.members.push_back(member);
  }
  if (calls == Calls::kAny ? !family.is_complete() : !serves(family, layer)) return {};
  const int ctas = family.members.front().launch.ctas_per_sm;
  family.grid = std::min(device.sm_count * std::max(ctas, 1), kMaxGrid);
  return family;
}

}  // namespace

std::vector<KernelFamily> choose_kernels(const KernelTable& table, const LayerParams& layer,
                                         const DeviceInfo& device, Calls calls) {
  std::vector<KernelFamily> families;
  std::int32_t served_rows = 0;  // by newer architectures
  for (const std::span<const AttentionKernel> architecture : table) {
    std::vector<const AttentionKernel*> candidates;
    for (const AttentionKernel& kernel : architecture) {
      if (takes_layer(kernel.key, layer, device)) candidates.push_back(&kernel);
    }
    const std::int32_t newer = served_rows;
    for (const AttentionKernel* kernel : candidates) {
      const std::int32_t rows = kernel->key.max_rows;
      const bool is_served = std::any_of(
          families.begin(), families.end(),
          [&](const KernelFamily& family) { return family.first().key.max_rows == rows; });
      if ((rows <= newer && rows != kAnyRows) || is_served || kernel->beside != nullptr) continue;
      KernelFamily family = family_of(*kernel, candidates, layer, device, calls);
      if (family.members.empty()) continue;
      families.push_back(std::move(family));
      if (rows != kAnyRows) served_rows = std::max(served_rows, rows);
    }
  }
  std::sort(families.begin(), families.end(), [](const KernelFamily& a, const KernelFamily& b) {
    return a.first().key.max_rows < b.first().key.max_rows;
  });
  // Rows of a family that the plan has no rule for go to the next one, which takes them too.
  while (families.size() > static_cast<std::size_t>(kMaxFamilies)) families.erase(families.begin());
  return families;
}

bool KernelFamily::is_complete() const {
  const auto any = [&](bool KernelKey::*form) {
    return std::any_of(members.begin(), members.end(), [&](const FamilyMember& m) {
      return m.kernel->key.*form && m.kernel->takes == nullptr;
    });
  };
  return any(&KernelKey::plain) && any(&KernelKey::score_mod);
}

const FamilyMember* KernelFamily::member_for(const KernelParams& params) const {
  const LayerParams& layer = params.layer;
  const bool score_mod =
      layer.soft_cap > 0 || layer.alibi_slopes != nullptr || params.batch.qq_bias != nullptr;
  for (const FamilyMember& member : members) {
    const KernelKey& key = member.kernel->key;
    if (member.kernel->launch_beside == nullptr && (score_mod ? key.score_mod : key.plain) &&
        (member.kernel->takes == nullptr || member.kernel->takes(params))) {
      return &member;
    }
  }
  return nullptr;
}

}  // namespace quire::cuda
